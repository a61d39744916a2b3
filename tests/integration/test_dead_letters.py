"""Refused records in their topics on the real broker."""

from __future__ import annotations

import random
from contextlib import closing

import msgspec
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, WireError
from esrl_ray.vocabulary import Refusal
from streaming import wire
from streaming.broker import DEAD_LETTER_SUFFIX, LATE_SUFFIX, ensure_topics
from streaming.client import connect
from streaming.deadletter import CUT_BYTES, MAX_REASON_BYTES, DeadLetters
from streaming.records import Record
from streaming.source import partition_of


def test_a_dead_letter_keeps_its_bytes_and_says_why(kafka_config: KafkaConfig) -> None:
    letters = DeadLetters(kafka_config)
    refused = Record(kafka_config.feedback_topic, 3, 42, 1, b"key", b"\xffnot an event", wire.JSON)
    empty = refused._replace(offset=43, value=None)
    letters.send(refused, WireError("not a Feedback: ä", Refusal.MALFORMED))
    letters.send(empty, WireError("the record has no value", Refusal.NO_VALUE))
    letters.flush()
    letters.close()
    assert letters.sent == 2
    reader = connect(KafkaConsumer, kafka_config, auto_offset_reset="earliest")
    reader.assign([TopicPartition(kafka_config.feedback_topic + DEAD_LETTER_SUFFIX, 0)])
    (found,) = reader.poll(timeout_ms=10_000).values()
    reader.close()
    assert [(r.key, r.value) for r in found] == [
        (f"{kafka_config.feedback_topic}/3/{n}".encode(), v) for n, v in ((42, b"\xffnot an event"), (43, None))
    ]
    assert dict(found[0].headers) == {
        "error": "not a Feedback: ä".encode(),
        "code": b"malformed",
        "timestamp": b"1",
        "key": b"key",
        "topic": kafka_config.feedback_topic.encode(),
        "partition": b"3",
        "offset": b"42",
        "content-type": wire.JSON,
    }


def test_dead_letters_that_cannot_be_delivered_stop_the_commit(kafka_config: KafkaConfig) -> None:
    letters = DeadLetters(kafka_config.model_copy(update={"bootstrap_servers": "127.0.0.1:9"}), flush_timeout_s=0.0)
    letters.send(Record(kafka_config.feedback_topic, 0, 0, 1, None, b"?", wire.JSON), WireError("bad", Refusal.MALFORMED))
    with pytest.raises(BrokerError, match="1 dead letters or late events were not acknowledged"):
        letters.flush()


def test_what_its_topic_does_not_take_is_cut_and_the_others_come_whole(kafka_config: KafkaConfig) -> None:
    """A topic that somebody else made; the headers of the large one alone would not go in either."""
    config = kafka_config.model_copy(update={"feedback_topic": kafka_config.feedback_topic + "-small"})
    topic = config.feedback_topic + DEAD_LETTER_SUFFIX
    with closing(connect(KafkaAdminClient, config)) as admin:
        admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1, "configs": {"max.message.bytes": "90000"}}})
    value = random.Random(0).randbytes(100_000)
    large = Record(config.feedback_topic, 3, 1, 7, value, value, value)
    letters = DeadLetters(config)
    for record in (
        large._replace(offset=0, key=b"k", value=b"a", content_type=wire.JSON),
        large,
        large._replace(offset=2, key=b"k", value=b"c"),
    ):
        letters.send(record, WireError("bad", Refusal.MALFORMED))
    letters.flush()
    letters.close()
    assert letters.sent == 3
    with closing(connect(KafkaConsumer, config, auto_offset_reset="earliest")) as reader:
        reader.assign([TopicPartition(topic, 0)])
        found: dict[bytes, tuple[bytes, dict[str, bytes]]] = {}
        while len(found) < 3:
            found |= {r.key: (r.value, dict(r.headers)) for batch in reader.poll(timeout_ms=10_000).values() for r in batch}
    cut, told = found[f"{config.feedback_topic}/3/1".encode()]
    assert cut == value[:CUT_BYTES] and told["truncated"] == b"1" and told["bytes"] == b"100000" and told["key"] == value[:MAX_REASON_BYTES]
    assert (told["partition"], told["offset"], told["code"]) == (b"3", b"1", b"malformed")
    assert (
        found[f"{config.feedback_topic}/3/0".encode()][0] == b"a" and "truncated" not in found[f"{config.feedback_topic}/3/0".encode()][1]
    )


def test_late_events_stand_in_a_topic_of_their_own_like_any_event(kafka_config: KafkaConfig) -> None:
    config = kafka_config.model_copy(update={"late_topics": True})
    ensure_topics(config)
    event = wire.Feedback(schema_version=1, event_id="e", decision_id="d", session_id="s", behaviour="leave", event_time_ms=1)
    value = b'{"of":"another sender",' + msgspec.json.encode(event)[1:]
    record = Record(config.feedback_topic, 3, 42, 7, b"s", value, wire.JSON)
    letters = DeadLetters(config)
    letters.late(config.feedback_topic, record)
    letters.late(config.feedback_topic, event)  # its record is gone
    letters.flush()
    letters.close()
    reader = connect(KafkaConsumer, config, auto_offset_reset="earliest")
    topic = config.feedback_topic + LATE_SUFFIX
    reader.assign([TopicPartition(topic, p) for p in reader.partitions_for_topic(topic)])
    ((kept, encoded),) = reader.poll(timeout_ms=10_000).values()
    reader.close()
    origin = {"code": b"late", "topic": config.feedback_topic.encode()}
    place = {"partition": b"3", "offset": b"42", "timestamp": b"7", "content-type": wire.JSON}
    assert (kept.value, dict(kept.headers)) == (value, origin | place)
    assert dict(encoded.headers) == origin | {"content-type": wire.MSGPACK}
    for found in (kept, encoded):
        assert found.key == b"s" and found.partition == partition_of(b"s", 4)
        assert wire.decode_feedback(found.value, dict(found.headers)["content-type"]) == event
