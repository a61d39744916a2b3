"""The step log: one Delta Lake table per ingest worker, where the truth lives.

Delivery: commit n holds the rows of n and, as Delta's application transaction, the number n itself; the state file n (positions, open
sessions, de-duplication) is written and fsynced before it. So after any crash the table says which n is committed, and state n says
where to go on. A state file without its commit is an orphan: ignored, and swept later. Its name carries the incarnation, so that a fenced
worker that wakes up between two steps of its commit cannot overwrite the state of the one that replaced it.

What Delta (deltalake 1.6.6) does and does not do: appending by path accepts an application version twice, so one held handle is used
and `transaction_version == n` is checked before n+1; a held handle whose application id has advanced is refused by Delta itself
(`CommitFailedError: Concurrent transaction failed`), which is what fences two workers that pass the check together. Custom metadata can
vanish when the log is cleaned, the transaction version does not. `restore` brings the rows of a version back, but not its transaction
version.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from esrl_ray.errors import Fenced, LogError
from esrl_ray.spec import Spec
from streaming.steptable import check_widths, merge_steps, rows_to_table, step_schema

__all__ = [
    "CommitInfo",
    "StepLog",
    "WorkerState",
    "commit_history",
    "list_workers",
    "read_commits",
    "read_steps",
    "rows_to_table",
    "step_schema",
]

STATE_FOLDER = "_state"
KEPT_STATES = 3
CHECKPOINT_EVERY = 100
INCARNATION, COMMITTED_MS, COMMIT = "esrl.incarnation", "esrl.committed_ms", "esrl.commit"


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to go on after commit n."""

    commit: int
    incarnation: str
    positions: dict[str, int]  # "topic/partition" -> next offset
    joiners: dict[int, bytes]  # partition -> SessionJoiner.snapshot()
    committed_ms: int


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """One commit as the table remembers it."""

    worker: str
    commit: int
    rows: int
    committed_ms: int
    incarnation: str
    positions: dict[str, int] | None  # of the newest commits only: older state files are swept


class StepLog:
    """One worker's table and its state files. Own it from one process; a second owner is fenced at its next commit.

    Args:
        root: Folder of all workers' tables of one spec.
        worker: Name of the worker, the application id of the transactions.
        incarnation: Unique for this process.
        spec: Widths that rows are checked against.

    Raises:
        LogError: the table cannot be opened.
    """

    def __init__(self, root: str | Path, worker: str, incarnation: str, spec: Spec) -> None:
        self._folder = Path(root) / worker
        self._worker, self._incarnation, self._spec = worker, incarnation, spec
        (self._folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        try:
            if not DeltaTable.is_deltatable(str(self._folder)):
                DeltaTable.create(str(self._folder), schema=step_schema())
            self._table = DeltaTable(str(self._folder))
        except DeltaError as error:
            raise LogError(f"cannot open the step log: {error}", str(self._folder)) from error

    @property
    def incarnation(self) -> str:
        """Of this process."""
        return self._incarnation

    @property
    def committed(self) -> int:
        """Number of the last commit; -1 before the first."""
        return _committed(self._table, self._worker)

    def restore(self) -> WorkerState | None:
        """State of the last commit, or None before the first.

        A damaged state file n voids commit n: the table goes back to the rows of n-1, and state n-1 stands in as state n, since the
        number n is spent. The events of n are read again.

        Raises:
            LogError: neither state n nor state n-1 can be read.
        """
        n = self.committed
        if n < 0:
            return None
        try:
            return self._read_state(n)
        except LogError as damage:
            made = _made(self._table)
            if n - 1 not in made:
                fix = "start with an empty log"
                raise LogError(f"{damage.what}, and there is no commit {n - 1} to go back to", damage.where, fix) from damage
            state = msgspec.structs.replace(self._read_state(n - 1), commit=n, incarnation=self._incarnation)
            self._write_state(state)
            metadata = {INCARNATION: self._incarnation, COMMIT: str(n), COMMITTED_MS: str(state.committed_ms)}
            self._table.restore(int(made[n - 1]["version"]), commit_properties=CommitProperties(custom_metadata=metadata))
            self._table = DeltaTable(str(self._folder))
            return state

    def commit(self, state: WorkerState, table: pa.Table) -> None:
        """Make rows and state durable as one commit.

        Args:
            state: After these rows; `state.commit` must be the next number.
            table: Rows of `step_schema()`; may be empty.

        Raises:
            Fenced: another incarnation has committed to this table.
            LogError: rows of a wrong width, a wrong number, or the commit failed and did not happen.
        """
        n = state.commit
        check_widths(table, self._spec)
        self._table.update_incremental()
        if (last := self.committed) != n - 1:
            raise Fenced(
                f"commit {n} of {self._worker} follows commit {last}", str(self._folder), "another worker of this name is running: stop one"
            )
        self._write_state(state)
        rows = table.set_column(0, "commit", pa.array(np.full(len(table), n, np.int64)))
        properties = CommitProperties(
            app_transactions=[Transaction(self._worker, n)],
            custom_metadata={INCARNATION: self._incarnation, COMMITTED_MS: str(state.committed_ms), COMMIT: str(n)},
        )
        try:
            write_deltalake(self._table, rows, mode="append", commit_properties=properties)
        except (CommitFailedError, DeltaError, OSError) as error:
            self._settle(n, error)
        self._sweep(n)
        if n % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            self._table.create_checkpoint()

    def _settle(self, n: int, error: Exception) -> None:
        """After a failed commit: it is done, somebody else did it, or it did not happen."""
        self._table = DeltaTable(str(self._folder))
        if self.committed < n:
            raise LogError(f"commit {n} failed: {error}", str(self._folder)) from error
        if (owner := _made(self._table).get(n, {}).get(INCARNATION)) != self._incarnation:
            fix = "another worker of this name is running: stop one"
            raise Fenced(f"commit {n} was made by another incarnation {owner}", str(self._folder), fix) from error

    def _write_state(self, state: WorkerState) -> None:
        content = msgspec.msgpack.encode(state)
        path = _state_path(self._folder, state.commit, self._incarnation)
        temporary = path.with_suffix(".writing")
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_state(self, n: int) -> WorkerState:
        """State n of the incarnation that committed n; once the table has forgotten which that was, the only one there is."""
        owner = _made(self._table).get(n, {}).get(INCARNATION)
        paths = (
            sorted((self._folder / STATE_FOLDER).glob(f"{n:012d}.*.msgpack")) if owner is None else [_state_path(self._folder, n, owner)]
        )
        if len(paths) != 1:
            raise LogError(f"{len(paths)} state files for commit {n}, expected 1", str(self._folder / STATE_FOLDER))
        return _read_state(paths[0], n)

    def _sweep(self, n: int) -> None:
        """Remove state files that no restart can need: orphans of older commits go with them."""
        for path in (self._folder / STATE_FOLDER).iterdir():
            if int(path.name.split(".")[0]) <= n - KEPT_STATES:
                path.unlink(missing_ok=True)


def _state_path(folder: Path, n: int, incarnation: str) -> Path:
    return folder / STATE_FOLDER / f"{n:012d}.{incarnation}.msgpack"


def _read_state(path: Path, n: int) -> WorkerState:
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw[32:]).digest() != raw[:32]:
            raise LogError("the sha256 of the state file does not match its content", str(path))
        state = msgspec.msgpack.decode(raw[32:], type=WorkerState)
    except (OSError, msgspec.MsgspecError) as error:
        raise LogError(f"cannot read the state file: {error}", str(path)) from error
    if state.commit != n:
        raise LogError(f"the state file says commit {state.commit}, expected {n}", str(path))
    return state


def _committed(table: DeltaTable, worker: str) -> int:
    n = table.transaction_version(worker)
    return -1 if n is None else int(n)


def _made(table: DeltaTable) -> dict[int, dict[str, Any]]:
    """{commit: what the table's history says of it}; a commit that was voided later is told as it is now."""
    return {int(info[COMMIT]): info for info in sorted(table.history(), key=lambda i: int(i["version"])) if COMMIT in info}


def list_workers(root: str | Path) -> list[str]:
    """Names of the workers that have a table under `root`."""
    folder = Path(root)
    return sorted(p.name for p in folder.iterdir() if (p / "_delta_log").is_dir()) if folder.is_dir() else []


def _files(table: DeltaTable) -> list[tuple[int, int, str]]:
    """(smallest commit, largest commit, path) of each file that has rows, in order."""
    actions: Any = pa.table(table.get_add_actions(flatten=True))
    if not len(actions):
        return []
    columns = (actions["min.commit"].to_pylist(), actions["max.commit"].to_pylist(), actions["path"].to_pylist())
    return sorted(zip(*columns, strict=True))


def read_commits(root: str | Path, worker: str, after: int = -1) -> Iterator[tuple[int, pa.Table]]:
    """Commits of one worker in order, each with its rows; a commit without rows comes with an empty table.

    Args:
        root: Folder of all workers' tables.
        worker: Name.
        after: Only commits above this number.
    """
    folder = Path(root) / worker
    try:
        table = DeltaTable(str(folder))
    except TableNotFoundError:
        return
    last, expected = _committed(table, worker), after + 1
    for low, high, path in _files(table):
        if high <= after:
            continue
        rows = pq.read_table(folder / path, schema=step_schema())
        for n in range(low, high + 1):
            mine = rows if low == high else rows.filter(pc.equal(rows["commit"], n))
            if n <= after or not len(mine):
                continue
            for empty in range(expected, n):
                yield empty, step_schema().empty_table()
            yield n, mine
            expected = n + 1
    for empty in range(expected, last + 1):
        yield empty, step_schema().empty_table()


def read_steps(root: str | Path, *, as_of: Mapping[str, int] | None = None) -> pa.Table:
    """Every step once: merged over revisions, all workers, in order of event time.

    Args:
        root: Folder of all workers' tables.
        as_of: {worker: commit} to read up to; default everything.
    """
    tables = []
    for worker in list_workers(root):
        last = None if as_of is None else as_of.get(worker, -1)
        tables += [rows for n, rows in read_commits(root, worker) if (last is None or n <= last) and len(rows)]
    return merge_steps(pa.concat_tables(tables)) if tables else step_schema().empty_table()


def commit_history(root: str | Path, worker: str) -> list[CommitInfo]:
    """Commits of one worker, oldest first, as far as the table's own history goes back."""
    folder = Path(root) / worker
    infos = []
    for n, info in sorted(_made(DeltaTable(str(folder))).items()):
        path = _state_path(folder, n, str(info[INCARNATION]))
        positions = _read_state(path, n).positions if path.exists() else None
        rows = int(info.get("operationMetrics", {}).get("num_added_rows", 0))
        infos.append(CommitInfo(worker, n, rows, int(info[COMMITTED_MS]), str(info[INCARNATION]), positions))
    return infos
