"""The real broker: both events there and back, crashes, gaps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaProducer

from esrl_ray.config import KafkaConfig
from streaming import wire
from streaming.broker import EmbeddedBroker, end_offsets, ensure_topics
from streaming.client import connect
from streaming.producer import EventProducer
from streaming.records import Record
from streaming.source import Source

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
