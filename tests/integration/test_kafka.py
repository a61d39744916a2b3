"""The real broker: both events there and back, crashes, gaps."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import StreamError
from streaming import wire
from streaming.broker import EmbeddedBroker, end_offsets, ensure_topics
from streaming.client import connect
from streaming.producer import EventProducer
from streaming.source import Record, Source

ALL = range(4)


def _feedback(number: int, session: str = "s") -> wire.Feedback:
    return wire.Feedback(
        schema_version=1,
        event_id=f"e{number}",
        decision_id="d",
        session_id=f"{session}{number % 7}",
        behaviour="click",
        event_time_ms=number,
        item_id="i",
    )


def _decision() -> wire.Decision:
    return wire.Decision(
        schema_version=1,
        decision_id="d",
        request_id="r",
        session_id="s0",
        user_id="u",
        event_time_ms=1,
        policy_version=1,
        round=0,
        arm="control",
        spec_digest="x",
        num_candidates=1,
        item_ids=["i"],
        positions=[0],
        states=bytes(8),
        categorical=b"",
        scores=bytes(4),
        actions=bytes(8),
        anchor_actions=bytes(8),
        fused_scores=bytes(4),
    )


def _read(source: Source, num: int, *, timeout_s: float = 20.0) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + timeout_s
    while len(records) < num and time.monotonic() < deadline:
        records += source.poll(100)
    return records


def _until(true: object, *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def _source(config: KafkaConfig, positions: dict[str, int] | None = None) -> Source:
    return Source(config, ALL, positions or {}, max_poll_records=500)


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker that the test may kill."""
    with EmbeddedBroker.start(tmp_path / "own-broker", say=print) as embedded:
        yield embedded


def test_both_events_come_back_as_sent_and_meet_in_one_partition(kafka_config: KafkaConfig) -> None:
    producer = EventProducer(kafka_config, client_id="test", spool=None)
    producer.send(_decision())
    for number in range(20):
        producer.send(_feedback(number))
    assert producer.flush(10)
    producer.close()
    assert producer.acked == {kafka_config.decisions_topic: 1, kafka_config.feedback_topic: 20}
    assert (producer.spooled, producer.failed) == (0, 0)
    source = _source(kafka_config)
    records = _read(source, 21)
    assert {r.content_type for r in records} == {wire.MSGPACK}
    (decision,) = (r for r in records if r.topic == kafka_config.decisions_topic)
    feedback = {
        event.event_id: event
        for r in records
        if r.topic == kafka_config.feedback_topic
        for event in [wire.decode_feedback(r.value, r.content_type)]
    }
    assert feedback == {f"e{number}": _feedback(number) for number in range(20)}
    assert {r.partition for r in records if r.key == b"s0"} == {decision.partition}
    source.close()


def test_positions_are_next_offsets_and_reading_goes_on_from_them(kafka_config: KafkaConfig) -> None:
    producer = EventProducer(kafka_config, client_id="test", spool=None)
    for number in range(50):
        producer.send(_feedback(number))
    assert producer.flush(10)
    first = Source(kafka_config, ALL, {}, max_poll_records=10)
    seen = _read(first, 10)
    positions = first.positions()
    first.close()
    second = _source(kafka_config, positions)
    rest = _read(second, 50 - len(seen))
    assert sorted(r.key or b"" for r in seen + rest) == sorted(_feedback(n).session_id.encode() for n in range(50))
    assert len({(r.partition, r.offset) for r in seen + rest}) == 50
    assert {k: v for k, v in second.positions().items() if v} == {
        f"{t}/{p}": end for (t, p), end in end_offsets(kafka_config).items() if end
    }
    _until(lambda: second.poll(50) == [] and all(second.at_end(kafka_config.feedback_topic, p) for p in ALL))
    assert second.at_end(kafka_config.decisions_topic, 0)  # an idle partition is at its end too
    assert sum(second.lag().values()) == 0
    producer.send(_feedback(50))
    producer.close()
    assert len(_read(second, 1)) == 1
    second.close()


def test_aborted_transactions_are_not_read_and_do_not_keep_a_partition_from_its_end(kafka_config: KafkaConfig) -> None:
    producer = connect(KafkaProducer, kafka_config, transactional_id=uuid.uuid4().hex)
    producer.init_transactions()
    for commit in (True, False):
        producer.begin_transaction()
        producer.send(kafka_config.feedback_topic, value=b"yes" if commit else b"no", partition=1)
        producer.flush()
        (producer.commit_transaction if commit else producer.abort_transaction)()
    producer.close()
    source = _source(kafka_config)
    assert [r.value for r in _read(source, 1)] == [b"yes"]
    _until(lambda: source.poll(50) == [] and source.at_end(kafka_config.feedback_topic, 1))
    assert source.positions()[f"{kafka_config.feedback_topic}/1"] == 4
    source.close()


def test_a_broker_killed_under_load_and_started_again_loses_no_event(own_broker: EmbeddedBroker, tmp_path: Path) -> None:
    config = KafkaConfig(bootstrap_servers=own_broker.bootstrap_servers)
    ensure_topics(config)
    producer = EventProducer(config, client_id="replica", spool=tmp_path / "spool")
    source, records, stop = _source(config), [], threading.Event()
    longest_send_s, num = 0.0, 0

    def read() -> None:
        while not stop.is_set():
            records.extend(source.poll(50))

    reader = threading.Thread(target=read)
    reader.start()
    started = time.monotonic()
    down_s = 0.0
    while (now := time.monotonic() - started) < 4 or not own_broker.alive or producer.degraded_s:
        producer.send(_feedback(num))
        num += 1
        longest_send_s = max(longest_send_s, time.monotonic() - started - now)
        if now > 1.5 and not down_s:
            down_s = now
            os.kill(own_broker.pid, signal.SIGKILL)
            assert own_broker.wait_dead(5)
            assert not own_broker.alive
        if down_s and now > down_s + 2.5 and not own_broker.alive:
            assert source.degraded_s > 0
            assert not source.at_end(config.feedback_topic, 0)
            assert producer.spooled > 0
            threading.Thread(target=own_broker.restart).start()
            _until(lambda: own_broker.alive)
        time.sleep(0.002)
        assert now < 60
    assert producer.flush(30)
    producer.close()
    _until(lambda: len({r.value for r in records}) == num)
    stop.set()
    reader.join()
    source.close()
    ids = [wire.decode_feedback(r.value, r.content_type).event_id for r in records]
    assert set(ids) == {f"e{n}" for n in range(num)}
    assert producer.acked[config.feedback_topic] == num
    assert producer.failed == 0
    assert longest_send_s < 5.0  # the kill and waiting for it included
    assert source.degraded_s == 0
    assert sum(end_offsets(config).values()) == len(ids)  # every acknowledged record was read, doubled ones included


def test_what_waits_on_disk_is_sent_by_the_next_producer(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    nowhere = kafka_config.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})
    first = EventProducer(nowhere, client_id="replica-a", spool=tmp_path)
    for number in range(100):
        first.send(_feedback(number, session="same"))
    _until(lambda: first.spooled == 100)
    first.close(timeout_s=0.1)
    assert (first.failed, first.acked) == (0, {})
    second = EventProducer(kafka_config, client_id="replica-b", spool=tmp_path)  # a new replica has a new id
    second.send(_feedback(100))
    assert second.flush(15)
    second.close()
    assert second.acked == {kafka_config.feedback_topic: 101}
    source = _source(kafka_config)
    records = _read(source, 101)
    source.close()
    for partition in ALL:
        numbers = [int(wire.decode_feedback(r.value, r.content_type).event_id[1:]) for r in records if r.partition == partition]
        assert numbers == sorted(numbers)
    assert {r.value for r in records} == {wire.encode(_feedback(n, session="same")) for n in range(100)} | {wire.encode(_feedback(100))}
    assert not any(tmp_path.iterdir())  # nothing waits, nothing is left


def test_an_event_that_is_too_large_is_counted_and_holds_nobody_up(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    producer = EventProducer(kafka_config, client_id="test", spool=tmp_path)
    producer.send(_feedback(0))
    producer.send(
        wire.Feedback(
            schema_version=1, event_id="x" * (wire.MAX_EVENT_BYTES + 1), decision_id="d", session_id="s", behaviour="leave", event_time_ms=1
        )
    )
    producer.send(_feedback(1))
    assert producer.flush(10)
    producer.close()
    assert (producer.acked[kafka_config.feedback_topic], producer.failed, producer.spooled) == (2, 1, 0)


def test_a_position_before_the_first_kept_record_is_an_error_that_names_the_gap(kafka_config: KafkaConfig) -> None:
    producer = connect(KafkaProducer, kafka_config)
    for _ in range(10):
        producer.send(kafka_config.feedback_topic, value=b"x", partition=2)
    producer.close()
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_records({TopicPartition(kafka_config.feedback_topic, 2): 6})
    admin.close()
    late = _source(kafka_config, {f"{kafka_config.feedback_topic}/2": 3})
    with pytest.raises(StreamError, match=rf"position 3 .* 6 to 10: retention.*{kafka_config.feedback_topic}\[2\]@3"):
        late.poll(100)
    early = _source(kafka_config, {f"{kafka_config.feedback_topic}/2": 11})
    with pytest.raises(StreamError, match="made anew"):
        early.poll(100)
    fresh = _source(kafka_config)
    assert [r.offset for r in _read(fresh, 4)] == [6, 7, 8, 9]
    for source in (late, early, fresh):
        source.close()


def test_records_below_the_positions_are_read_again_first_and_then_it_goes_on(kafka_config: KafkaConfig) -> None:
    producer, topic = connect(KafkaProducer, kafka_config), kafka_config.decisions_topic
    for number in range(12):
        for partition in (0, 1, 2):
            producer.send(topic, value=b"%d" % number, partition=partition)
    producer.send(kafka_config.feedback_topic, value=b"f", partition=0)
    producer.flush()
    positions = {f"{topic}/{p}": 8 for p in ALL if p < 3}
    source = Source(kafka_config, ALL, positions, max_poll_records=5)
    source.read_again({f"{topic}/0": 3, f"{topic}/1": 6})
    again: list[Record] = []
    for _ in range(300):
        again += source.poll(100) if source.reads_again else []
    offsets = {p: [r.offset for r in again if r.partition == p] for p in ALL}
    assert offsets == {0: [3, 4, 5, 6, 7], 1: [6, 7], 2: [], 3: []} and {r.topic for r in again} == {topic}
    assert positions.items() <= source.positions().items() and not source.at_end(topic, 0)
    rest = _read(source, 13)
    assert sorted((r.topic, r.partition, r.offset) for r in rest) == sorted(
        [(topic, p, offset) for p in range(3) for offset in range(8, 12)] + [(kafka_config.feedback_topic, 0, 0)]
    )
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_records({TopicPartition(topic, 0): 5})
    admin.close()
    late = Source(kafka_config, ALL, positions, max_poll_records=5)
    late.read_again({f"{topic}/0": 3})
    with pytest.raises(StreamError, match=rf"from offset 3 on .* has is 5: .*{topic}\[0\]@3.*join.label_age_s"):
        late.poll(100)
    for closed in (producer, source, late):
        closed.close()


def test_a_partition_that_is_held_waits_where_it_is(kafka_config: KafkaConfig) -> None:
    producer, topic = connect(KafkaProducer, kafka_config), kafka_config.decisions_topic
    for number in range(20):
        for partition in (0, 1):
            producer.send(topic, value=b"%d" % number, partition=partition)
    producer.flush()
    source = Source(kafka_config, ALL, {}, max_poll_records=5)
    first = _read(source, 1)
    source.hold([(topic, first[0].partition)])
    other = 1 - first[0].partition
    while not source.at_end(topic, other):
        first += source.poll(100)
    held = [r.offset for r in first if r.partition == 1 - other]
    assert len(held) <= 5 and not source.at_end(topic, 1 - other)
    source.hold([])
    rest = _read(source, 20 - len(held))
    assert [*held, *(r.offset for r in rest)] == list(range(20)) and {r.partition for r in rest} == {1 - other}
    producer.close()
    source.close()


def test_records_deleted_in_front_of_a_running_reader_are_an_error_too(kafka_config: KafkaConfig) -> None:
    producer = connect(KafkaProducer, kafka_config)
    producer.send(kafka_config.feedback_topic, value=b"x" * 100, partition=0)
    producer.flush()
    source = Source(kafka_config, ALL, {}, max_poll_records=1)
    assert len(_read(source, 1)) == 1
    for _ in range(5):
        source._consumer.pause(TopicPartition(kafka_config.feedback_topic, 0))
        producer.send(kafka_config.feedback_topic, value=b"x", partition=0)
        producer.flush()
    producer.close()
    admin = connect(KafkaAdminClient, kafka_config)
    admin.delete_records({TopicPartition(kafka_config.feedback_topic, 0): 4})
    admin.close()
    source._consumer.resume(TopicPartition(kafka_config.feedback_topic, 0))
    with pytest.raises(StreamError, match=r"position 1 .* 4 to 6"):
        for _ in range(100):
            source.poll(50)
    source.close()


def test_topics_with_another_number_of_partitions_are_refused(kafka_config: KafkaConfig) -> None:
    wrong = kafka_config.model_copy(update={"num_partitions": 3})
    with pytest.raises(StreamError, match=r"has 4 partitions, kafka\.num_partitions is 3"):
        ensure_topics(wrong)
    with pytest.raises(StreamError, match="has 4 partitions"):
        Source(wrong, range(3), {}, max_poll_records=10).poll(100)


def test_partitions_added_while_reading_stop_the_reader(kafka_config: KafkaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.source.METADATA_MAX_AGE_MS", 500)
    source = _source(kafka_config)
    source.poll(50)
    admin = connect(KafkaAdminClient, kafka_config)
    admin.create_partitions({kafka_config.feedback_topic: 6})
    admin.close()
    with pytest.raises(StreamError, match=r"has 6 partitions, kafka\.num_partitions is 4"):
        for _ in range(100):
            source.poll(50)
    source.close()
