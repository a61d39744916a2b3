"""Refused records in their topics on the real broker."""

from __future__ import annotations

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, WireError
from esrl_ray.vocabulary import Refusal
from streaming import wire
from streaming.broker import DEAD_LETTER_SUFFIX, LATE_SUFFIX, ensure_topics
from streaming.client import connect
from streaming.deadletter import DeadLetters
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
