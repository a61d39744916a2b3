"""The run without faults: the same worker over the same records, in memory, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from kafka import KafkaConsumer, TopicPartition

from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config, KafkaConfig
from esrl_ray.errors import BrokerError, WireError
from streaming.client import connect
from streaming.records import Record
from streaming.steplog import WorkerState
from streaming.steptable import merge_steps, step_schema
from streaming.wire import JSON, Event
from streaming.worker import IngestWorker

POLL_RECORDS = 500

Ends = Mapping[tuple[str, int], int]
"""(topic, partition) -> end offset."""


def read_topics(config: KafkaConfig, ends: Ends, *, timeout_s: float = 120.0) -> dict[tuple[str, int], list[Record]]:
    """Every record of the topics up to the given offsets.

    Raises:
        BrokerError: they did not come in time.
    """
    consumer = connect(
        KafkaConsumer,
        config,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        metrics_enabled=False,
    )
    records: dict[tuple[str, int], list[Record]] = {where: [] for where in ends}
    try:
        partitions = [TopicPartition(topic, p) for topic, p in ends]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        deadline = time.monotonic() + timeout_s
        while any(len(records[where]) < end for where, end in ends.items()):
            for tp, batch in consumer.poll(timeout_ms=200).items():
                records[tp.topic, tp.partition] += [_record(raw) for raw in batch]
            if time.monotonic() > deadline:
                raise BrokerError(
                    f"only {sum(map(len, records.values()))} of {sum(ends.values())} records came", str(config.bootstrap_servers)
                )
    finally:
        consumer.close(autocommit=False)
    return records


def _record(raw: Any) -> Record:
    content_type = dict(raw.headers).get("content-type", JSON)
    return Record(raw.topic, raw.partition, raw.offset, raw.timestamp, raw.key, raw.value, content_type)


class _Replayed:
    """A record source over lists, which gives nothing beyond `limits`."""

    def __init__(self, records: Mapping[tuple[str, int], Sequence[Record]], *, max_poll_records: int) -> None:
        self._records, self._max = records, max_poll_records
        self._at = dict.fromkeys(records, 0)
        self.limits: Ends = dict.fromkeys(records, 0)

    def poll(self, timeout_ms: int) -> list[Record]:
        taken: list[Record] = []
        for where, records in self._records.items():
            batch = records[self._at[where] : min(self.limits[where], self._at[where] + self._max - len(taken))]
            self._at[where] += len(batch)
            taken += batch
        return taken

    reads_again, topic_ids = False, dict[str, str]()

    def take_skipped(self) -> dict[tuple[str, int], int]:
        return {}

    def read_again(self, starts: Mapping[str, int]) -> None:
        assert not starts, "it never dies"

    def positions(self) -> dict[str, int]:
        return {f"{topic}/{p}": at for (topic, p), at in self._at.items()}

    def hold(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Memory is no concern here, and the limits say what comes."""

    def at_end(self, topic: str, partition: int) -> bool:
        return self._at[topic, partition] >= len(self._records[topic, partition])

    def lag(self) -> dict[tuple[str, int], int]:
        return {where: self.limits[where] - at for where, at in self._at.items()}


class _Memory:
    """Step log and dead letters that last as long as the run."""

    incarnation = "fault-free"
    base: int | None = 0  # nobody goes on from these states

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.refused: set[tuple[str, int, int]] = set()

    def restore(self) -> WorkerState | None:
        return None

    def commit(self, state: WorkerState, table: pa.Table) -> None:
        self.tables.append(table)

    def tidy(self, clock_ms: Callable[[], int], budget_ms: int) -> bool:
        return False

    def passed(self, num_records: int) -> None:
        return None

    def send(self, record: Record, error: WireError) -> None:
        self.refused.add((record.topic, record.partition, record.offset))

    def late(self, topic: str, late: Record | Event) -> None:
        return None

    def flush(self) -> None:
        return None


def fault_free(
    config: Config, records: Mapping[tuple[str, int], Sequence[Record]], barriers: Sequence[Ends]
) -> tuple[pa.Table, dict[str, Any], set[tuple[str, int, int]]]:
    """What a worker that never dies makes of these records.

    Args:
        config: Deployment.
        records: Of both topics.
        barriers: End offsets at the end of each phase; between two phases everything read is applied and committed.

    Returns:
        Merged steps, ledger, and (topic, partition, offset) of what was refused.
    """
    partitions = range(config.kafka.num_partitions)
    ingest = config.ingest.model_copy(update={"commit_interval_s": 0.05, "max_commit_mb": 1e6})
    memory, source = _Memory(), _Replayed(records, max_poll_records=POLL_RECORDS)
    worker = IngestWorker(
        config.model_copy(update={"ingest": ingest}),
        "fault-free",
        partitions,
        log=memory,
        source_factory=lambda positions: source,
        dead_letters=memory,
        publish=[],
        clock_ms=clock_ms,
    )
    for ends in [*barriers, {where: len(there) for where, there in records.items()}]:
        source.limits = {where: ends.get(where, 0) for where in records}
        while any(source.lag().values()):
            worker.run_once()
        time.sleep(2 * ingest.commit_interval_s)
        worker.run_once()  # its commit applies all that was read
    worker.drain({}, 0.0)
    rows = pa.concat_tables(memory.tables) if memory.tables else step_schema().empty_table()
    return merge_steps(rows), worker.status()["ledger"], memory.refused
