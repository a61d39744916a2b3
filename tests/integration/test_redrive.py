"""Dead letters listed and sent again on the real broker: once, through crashes and rivals, and not for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from click.testing import CliRunner
from kafka import KafkaProducer

from esrl_ray.cli.dlq import dlq_group
from esrl_ray.config import KafkaConfig
from esrl_ray.errors import StreamError, WireError
from esrl_ray.vocabulary import Refusal
from streaming import redrive
from streaming.broker import DEAD_LETTER_SUFFIX
from streaming.client import connect
from streaming.deadletter import CUT_BYTES, DeadLetters
from streaming.records import Record
from streaming.redrive import Redriver, read_letters
from streaming.source import partition_of
from streaming.wire import JSON, MSGPACK
from tests.integration.test_kafka import _read, _source


@contextmanager
def dead_letters(config: KafkaConfig) -> Iterator[DeadLetters]:
    with closing(DeadLetters(config)) as letters:
        yield letters
        letters.flush()


def refuse(config: KafkaConfig, *offsets: int, code: Refusal = Refusal.UNDECLARED_BEHAVIOUR, attempts: int = 0) -> None:
    with dead_letters(config) as letters:
        for n in offsets:
            record = Record(config.feedback_topic, 3, n, 1_000 + n, b"s%d" % n, b"bytes %d" % n, MSGPACK, attempts)
            letters.send(record, WireError(f"reason {n}", code))


def esrl_dlq(config: KafkaConfig, *args: str) -> str:
    settings = {
        "bootstrap_servers": config.bootstrap_servers,
        "decisions_topic": config.decisions_topic,
        "feedback_topic": config.feedback_topic,
    }
    sets = [arg for name, value in settings.items() for arg in ("--set", f"kafka.{name}={value}")]
    result = CliRunner().invoke(dlq_group, [*args, *sets], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_letters_are_counted_by_reason_and_sent_again_once_with_their_key_and_bytes(kafka_config: KafkaConfig) -> None:
    topic = kafka_config.feedback_topic
    refuse(kafka_config, 10, 11, 12)
    refuse(kafka_config, 11)  # a worker died between this letter and its commit
    refuse(kafka_config, 20, code=Refusal.MALFORMED)
    with dead_letters(kafka_config) as letters:
        letters.send(Record(kafka_config.decisions_topic, 0, 7, 1, None, None, JSON), WireError("no value", Refusal.NO_VALUE))
    found = json.loads(esrl_dlq(kafka_config, "list", "--json"))
    assert [(row["topic"], row["code"], row["letters"], row["redriven"], row["partitions"]) for row in found] == [
        (kafka_config.decisions_topic, "no-value", 1, 0, {"0": 1}),
        (topic, "malformed", 1, 0, {"3": 1}),
        (topic, "undeclared-behaviour", 3, 0, {"3": 3}),
    ]
    assert found[2]["samples"] == [{"partition": 3, "offset": 12, "error": "reason 12", "key": "s12", "value": "bytes 12"}]
    chosen = ("redrive", "--code", "undeclared-behaviour", "--from-offset", "11", "--topic", "feedback")
    assert f"{topic}: 2 records would be sent again" in esrl_dlq(kafka_config, *chosen, "--dry-run")
    assert f"{topic}: 1 records were sent again" in esrl_dlq(kafka_config, *chosen, "--limit", "1")
    assert json.loads(esrl_dlq(kafka_config, *chosen, "--json"))["sent"] == {topic: 1}
    assert json.loads(esrl_dlq(kafka_config, *chosen, "--json"))["sent"] == {topic: 0}
    with closing(_source(kafka_config)) as source:
        records = _read(source, 2, timeout_s=60.0) + _read(source, 1, timeout_s=1.0)
    assert sorted((r.key, r.value, r.content_type, r.attempts, r.partition) for r in records) == [
        (key, b"bytes " + key[1:], MSGPACK, 1, partition_of(key, 4)) for key in (b"s11", b"s12")
    ]
    text = esrl_dlq(kafka_config, "list", "--samples", "2")
    assert "5 letters, 2 of them sent again" in text and "reason 12" in text and "reason 10" not in text


def test_a_redrive_that_stands_still_is_overtaken_and_nothing_is_sent_twice(
    kafka_config: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redrive, "TRANSACTION_RECORDS", 2)
    refuse(kafka_config, *range(5))
    paused = Redriver(kafka_config, kafka_config.feedback_topic)
    commit, by_successor = paused._producer.commit_transaction, list[int]()

    def commit_late() -> None:
        """Before its second commit another redrive begins, as after a crash: it ends the transaction that was left open."""
        if len(by_successor) == 1:
            with closing(Redriver(kafka_config, kafka_config.feedback_topic)) as successor:
                by_successor.append(successor.run(lambda _: True))
        by_successor.append(0)
        commit()

    monkeypatch.setattr(paused._producer, "commit_transaction", commit_late)
    with pytest.raises(StreamError, match="another redrive of this topic began"):
        paused.run(lambda _: True)
    paused.close()
    assert by_successor == [0, 3, 0]
    with closing(Redriver(kafka_config, kafka_config.feedback_topic)) as last:
        assert last.run(lambda _: True) == 0
    with closing(_source(kafka_config)) as source:
        records = _read(source, 5, timeout_s=60.0) + _read(source, 1, timeout_s=1.0)
    assert sorted(r.value or b"" for r in records) == [b"bytes %d" % n for n in range(5)]


def test_what_is_refused_again_is_left_alone_after_some_attempts(kafka_config: KafkaConfig) -> None:
    refuse(kafka_config, 0)
    for attempt in (1, 2):
        assert json.loads(esrl_dlq(kafka_config, "redrive", "--max-attempts", "2", "--json"))["sent"][kafka_config.feedback_topic] == 1
        with closing(_source(kafka_config)) as source:
            record = _read(source, attempt, timeout_s=60.0)[-1]
        assert record.attempts == attempt
        with dead_letters(kafka_config) as letters:
            letters.send(record, WireError("still wrong", Refusal.UNDECLARED_BEHAVIOUR))
    assert json.loads(esrl_dlq(kafka_config, "redrive", "--max-attempts", "2", "--json"))["sent"][kafka_config.feedback_topic] == 0
    (row,) = json.loads(esrl_dlq(kafka_config, "list", "--json"))
    assert (row["letters"], row["redriven"], row["attempted"]) == (3, 2, 2)


def test_what_is_too_large_for_any_event_or_has_nothing_in_it_becomes_a_letter_that_stays(kafka_config: KafkaConfig) -> None:
    topic = kafka_config.feedback_topic
    with closing(connect(KafkaProducer, kafka_config, compression_type="zstd", max_request_size=2**25)) as producer:
        for value in (bytes(9_000_000), bytes(5_000_000), b"whole"):
            producer.send(topic, key=b"k", value=value, partition=0)
    with closing(_source(kafka_config)) as source:
        records = _read(source, 3, timeout_s=60.0)
    with dead_letters(kafka_config) as letters:
        for record in [*records, records[0]._replace(offset=3, key=None, value=None)]:
            letters.send(record, WireError("x", Refusal.MALFORMED))
    found = [(letter.offset, letter.key, len(letter.value or b""), letter.is_truncated) for letter in read_letters(kafka_config, topic)]
    assert sorted(found) == [(0, b"k", CUT_BYTES, True), (1, b"k", 5_000_000, False), (2, b"k", 5, False), (3, None, 0, False)]
    (row,) = json.loads(esrl_dlq(kafka_config, "list", "--json"))
    assert (row["letters"], row["redriven"], row["unfit"]) == (4, 0, 3)
    for left in (1, 0):
        assert json.loads(esrl_dlq(kafka_config, "redrive", "--dry-run", "--json"))["sent"][topic] == left
        assert json.loads(esrl_dlq(kafka_config, "redrive", "--json"))["sent"][topic] == left


def test_a_letter_of_a_topic_made_anew_is_another_one_and_rubbish_is_passed_over(kafka_config: KafkaConfig) -> None:
    topic = kafka_config.feedback_topic
    refuse(kafka_config, 0)
    with closing(Redriver(kafka_config, topic)) as redriver:
        assert redriver.run(lambda _: True) == 1
        with dead_letters(kafka_config) as letters:
            letters.send(Record(topic, 3, 0, 5_000, b"s", b"new", JSON), WireError("x", Refusal.MALFORMED))
            letters._waiting.append({"topic": topic + DEAD_LETTER_SUFFIX, "key": b"not a place", "value": b"", "headers": []})
            letters._waiting.append({"topic": topic + DEAD_LETTER_SUFFIX, "key": None, "value": b"", "headers": []})
        assert redriver.run(lambda _: True) == 1
    with pytest.raises(StreamError, match=r"there is no dead-letter topic.*elsewhere\.dlq"):
        list(read_letters(kafka_config, "elsewhere"))
