"""Which worker owns which partition. Partitions are dealt at every start; the state of one that gets another owner moves to its table.

Ownership is unambiguous after any crash: each state says for each of its partitions how often it has moved (its epoch), and whether it is
given away, and to whom. The highest epoch is the newest state. A move is two commits: one in the table of the owner before, which gives
the partition away and fences a worker that still runs there; one in the table of the new owner, an epoch higher. Between the two the state
stands in the first table, and whoever deals next brings the move to its end before anything else. Each commit is made by its number, so of
two that deal at the same time one is fenced.

A step's later rows may so stand in another table than its first row. Readers merge by step id over all tables. A replay shard holds some
partitions, whoever writes them; it must have read the tables to their ends before a new owner commits, because the owner before may have
died between a commit and telling of it. One that refills orders commits by the clocks of the workers: they must agree to the seconds that
a start takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from esrl_ray.config import Config
from esrl_ray.errors import LogError, StreamError
from esrl_ray.spec import Spec
from streaming.statefiles import WorkerState
from streaming.steplog import StepLog, list_workers, read_commits, rows_to_table

LIVE = "ingest-"
"""How names of workers begin that own partitions; other tables are of `esrl log import`."""
ANYONE = ""
"""Whom a drained partition is given to: whoever is dealt it."""


def live_workers(root: str | Path) -> list[str]:
    """Names of the workers that own partitions, or have owned some."""
    return [worker for worker in list_workers(root) if worker.startswith(LIVE)]


def owners_of(config: Config) -> dict[int, str]:
    """Partition -> name of the worker that owns it: partition p belongs to worker p % num_workers."""
    return {p: f"{LIVE}{p % config.ingest.num_workers}" for p in range(config.kafka.num_partitions)}


def rows_of_shard(rows: pa.Table, shard: int, num_shards: int) -> pa.Table:
    """The rows of a shard's partitions, those p with p % num_shards == shard: so a session stays in its shard, whoever joins it."""
    return rows if num_shards == 1 else rows.filter(pa.array(rows["partition"].to_numpy() % num_shards == shard))


def commits_of_shard(root: str | Path, shard: int, num_shards: int, worker: str, after: int) -> Iterator[tuple[int, pa.Table]]:
    """As `read_commits`, with the rows of a shard."""
    for commit, rows in read_commits(root, worker, after):
        yield commit, rows_of_shard(rows, shard, num_shards)


def check_held(state: WorkerState, worker: str, partitions: Sequence[int]) -> None:
    """Refuse a worker that does not own what it is given, or owns more.

    Raises:
        StreamError: names both.
    """
    if left := state.given.keys() & set(partitions) or state.held.keys() - set(partitions):
        raise StreamError(
            f"the step log of {worker} holds partitions {sorted(state.held)}, this worker is given {sorted(partitions)}: "
            f"{sorted(left)} would be lost",
            "ingest.num_workers, kafka.num_partitions",
            "start `esrl ingest` again, which deals all partitions; kafka.num_partitions cannot become smaller",
        )


def deal_partitions(root: str | Path, spec: Spec, owners: Mapping[int, str], *, incarnation: str, committed_ms: int) -> dict[int, str]:
    """Give each partition to its owner; no worker of these tables may run any more, one that does is fenced.

    Args:
        root: Folder of all workers' tables.
        spec: Of the tables.
        owners: Partition -> name of the worker that is to own it.
        incarnation: Unique for this call.
        committed_ms: Clock.

    Returns:
        Partition -> worker that it was taken from, of those that have moved.

    Raises:
        Fenced: a worker, or another start, committed meanwhile: start again.
        LogError: a state cannot be read, or two tables claim a partition.
    """
    tables = _Tables(root, spec, incarnation, committed_ms)
    tables.drop_what_was_taken()
    tables.take_what_was_given()
    moves = {p: holder for p, (holder, heir) in tables.holders().items() if p in owners and (heir is not None or holder != owners[p])}
    tables.give({p: owners[p] for p in moves})
    tables.take_what_was_given()
    tables.give_up_what_moved()
    return {p: holder for p, holder in moves.items() if holder != owners[p]}


class _Tables:
    """All tables with their newest states."""

    def __init__(self, root: str | Path, spec: Spec, incarnation: str, committed_ms: int) -> None:
        self._root, self._spec, self._incarnation, self._committed_ms = root, spec, incarnation, committed_ms
        self._logs: dict[str, StepLog] = {}
        self._states: dict[str, WorkerState] = {}
        for worker in live_workers(root):
            self._open(worker)

    def holders(self) -> dict[int, tuple[str, str | None]]:
        """Partition -> table with its newest state, and whom that is given to.

        Raises:
            LogError: two tables claim one.
        """
        found: dict[int, tuple[int, str]] = {}
        for worker, state in self._states.items():
            for p in state.joiners:
                mine = state.epochs.get(p, 0), worker
                if p in found and found[p][0] == mine[0]:
                    raise LogError(f"partition {p} is claimed by {found[p][1]} and {worker}", str(self._root), _TWO_SETS)
                found[p] = max(found.get(p, mine), mine)
        return {p: (worker, self._states[worker].given.get(p)) for p, (_, worker) in found.items()}

    def give(self, heirs: Mapping[int, str]) -> None:
        """Give partitions away."""
        by_holder: dict[str, dict[int, str]] = defaultdict(dict)
        holders = self.holders()
        for p, heir in heirs.items():
            by_holder[holders[p][0]][p] = heir
        for holder, given in by_holder.items():
            self._commit(holder, self._states[holder], given=self._states[holder].given | given)

    def take_what_was_given(self) -> None:
        """Bring moves to their end."""
        by_heir: dict[str, dict[int, str]] = defaultdict(dict)
        for p, (holder, heir) in self.holders().items():
            if heir:
                by_heir[heir][p] = holder
        for heir, taken in by_heir.items():
            self._open(heir)
            before = [self._states[holder] for holder in taken.values()]
            state = self._states.get(heir) or msgspec.structs.replace(before[0], commit=-1, positions={}, joiners={}, epochs={}, given={})
            positions = {where: n for p, s in zip(taken, before, strict=True) for where, n in s.positions.items() if _partition(where) == p}
            self._commit(
                heir,
                state,
                positions=state.positions | positions,
                joiners=state.joiners | {p: s.joiners[p] for p, s in zip(taken, before, strict=True)},
                epochs=state.epochs | {p: s.epochs.get(p, 0) + 1 for p, s in zip(taken, before, strict=True)},
                given={p: to for p, to in state.given.items() if p not in taken},
                topic_ids={topic: name for s in (*before, state) for topic, name in s.topic_ids.items()},
            )

    def drop_what_was_taken(self) -> None:
        """States that have stood in another table since the last start are needed no longer; they name users."""
        holders = self.holders()
        for worker, state in list(self._states.items()):
            if taken := {p for p, heir in state.given.items() if heir and holders[p][0] != worker}:
                joiners = {p: chain for p, chain in state.joiners.items() if p not in taken}
                epochs = {p: epoch for p, epoch in state.epochs.items() if p in joiners}
                given = {p: heir for p, heir in state.given.items() if p in joiners}
                self._commit(worker, state, joiners=joiners, epochs=epochs, given=given)

    def give_up_what_moved(self) -> None:
        """A table that went back to an older commit may hold what it has given away since."""
        holders = self.holders()
        for worker, state in list(self._states.items()):
            if stale := {p: holders[p][0] for p in state.held if holders[p][0] != worker}:
                self._commit(worker, state, given=state.given | stale)

    def _open(self, worker: str) -> None:
        if worker not in self._logs:
            self._logs[worker] = StepLog(self._root, worker, self._incarnation, self._spec)
            if (state := self._logs[worker].restore()) is not None:
                self._states[worker] = state

    def _commit(self, worker: str, state: WorkerState, **changes: Any) -> None:
        named = {"commit": state.commit + 1, "incarnation": self._incarnation, "committed_ms": self._committed_ms}
        self._states[worker] = msgspec.structs.replace(state, **named, **changes)
        self._logs[worker].commit(self._states[worker], rows_to_table([]))


_TWO_SETS = "two sets of workers have run at the same time; keep the tables of one set, and start again"


def _partition(where: str) -> int:
    return int(where.rpartition("/")[2])
