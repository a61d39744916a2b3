"""The ingest worker on a real broker, a real step log and real dead letters, replaced in the middle of its work."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
from kafka import KafkaProducer

from esrl_ray.config import Config, IngestConfig, JoinConfig, KafkaConfig, SpecConfig
from streaming.broker import end_offsets
from streaming.client import connect
from streaming.deadletter import DeadLetters
from streaming.producer import EventProducer
from streaming.records import MAX_BATCH_BYTES
from streaming.redrive import read_letters
from streaming.source import Source
from streaming.steplog import StepLog, WorkerState, read_commits, read_steps
from streaming.worker import IngestWorker
from tests.unit.test_sessions import REWARD, T0, decision, feedback


def clock_ms() -> int:
    return time.time_ns() // 1_000_000


class DeathError(RuntimeError):
    """The process ends here."""


class DyingLog(StepLog):
    """Dies at its fourth commit, just before or just after it is durable."""

    dies: Literal["before", "after", "never"] = "never"
    num_commits = 0

    def commit(self, state: WorkerState, table: pa.Table) -> None:
        self.num_commits += 1
        if self.num_commits == 4 and self.dies == "before":
            raise DeathError
        super().commit(state, table)
        if self.num_commits == 4 and self.dies == "after":
            raise DeathError


class Run:
    """One deployment whose worker can be replaced; `published` is what a replay shard would have got."""

    def __init__(self, kafka: KafkaConfig, folder: Path) -> None:
        self.folder, self.published, self.num_workers = folder, list[tuple[str, int, pa.Table, int]](), 0
        self.config = Config(
            join=JoinConfig(label_age_s=1, lateness_s=1, gap_s=3, max_ahead_s=100_000_000),
            reward=REWARD,
            spec=SpecConfig(item_features=("age",)),
            kafka=kafka,
            ingest=IngestConfig(commit_interval_s=0.001, max_poll_records=50),
        )

    def worker(self, dies: Literal["before", "after", "never"] = "never") -> tuple[IngestWorker, Source, DeadLetters]:
        self.num_workers += 1
        partitions = range(self.config.kafka.num_partitions)
        sources: list[Source] = []

        def source(positions: object) -> Source:
            assert isinstance(positions, dict)
            sources.append(Source(self.config.kafka, partitions, positions, max_poll_records=self.config.ingest.max_poll_records))
            return sources[0]

        dead_letters = DeadLetters(self.config.kafka)
        log = DyingLog(self.folder, "ingest-0", f"incarnation-{self.num_workers}", self.config.spec.build())
        log.dies = dies
        worker = IngestWorker(
            self.config,
            "ingest-0",
            partitions,
            log=log,
            source_factory=source,
            dead_letters=dead_letters,
            publish=[lambda *commit: self.published.append(commit)],
            clock_ms=clock_ms,
        )
        return worker, sources[0], dead_letters


def produce(kafka: KafkaConfig, *, sessions: int, lists: int) -> Counter[str]:
    """Sessions of `lists` lists, each shown twice (a duplicate) with one click; then one bad record in each topic. Returns the records."""
    start_s = (clock_ms() - T0) / 1000 - 2 * lists
    producer = EventProducer(kafka, client_id="test", spool=None)
    for i in range(lists):
        for s in range(sessions):
            name, session, at = f"d{s}-{i}", f"s{s}", start_s + i + s / 1000
            producer.send(decision(name, at, session=session).event)
            for _ in range(2):
                producer.send(feedback(name, "shown", at + 0.1, session=session))
            producer.send(feedback(name, "click", at + 0.2, item="i0", session=session))
            if i == lists - 1:
                producer.send(feedback(name, "leave", at + 0.3, session=session))
    assert producer.flush(30)
    producer.close()
    raw = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    for topic in (kafka.decisions_topic, kafka.feedback_topic):
        raw.send(topic, b"not an event", key=b"s0")
    raw.flush()
    raw.close()
    ends: Counter[str] = Counter()
    for (topic, _), end in end_offsets(kafka).items():
        ends[topic] += end
    return ends


def test_workers_that_follow_each_other_log_each_step_once_and_the_ledger_closes(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    run = Run(kafka_config, tmp_path)
    sessions, lists = 40, 10
    produced = produce(kafka_config, sessions=sessions, lists=lists)
    deaths: list[Literal["before", "after"]] = ["before", "after", "before", "after"]
    for dies in deaths:
        worker, source, dead_letters = run.worker(dies)
        with pytest.raises(DeathError):
            for _ in range(1_000):
                worker.run_once()
        source.close()
        dead_letters.close()
    worker, source, dead_letters = run.worker()
    ends = {f"{topic}/{p}": end for (topic, p), end in end_offsets(kafka_config).items()}
    assert worker.drain(ends, 30.0)
    status = worker.status()
    source.close()
    dead_letters.close()

    ledger = {topic: {bucket: n for bucket, n in buckets.items() if n} for topic, buckets in status["ledger"].items()}
    steps = sessions * lists
    assert ledger == {
        "decisions": {"joined": steps, "dead_letter": 1},
        "feedback": {"joined": 2 * steps + sessions, "duplicate": steps, "dead_letter": 1},
    }
    assert {t: sum(b.values()) for t, b in ledger.items()} == {
        "decisions": produced[kafka_config.decisions_topic],
        "feedback": produced[kafka_config.feedback_topic],
    }
    assert status["positions"] == ends and status["steps_closed"] == steps
    logged = read_steps(tmp_path)
    assert sorted(logged["step_id"].to_pylist()) == sorted(f"d{s}-{i}" for s in range(sessions) for i in range(lists))
    assert Counter(logged["ended"].to_pylist()) == {"has_next": steps - sessions, "terminated": sessions}
    assert all(next_id == f"{step.split('-')[0]}-{int(step.split('-')[1]) + 1}" for step, next_id in links(logged) if next_id)
    by_number = dict(read_commits(tmp_path, "ingest-0"))
    unpublished = 2  # of the two that died between the commit and the publication
    assert len(run.published) == len(by_number) - unpublished
    assert [n for _, n, _, _ in run.published] == sorted({n for _, n, _, _ in run.published})
    assert all(table.equals(by_number[n]) for _, n, table, _ in run.published)


def test_a_batch_that_unpacks_to_more_than_we_take_is_a_dead_letter_for_each_record_and_holds_nobody_up(
    kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    run = Run(kafka_config, tmp_path)
    produce(kafka_config, sessions=4, lists=2)
    half = bytes(MAX_BATCH_BYTES // 2)
    with closing(
        connect(KafkaProducer, kafka_config, compression_type="zstd", batch_size=2**28, linger_ms=60_000, max_request_size=2**28)
    ) as hostile:
        sent = [hostile.send(kafka_config.feedback_topic, half, key=b"s0", partition=2) for _ in range(2)]
        hostile.flush()
        offsets = [future.get(timeout=30).offset for future in sent]
    produced = produce(kafka_config, sessions=4, lists=2)  # the same events again, behind it
    worker, source, dead_letters = run.worker()
    assert worker.drain({f"{topic}/{p}": end for (topic, p), end in end_offsets(kafka_config).items()}, 60.0)
    status = worker.status()
    source.close()
    dead_letters.close()
    assert status["refusals"]["feedback"] == {"too-large": 2, "malformed": 2}
    assert sum(status["ledger"]["feedback"].values()) == produced[kafka_config.feedback_topic]
    letters = [letter for letter in read_letters(kafka_config, kafka_config.feedback_topic) if letter.code == "too-large"]
    assert [(letter.partition, letter.offset, letter.value) for letter in letters] == [(2, offset, None) for offset in offsets]
    assert f"the batch {kafka_config.feedback_topic}[2]@{offsets[0]}-{offsets[1]} has" in letters[0].error and not letters[0].can_be_sent


def links(steps: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(steps["step_id"].to_pylist(), steps["next_id"].to_pylist(), strict=True))
