"""What the ingest worker needs of the parts around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import pyarrow as pa

from esrl_ray.errors import WireError
from streaming.records import Record
from streaming.steplog import WorkerState
from streaming.wire import Event

Publish = Callable[[str, int, pa.Table, int], object]
"""(worker, commit, rows, committed_ms): what is called after each commit."""


class RecordSource(Protocol):
    """What the worker needs of `streaming.source.Source`."""

    def poll(self, timeout_ms: int) -> list[Record]:
        """Records in partition order."""

    def positions(self) -> dict[str, int]:
        """`topic/partition` -> next offset."""

    def read_again(self, starts: Mapping[str, int]) -> None:
        """Before the first poll: `topic/partition` -> offset from which on records below the positions are to come again, first."""

    @property
    def reads_again(self) -> bool:
        """They are still coming."""

    @property
    def topic_ids(self) -> dict[str, str]:
        """Topic -> id that changes when it is made anew, as far as known."""

    def take_skipped(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> offsets passed over since the last call."""

    def hold(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Return no records of these (topic, partition), until the next call."""

    def at_end(self, topic: str, partition: int) -> bool:
        """Everything in the partition was returned by `poll`."""

    def lag(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> records that wait."""


class Log(Protocol):
    """What the worker needs of `streaming.steplog.StepLog`."""

    @property
    def incarnation(self) -> str:
        """Unique for this process."""

    @property
    def base(self) -> int | None:
        """Commit that the next state may build on; None: it must be whole."""

    def restore(self) -> WorkerState | None:
        """State of the last commit."""

    def commit(self, state: WorkerState, table: pa.Table) -> None:
        """Make rows and state durable as one."""

    def tidy(self, clock_ms: Callable[[], int], budget_ms: int) -> bool:
        """Care for the table when it is time."""


class RefusedRecords(Protocol):
    """What the worker needs of `streaming.deadletter.DeadLetters`."""

    def passed(self, num_records: int) -> None:
        """Count records that were fine."""

    def send(self, record: Record, error: WireError) -> None:
        """Take one refused record."""

    def late(self, topic: str, late: Record | Event) -> None:
        """Take one event that was counted late; without its record when that is gone."""

    def flush(self) -> None:
        """Wait until all of them are acknowledged."""
