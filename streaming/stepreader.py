"""Reading step logs: commits in order, merged steps, history; while the owners go on committing and cleaning up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from pyarrow import fs

from esrl_ray.errors import LogError
from esrl_ray.vocabulary import Bools
from streaming.logfiles import LogFile, list_files, read_files
from streaming.statefiles import STATE_FOLDER, StateFiles, WorkerState, open_store
from streaming.steptable import merge_steps, step_schema

_T = TypeVar("_T")

MERGED_BYTES = 32 * 2**20  # of the files that small ones are merged into: half a second of one core, measured in benchmarks/log.py
FILES_AT_ONCE, BYTES_AT_ONCE = 16, MERGED_BYTES  # of `read_newest`: a file is one commit, or many small ones
INCARNATION, COMMITTED_MS, COMMIT, POSITIONS = "esrl.incarnation", "esrl.committed_ms", "esrl.commit", "esrl.positions"
REWARD = "esrl.reward"
_NEWEST = 20  # entries of the table's history that hold its last commit, unless its care or `forget` added more since


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


def table_place(root: str | Path, worker: str) -> str:
    return f"{str(root).rstrip('/')}/{worker}"


def committed(table: DeltaTable, worker: str) -> int:
    n = table.transaction_version(worker)
    return -1 if n is None else int(n)


def made_commits(table: DeltaTable, newest: int | None = None) -> dict[int, dict[str, Any]]:
    """{commit: what the table's history says of it}, of all or at least the newest; one that was voided later is told as it is now."""
    num_entries = None if newest is None else 2 * newest + _NEWEST
    while True:
        history = sorted(table.history(num_entries), key=lambda info: int(info["version"]))
        made = {int(info[COMMIT]): info for info in history if COMMIT in info}
        if newest is None or num_entries is None or len(made) >= newest or len(history) < num_entries:
            return made
        num_entries *= 10


def list_workers(root: str | Path) -> list[str]:
    """Names of the workers that have a table under `root`."""
    store, path = open_store(str(root))
    entries = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    folders = [str(entry.base_name) for entry in entries if entry.type == fs.FileType.Directory]
    return sorted(name for name in folders if store.get_file_info(f"{path}/{name}/_delta_log").type == fs.FileType.Directory)


class _Group(NamedTuple):
    """Files whose commits overlap, as other tools may leave them; of our own files each is a group."""

    low: int
    high: int
    files: list[LogFile]


def _groups(files: Sequence[LogFile]) -> list[_Group]:
    groups: list[_Group] = []
    for file in files:
        if groups and file.low <= groups[-1].high:
            low, high, others = groups.pop()
            groups.append(_Group(low, max(high, file.high), [*others, file]))
        else:
            groups.append(_Group(file.low, file.high, [file]))
    return groups


class _Reader:
    """A worker's table as it is now.

    Raises:
        TableNotFoundError: there is none.
    """

    def __init__(self, root: str | Path, worker: str) -> None:
        self.worker = worker
        where = table_place(root, worker)
        table = DeltaTable(where)
        self.last, self.groups = committed(table, worker), _groups(list_files(table))
        dropped = table.transaction_version(f"{worker}.dropped")
        self.first = 0 if dropped is None else int(dropped) + 1
        self._store, self._path = open_store(where)

    def rows(self, groups: Iterable[_Group], *, after: int = -1, until: int | None = None) -> pa.Table:
        """Rows of the files, in order of commits."""
        rows = read_files(self._store, self._path, [file.path for group in groups for file in group.files], after=after)
        wanted = rows["commit"].to_numpy() <= (self.last if until is None else until)
        return rows if wanted.all() else rows.filter(pa.array(wanted))


def read_commits(root: str | Path, worker: str, after: int = -1) -> Iterator[tuple[int, pa.Table]]:
    """Commits of one worker in order, each with its rows; a commit without rows comes with an empty table.

    Args:
        root: Folder of all workers' tables.
        worker: Name.
        after: Only commits above this number.
    """
    expected, failed_at = after + 1, -1
    while True:
        try:
            for n, rows in _commits(_Reader(root, worker), expected):
                yield n, rows
                expected = n + 1
            return
        except TableNotFoundError:
            return
        except FileNotFoundError:  # the owner has merged it and cleaned up since the table was opened
            if failed_at == expected:
                raise
            failed_at = expected


def _commits(reader: _Reader, first: int) -> Iterator[tuple[int, pa.Table]]:
    empty, expected = step_schema().empty_table(), max(first, reader.first)
    for group in reader.groups:
        if group.high < expected:
            continue
        rows = reader.rows([group], after=expected - 1)
        numbers, starts = np.unique(rows["commit"].to_numpy(), return_index=True)
        for n, start, end in zip(numbers.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            yield from ((skipped, empty) for skipped in range(expected, n))
            yield n, rows.slice(start, end - start)
            expected = n + 1
    yield from ((skipped, empty) for skipped in range(expected, reader.last + 1))


def _read(root: str | Path, worker: str, read: Callable[[_Reader], _T]) -> _T:
    """What is read of a worker's table; read anew when its owner cleaned up meanwhile."""
    try:
        return read(_Reader(root, worker))
    except FileNotFoundError:
        return read(_Reader(root, worker))


def read_steps(root: str | Path, *, as_of: Mapping[str, int] | None = None) -> pa.Table:
    """Every step once: merged over revisions, all workers, in order of event time.

    Args:
        root: Folder of all workers' tables.
        as_of: {worker: commit} to read up to; default everything.

    Raises:
        LogError: that far back the log has been dropped.
    """

    def rows(reader: _Reader) -> pa.Table:
        until = reader.last if as_of is None else as_of.get(reader.worker, -1)
        if 0 <= until < reader.first:
            what = f"commits of {reader.worker} up to {reader.first - 1} were dropped by log.retention_days, asked for {until}"
            raise LogError(what, str(root), f"ask for {reader.first} or later")
        return reader.rows((group for group in reader.groups if group.low <= until), until=until)

    tables = [_read(root, worker, rows) for worker in list_workers(root)]
    return merge_steps(pa.concat_tables(tables)) if tables else step_schema().empty_table()


def read_newest(
    root: str | Path,
    num_steps: int,
    keep: Callable[[pa.Table], Bools],
    *,
    workers: Sequence[str] | None = None,
    max_rows: int = 500_000,
) -> pa.Table:
    """About `num_steps` of the newest steps that count, merged, in order of event time.

    Files are read from the newest back, some at a time, so that a long log costs no more than what is asked for.

    Args:
        root: Folder of all workers' tables.
        num_steps: How many; and what stands in the same files.
        keep: Rows -> (n,) which of them count.
        workers: Whose tables; None: of all that there are.
        max_rows: Rows to look at, at most, in all workers together; the files of the last ones are read to their end.
    """
    try:
        return _read_newest(root, num_steps, keep, list_workers(root) if workers is None else workers, max_rows)
    except FileNotFoundError:  # an owner cleaned up meanwhile
        return _read_newest(root, num_steps, keep, list_workers(root) if workers is None else workers, max_rows)


class _Backwards:
    """A worker's rows from the newest back."""

    def __init__(self, reader: _Reader, keep: Callable[[pa.Table], Bools]) -> None:
        self._reader, self._keep = reader, keep
        self.left, self.kept, self.num_rows = list(reader.groups), list[pa.Table](), 0
        self.since_ms = 1 << 62  # clock of the oldest row that was read

    def read_more(self) -> None:
        """Some more files."""
        some: list[_Group] = []
        num_bytes = 0
        while self.left and len(some) < FILES_AT_ONCE and num_bytes < BYTES_AT_ONCE:
            some.append(self.left.pop())
            num_bytes += sum(file.num_bytes for file in some[-1].files)
        rows = self._reader.rows(reversed(some))
        self.kept.append(rows.filter(pa.array(self._keep(rows))))
        self.num_rows += len(rows)
        self.since_ms = min([self.since_ms, *rows["closed_ms"].to_pylist()])


def _read_newest(root: str | Path, num_steps: int, keep: Callable[[pa.Table], Bools], workers: Sequence[str], max_rows: int) -> pa.Table:
    """Back to the same time in all tables: a step's first row may stand in one table and what amends it in another, see `partitions`."""
    tables = [_Backwards(_Reader(root, worker), keep) for worker in workers]
    if not tables:
        return step_schema().empty_table()
    for table in tables:
        table.read_more()
    while True:
        unread = [table for table in tables if table.left]
        since_ms = max((table.since_ms for table in unread), default=0)
        rows = pa.concat_tables(kept for table in tables for kept in reversed(table.kept))
        first = pc.is_valid(rows["item_ids"])
        in_time = pc.greater_equal(rows["closed_ms"], since_ms)
        enough = pc.sum(pc.and_(first, in_time)).as_py() or 0
        if not unread or enough >= num_steps or sum(table.num_rows for table in tables) >= max_rows:
            return merge_steps(rows.filter(pc.or_(pc.invert(first), in_time)))
        max(unread, key=lambda table: table.since_ms).read_more()


def last_commits(root: str | Path, workers: Iterable[str]) -> dict[str, int]:
    """{worker: its last commit} of those that have one."""
    last = {worker: committed(DeltaTable(table_place(root, worker)), worker) for worker in workers}
    return {worker: n for worker, n in last.items() if n >= 0}


def last_state(root: str | Path, worker: str) -> WorkerState | None:
    """State of a worker's last commit, read without owning the table; None before the first.

    Raises:
        LogError: it is damaged.
    """
    where = table_place(root, worker)
    table = DeltaTable(where)
    if (n := committed(table, worker)) < 0:
        return None
    return StateFiles(f"{where}/{STATE_FOLDER}").read(n, made_commits(table, 1).get(n, {}).get(INCARNATION))


def commit_history(root: str | Path, worker: str, newest: int | None = None) -> list[CommitInfo]:
    """Commits of one worker, oldest first, as far as the table's history goes back (`log.history_minutes`), or the newest."""
    infos, made = [], sorted(made_commits(DeltaTable(table_place(root, worker)), newest).items())
    for n, info in made if newest is None else made[-newest:]:
        rows = int(info.get("operationMetrics", {}).get("num_added_rows", 0))
        positions = msgspec.json.decode(str(info[POSITIONS]), type=dict[str, int]) if POSITIONS in info else {}
        infos.append(CommitInfo(worker, n, rows, int(info[COMMITTED_MS]), str(info[INCARNATION]), positions, info.get(REWARD)))
    return infos
