"""One measured run of `benchmarks/ingest.py`, in a process of its own: prints one JSON line.

`python -m benchmarks.ingest_runs NAME '{"servers": ..., ...}'` with NAME bare, ours or dicts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import psutil
import pyarrow as pa
from kafka import KafkaConsumer, TopicPartition

import streaming.worker
from benchmarks.ingest_dicts import DictJoin
from benchmarks.ingest_events import deployment
from esrl_ray.cli.parts import tune_process
from esrl_ray.config import KafkaConfig
from esrl_ray.replay.buffer import ReplayBuffer
from streaming.client import connect
from streaming.deadletter import DeadLetters
from streaming.records import Record
from streaming.sessions import SessionJoiner
from streaming.source import Source
from streaming.steplog import StepLog, read_commits
from streaming.wire import Decision, Feedback
from streaming.worker import IngestWorker

MARKS = (0.01, 0.03, *(tenth / 10 for tenth in range(1, 11)))
"""Shares of a run after which its cost and memory are noted."""


class Task(msgspec.Struct, frozen=True):
    """What to read."""

    kafka: dict[str, Any]
    num_features: int
    num_events: int
    decisions: str = "msgpack"
    feedback: str = "json"
    commit_interval_s: float = 2.0


class Meter:
    """CPU and wall time and memory as events pass by; everything before the first event does not count."""

    def __init__(self, num_events: int) -> None:
        self.total, self.events, self._process = num_events, 0, psutil.Process()
        self.marks: list[dict[str, float]] = []
        self._cpu = self._wall = 0.0

    def start(self) -> None:
        """Begin."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def count(self, num_events: int) -> None:
        """More events have been read."""
        self.events += num_events
        if len(self.marks) < len(MARKS) and self.events >= MARKS[len(self.marks)] * self.total:
            rss = self._process.memory_info().rss
            self.marks.append({"events": float(self.events), "cpu_s": time.process_time() - self._cpu, "rss_bytes": rss})

    def result(self, **more: object) -> dict[str, object]:
        """Everything, at the end."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {"events": self.events, "cpu_s": cpu, "wall_s": wall, "marks": self.marks, **more}


class Stages:
    """CPU time by stage; a stage inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = [0.0]  # seconds of the stages inside, one number per open stage

    def around(self, owner: Any, attribute: str, stage: str) -> None:
        """Time a function where it is looked up; called once per batch, so that the clock costs nothing."""
        call = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[stage] += spent - self._inside.pop()
                self._inside[-1] += spent

        setattr(owner, attribute, timed)


def consumer(kafka: KafkaConfig) -> Any:
    """Reads both topics from the start, set as `streaming.source` does."""
    made = connect(
        KafkaConsumer, kafka, enable_auto_commit=False, auto_offset_reset="none", isolation_level="read_committed",
        max_poll_records=4_000, fetch_max_wait_ms=100, metrics_enabled=False,
    )  # fmt: skip
    parts = [TopicPartition(topic, p) for topic in (kafka.decisions_topic, kafka.feedback_topic) for p in range(kafka.num_partitions)]
    made.assign(parts)
    for tp in parts:
        made.seek(tp, 0)
    return made


def bare(task: Task) -> dict[str, object]:
    """Poll and decode, typed, with msgspec; nothing is checked or kept."""
    kafka, codecs = KafkaConfig(**task.kafka), {"json": msgspec.json.Decoder, "msgpack": msgspec.msgpack.Decoder}
    decode = {
        kafka.decisions_topic: codecs[task.decisions](Decision).decode,
        kafka.feedback_topic: codecs[task.feedback](Feedback).decode,
    }
    reader, meter, poll_s = consumer(kafka), Meter(task.num_events), 0.0
    meter.start()
    while meter.events < task.num_events:
        start = time.process_time()
        batches = reader.poll(timeout_ms=100)
        poll_s += time.process_time() - start
        for tp, batch in batches.items():
            read = decode[tp.topic]
            for record in batch:
                read(record.value)
            meter.count(len(batch))
    reader.close(autocommit=False)
    return meter.result(stages={"poll": poll_s})


def dicts(task: Task) -> dict[str, object]:
    """The same loop with `json` and `DictJoin`; what it joins is dropped."""
    kafka = KafkaConfig(**task.kafka)
    joins = [DictJoin() for _ in range(kafka.num_partitions)]
    reader, meter, steps = consumer(kafka), Meter(task.num_events), 0
    meter.start()
    while meter.events < task.num_events:
        for tp, batch in reader.poll(timeout_ms=100).items():
            for record in batch:
                joins[tp.partition].push(tp.topic, json.loads(record.value))
            meter.count(len(batch))
        steps += sum(len(join.advance()) for join in joins)
    steps += sum(len(join.close()) for join in joins)
    reader.close(autocommit=False)
    return meter.result(steps=steps)


def ours(task: Task) -> dict[str, object]:
    """The ingest worker as it is deployed, with its step log on the local disk and a replay buffer in the same process."""
    kafka = KafkaConfig(**task.kafka)
    config = deployment(task.num_features, kafka)
    config = config.model_copy(update={"ingest": config.ingest.model_copy(update={"commit_interval_s": task.commit_interval_s})})
    tune_process()
    partitions, meter, stages = range(kafka.num_partitions), Meter(task.num_events), Stages()

    class Metered(Source):
        def poll(self, timeout_ms: int) -> list[Record]:
            records = super().poll(timeout_ms)
            meter.count(len(records))
            return records

    stages.around(Metered, "poll", "poll")
    stages.around(IngestWorker, "_take", "decode")
    stages.around(SessionJoiner, "push", "join")
    stages.around(SessionJoiner, "advance", "join")
    stages.around(SessionJoiner, "close", "join")
    stages.around(SessionJoiner, "snapshot", "state")
    stages.around(streaming.worker, "rows_to_table", "rows to table")
    stages.around(StepLog, "commit", "commit")
    stages.around(ReplayBuffer, "apply", "insert")
    with tempfile.TemporaryDirectory() as root:
        log = StepLog(root, "ingest-0", "bench", config.spec.build())
        buffer = ReplayBuffer(config, seed=0, read_log=lambda worker, after: read_commits(root, worker, after))

        def publish(worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
            buffer.apply(worker, commit, rows, inserted_ms=committed_ms)

        def source(positions: Mapping[str, int]) -> Source:
            return Metered(kafka, list(partitions), positions, max_poll_records=config.ingest.max_poll_records)

        worker = IngestWorker(
            config, "ingest-0", partitions, log=log, source_factory=source, dead_letters=DeadLetters(kafka), publish=[publish],
            clock_ms=lambda: time.time_ns() // 1_000_000,
        )  # fmt: skip
        meter.start()
        while meter.events < task.num_events:
            worker.run_once()
        worker.drain({}, 0.0)  # nothing is left: close and commit
        result = meter.result(stages=stages.seconds)
        status = worker.status()
    ledger: dict[str, dict[str, int]] = status["ledger"]
    return {**result, "steps": buffer.num_inserted, "commits": status["commit"] + 1, "ledger": ledger}


RUNS: dict[str, Callable[[Task], dict[str, object]]] = {"bare": bare, "ours": ours, "dicts": dicts}


def main(arguments: Sequence[str]) -> None:
    """Print what one run measured."""
    print(json.dumps(RUNS[arguments[0]](msgspec.json.decode(arguments[1], type=Task))))


if __name__ == "__main__":
    main(sys.argv[1:])
