"""The step log: one Delta Lake table per ingest worker, where the truth lives.

Delivery: commit n holds the rows of n and, as Delta's application transaction, the number n itself; the state file n (positions, open
sessions, de-duplication) is written before it. So after any crash the table says which n is committed, and state n says where to go on.
A state file without its commit is an orphan: ignored, and swept later.

What Delta (deltalake 1.6.6) does and does not do: appending by path accepts an application version twice, so one held handle is used
and `transaction_version == n` is checked before n+1; a held handle whose application id has advanced is refused by Delta itself
(`CommitFailedError: Concurrent transaction failed`), which is what fences two workers that pass the check together. Custom metadata can
vanish when the log is cleaned, the transaction version does not: nothing but messages and `commit_history` depends on old metadata.
`restore` brings the rows of a version back, but not its transaction version. Statistics are kept of `commit` only, the first column, and
no dictionaries are written: with Delta's defaults the 120th commit takes nearly twice the processor time, and files are 1.7 times as large.
"""

from __future__ import annotations

import fcntl
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction
from pyarrow import dataset, fs

from esrl_ray.errors import Fenced, LogError
from esrl_ray.reward import digest_of
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Bools
from streaming.statefiles import StateFiles, WorkerState, open_store, sign_of_life
from streaming.steptable import check_widths, merge_steps, rows_to_table, step_schema

__all__ = [
    "NEWEST",
    "CommitInfo",
    "StepLog",
    "WorkerState",
    "commit_history",
    "list_workers",
    "read_commits",
    "read_newest",
    "read_steps",
    "rows_to_table",
    "step_schema",
]

_logger = logging.getLogger(__name__)

STATE_FOLDER = "_state"
CHECKPOINT_EVERY = 100
FILES_AT_ONCE = 16  # of `read_newest`: a file is one commit, some tens to thousands of rows
NEWEST = 20  # entries of the table's history that a restart looks at
INCARNATION, COMMITTED_MS, COMMIT, POSITIONS = "esrl.incarnation", "esrl.committed_ms", "esrl.commit", "esrl.positions"
REWARD = "esrl.reward"
_STOP_ONE = "another worker of this name is running: stop one"
_TABLE_PROPERTIES = {"delta.dataSkippingNumIndexedCols": "1"}
_FILE_PROPERTIES = WriterProperties(
    compression="ZSTD", compression_level=1, default_column_properties=ColumnProperties(dictionary_enabled=False)
)


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """One commit as the table remembers it."""

    worker: str
    commit: int
    rows: int
    committed_ms: int
    incarnation: str
    positions: dict[str, int]  # "topic/partition" -> next offset
    reward: str | None = None  # digest of the reward section that the table's rewards were made by, as of this commit


class StepLog:
    """One worker's table and its state files. Own it from one process; a second owner is fenced at its next commit.

    Args:
        root: Folder of all workers' tables of one spec: a local path, or a URI that Delta and Arrow both know.
        worker: Name of the worker, the application id of the transactions.
        incarnation: Unique for this process.
        spec: Widths that rows are checked against.

    Raises:
        LogError: the table cannot be opened.
    """

    def __init__(self, root: str | Path, worker: str, incarnation: str, spec: Spec) -> None:
        self._where = _table_place(root, worker)
        self._worker, self._incarnation, self._spec = worker, incarnation, spec
        try:
            self._states = StateFiles(f"{self._where}/{STATE_FOLDER}")
            if not DeltaTable.is_deltatable(self._where):
                DeltaTable.create(self._where, schema=step_schema(), mode="ignore", configuration=_TABLE_PROPERTIES)
            self._table = DeltaTable(self._where)
            self._alive = sign_of_life(self._where)
        except (DeltaError, OSError) as error:
            raise LogError(f"cannot open the step log: {error}", self._where) from error
        if self._alive is not None:
            weakref.finalize(self, os.close, self._alive)

    @property
    def place(self) -> tuple[str, str]:
        """Folder of all workers' tables, and this one's name."""
        return self._where.rpartition("/")[0], self._worker

    @property
    def incarnation(self) -> str:
        """Of this process."""
        return self._incarnation

    @property
    def committed(self) -> int:
        """Number of the last commit; -1 before the first."""
        return _committed(self._table, self._worker)

    @property
    def base(self) -> int | None:
        """Commit that the next state may build on; None: it must be whole."""
        return self._states.base

    def restore(self) -> WorkerState | None:
        """State of the last commit, or None before the first.

        When state n cannot be read, because its file is damaged or one that it builds on, the table goes back to the rows of the newest
        commit m whose state can be read; that state stands in as state n, since the numbers up to n are spent. Commits m+1 to n are void,
        and their events are read again.

        Raises:
            LogError: none of the states that are kept can be read.
        """
        n = self.committed
        if n < 0:
            return None
        try:
            return self._states.read(n, _made(self._table, NEWEST).get(n, {}).get(INCARNATION))
        except LogError as damage:
            return self._go_back(n, damage)

    def _go_back(self, n: int, damage: LogError) -> WorkerState:
        made = _made(self._table)
        for m in self._states.numbers():
            if m >= n or m not in made:
                continue
            try:
                before = self._states.read(m, made[m][INCARNATION])
            except LogError:
                continue
            _logger.warning("commits are void, their events are read again first=%d last=%d reason=%s", m + 1, n, damage)
            state = msgspec.structs.replace(before, commit=n, incarnation=self._incarnation)
            self._states.write(state, self._incarnation)
            self._table.restore(int(made[m]["version"]), commit_properties=CommitProperties(custom_metadata=self._metadata(state)))
            self._table = DeltaTable(self._where)
            return state
        raise LogError(
            f"{damage.what}, and there is no commit before {n} to go back to", damage.where, "start with an empty log"
        ) from damage

    def commit(self, state: WorkerState, table: pa.Table) -> None:
        """Make rows and state durable as one commit.

        Args:
            state: After these rows; `state.commit` must be the next number.
            table: Rows of `step_schema()`; may be empty.

        Raises:
            Fenced: another incarnation has committed to this table.
            LogError: rows of a wrong width.
            DeltaError, OSError: the store failed and nothing was committed, e.g. the disk is full; the same call may be made again.
        """
        n = state.commit
        check_widths(table, self._spec)
        rows = table.set_column(0, "commit", pa.array(np.full(len(table), n, np.int64)))
        with self._transaction(state) as properties:
            write_deltalake(self._table, rows, mode="append", commit_properties=properties, writer_properties=_FILE_PROPERTIES)
        try:
            self._states.sweep(n)
            if n % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
                self._table.create_checkpoint()
        except (DeltaError, OSError) as error:  # the commit stands, and the next one tidies up
            _logger.warning("step log not tidied commit=%d reason=%s", n, error)

    def rewrite(self, state: WorkerState, write_files: Callable[[], list[AddAction]]) -> None:
        """Put new files in the place of all rows, as one commit of its own: readers see all of it or nothing.

        Rows keep the numbers of the commits that made them; this one has none. Whoever goes on with the old ones is fenced by its number.

        Args:
            state: As for `commit`.
            write_files: Writes the files, in order of commits; called once nobody else owns the table.

        Raises:
            LogError: a worker of this log is running, which is known on a local disk only.
            Fenced: another incarnation has committed to this table.
        """
        if self._alive is not None:
            try:
                fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LogError(f"worker {self._worker} is running", self._where, "stop `esrl ingest` first") from error
        with self._transaction(state) as properties:
            self._table.create_write_transaction(write_files(), "overwrite", step_schema(), [], commit_properties=properties)

    @contextmanager
    def _transaction(self, state: WorkerState) -> Iterator[CommitProperties]:
        """State n, then whatever commits n with these properties."""
        n = state.commit
        self._table.update_incremental()
        if (last := self.committed) != n - 1:
            raise Fenced(f"commit {n} of {self._worker} follows commit {last}", self._where, _STOP_ONE)
        self._states.write(state, self._incarnation)
        try:
            yield CommitProperties(app_transactions=[Transaction(self._worker, n)], custom_metadata=self._metadata(state))
        except (DeltaError, OSError) as error:
            if not self._happened(n, error):
                raise

    def compact(self) -> int:
        """Merge small files into large ones, between two commits of this owner; the number of files that are left.

        Rows, commits and their order stay. Files that are no longer needed stay on disk for those who still read them.
        """
        self._table.optimize.compact(writer_properties=_FILE_PROPERTIES)
        self._table.create_checkpoint()
        return len(self._table.file_uris())

    def _happened(self, n: int, error: Exception) -> bool:
        """After a failed commit: it is done after all, or it did not happen, or another incarnation has made it."""
        self._table = DeltaTable(self._where)
        if self.committed < n:
            return False
        if (owner := _made(self._table, NEWEST).get(n, {}).get(INCARNATION)) != self._incarnation:
            raise Fenced(f"commit {n} was made by another incarnation {owner}", self._where, _STOP_ONE) from error
        return True

    def _metadata(self, state: WorkerState) -> dict[str, str]:
        positions = msgspec.json.encode(state.positions).decode()
        reward = {REWARD: digest_of(state.reward)} if state.reward else {}
        commit = {COMMIT: str(state.commit), COMMITTED_MS: str(state.committed_ms)}
        return {INCARNATION: self._incarnation, **commit, POSITIONS: positions, **reward}


def _table_place(root: str | Path, worker: str) -> str:
    return f"{str(root).rstrip('/')}/{worker}"


def _committed(table: DeltaTable, worker: str) -> int:
    n = table.transaction_version(worker)
    return -1 if n is None else int(n)


def _made(table: DeltaTable, newest: int | None = None) -> dict[int, dict[str, Any]]:
    """{commit: what the table's history says of it}; a commit that was voided later is told as it is now."""
    return {int(info[COMMIT]): info for info in sorted(table.history(newest), key=lambda i: int(i["version"])) if COMMIT in info}


def list_workers(root: str | Path) -> list[str]:
    """Names of the workers that have a table under `root`."""
    store, path = open_store(str(root))
    entries = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    folders = [str(entry.base_name) for entry in entries if entry.type == fs.FileType.Directory]
    return sorted(name for name in folders if store.get_file_info(f"{path}/{name}/_delta_log").type == fs.FileType.Directory)


def _files(table: DeltaTable) -> list[tuple[int, int, list[str]]]:
    """(smallest commit, largest commit, paths) in order; files whose commits overlap, as compaction may leave them, stand together."""
    actions: Any = pa.table(table.get_add_actions(flatten=True))
    if not len(actions):
        return []
    columns = (actions["min.commit"].to_pylist(), actions["max.commit"].to_pylist(), actions["path"].to_pylist())
    groups: list[tuple[int, int, list[str]]] = []
    for low, high, path in sorted(zip(*columns, strict=True)):
        if groups and low <= groups[-1][1]:
            first, last, paths = groups.pop()
            groups.append((first, max(last, high), [*paths, path]))
        else:
            groups.append((low, high, [path]))
    return groups


class _Reader:
    """A worker's table as it is now.

    Raises:
        TableNotFoundError: there is none.
    """

    def __init__(self, root: str | Path, worker: str) -> None:
        where = _table_place(root, worker)
        table = DeltaTable(where)
        self.last, self.files = _committed(table, worker), _files(table)
        self._store, self._path = open_store(where)

    def rows(self, paths: Sequence[str], *, after: int = -1, until: int | None = None) -> pa.Table:
        """Rows of the files, in order of commits."""
        if not paths:
            return step_schema().empty_table()
        full = [f"{self._path}/{path}" for path in paths]
        rows = dataset.dataset(full, schema=step_schema(), format="parquet", filesystem=self._store).to_table()
        commits = rows["commit"].to_numpy()
        wanted = (commits > after) & (commits <= (self.last if until is None else until))
        if not wanted.all():
            rows, commits = rows.filter(pa.array(wanted)), commits[wanted]
        return rows if (np.diff(commits) >= 0).all() else rows.take(pa.array(np.argsort(commits, kind="stable")))


def read_commits(root: str | Path, worker: str, after: int = -1) -> Iterator[tuple[int, pa.Table]]:
    """Commits of one worker in order, each with its rows; a commit without rows comes with an empty table.

    Args:
        root: Folder of all workers' tables.
        worker: Name.
        after: Only commits above this number.
    """
    try:
        reader = _Reader(root, worker)
    except TableNotFoundError:
        return
    empty, expected = step_schema().empty_table(), after + 1
    for _, high, paths in reader.files:
        if high <= after:
            continue
        rows = reader.rows(paths, after=after)
        numbers, starts = np.unique(rows["commit"].to_numpy(), return_index=True)
        for n, start, end in zip(numbers.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            yield from ((skipped, empty) for skipped in range(expected, n))
            yield n, rows.slice(start, end - start)
            expected = n + 1
    yield from ((skipped, empty) for skipped in range(expected, reader.last + 1))


def read_steps(root: str | Path, *, as_of: Mapping[str, int] | None = None) -> pa.Table:
    """Every step once: merged over revisions, all workers, in order of event time.

    Args:
        root: Folder of all workers' tables.
        as_of: {worker: commit} to read up to; default everything.
    """
    tables = []
    for worker in list_workers(root):
        reader = _Reader(root, worker)
        until = reader.last if as_of is None else as_of.get(worker, -1)
        tables.append(reader.rows([path for low, _, paths in reader.files if low <= until for path in paths], until=until))
    return merge_steps(pa.concat_tables(tables)) if tables else step_schema().empty_table()


def read_newest(root: str | Path, num_steps: int, keep: Callable[[pa.Table], Bools], *, max_rows: int = 500_000) -> pa.Table:
    """About `num_steps` of the newest steps that count, merged, of all workers, in order of event time.

    Files are read from the newest back, some at a time, so that a long log costs no more than what is asked for.

    Args:
        root: Folder of all workers' tables.
        num_steps: How many; each worker gives its share, and what stands in the same files.
        keep: Rows -> (n,) which of them count.
        max_rows: Rows to look at, at most, in all workers together; the files of the last ones are read to their end.
    """
    workers, tables = list_workers(root), []
    for worker in workers:
        reader = _Reader(root, worker)
        steps = looked = 0
        newest: list[pa.Table] = []
        for start in range(len(reader.files), 0, -FILES_AT_ONCE):
            files = reader.files[max(0, start - FILES_AT_ONCE) : start]
            rows = reader.rows([path for _, _, paths in files for path in paths])
            kept = rows.filter(pa.array(keep(rows)))
            newest.append(kept)
            steps, looked = steps + len(kept) - kept["item_ids"].null_count, looked + len(rows)
            if steps * len(workers) >= num_steps or looked * len(workers) >= max_rows:
                break
        tables += reversed(newest)
    return merge_steps(pa.concat_tables(tables)) if tables else step_schema().empty_table()


def commit_history(root: str | Path, worker: str, newest: int | None = None) -> list[CommitInfo]:
    """Commits of one worker, oldest first, as far as the table's own history goes back, or its newest entries."""
    infos = []
    for n, info in sorted(_made(DeltaTable(_table_place(root, worker)), newest).items()):
        rows = int(info.get("operationMetrics", {}).get("num_added_rows", 0))
        positions = msgspec.json.decode(str(info[POSITIONS]), type=dict[str, int]) if POSITIONS in info else {}
        infos.append(CommitInfo(worker, n, rows, int(info[COMMITTED_MS]), str(info[INCARNATION]), positions, info.get(REWARD)))
    return infos
