"""Files of a step log's table: which there are, and how they are rewritten while their owner goes on committing.

A rewrite is one Delta commit that removes files and adds others: a crash leaves a whole table, and at most a file that nobody names, which
a vacuum takes. It is written as Delta's own actions because the library's commands do not fit here (deltalake 1.6.6): `optimize.compact`
packs files by size, so that the commits of its results overlap and reading in order would have to load them together; `delete` is refused
whenever the owner appended meanwhile, and a live worker does that every few seconds.

Delta compares such actions with nothing: two rewrites of one file would double its rows. So each carries the next number of the
application id `<worker>.files`, and of two at the same time the later is refused (`CommitFailedError`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import dataset, fs, parquet

from streaming.statefiles import open_store, write_durably
from streaming.steptable import step_schema

DATE = "date"
"""Partition column: UTC date of the commit. Not of the event: commits in order then stand in one partition after the other, what is dropped
is a prefix of the log, and an import of old events is not old. Readers find a step's amendments in later partitions by its step_id."""

ROW_GROUP = 4096
"""Rows that are read together of a merged file."""

NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
"""Delta's own housekeeping after a commit is off: the owner does it when there is time."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """One data file of the table."""

    path: str
    num_bytes: int
    rows: int
    low: int
    """Its smallest commit."""
    high: int
    """Its largest commit."""
    date: str


def list_files(table: DeltaTable) -> list[LogFile]:
    """The table's files in the order of their commits."""
    actions: Any = pa.table(table.get_add_actions(flatten=True))
    if not len(actions):
        return []
    names = ("path", "size_bytes", "num_records", "min.commit", "max.commit", f"partition.{DATE}")
    columns = [actions[name].to_pylist() if name in actions.column_names else [""] * len(actions) for name in names]
    return sorted((LogFile(*fields) for fields in zip(*columns, strict=True)), key=lambda file: (file.low, file.high))


def read_files(store: fs.FileSystem, folder: str, paths: Sequence[str], *, after: int = -1) -> pa.Table:
    """Rows of files, in order of commits; only of commits above a number."""
    if not paths:
        return step_schema().empty_table()
    full = [f"{folder}/{path}" for path in paths]
    wanted = pc.field("commit") > after if after >= 0 else None  # spares row groups: a gap needs some commits of a large file
    rows = dataset.dataset(full, schema=step_schema(), format="parquet", filesystem=store).to_table(filter=wanted)
    commits = rows["commit"].to_numpy()
    return rows if (np.diff(commits) >= 0).all() else rows.take(pa.array(np.argsort(commits, kind="stable")))


def rewrite(
    table: DeltaTable,
    where: str,
    worker: str,
    changes: Iterable[tuple[Sequence[LogFile], pa.Table]],
    *,
    now_ms: int,
    rows_change: bool = True,
    dropped: int | None = None,
    commit: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Put rows in the place of files, all in one Delta commit.

    Args:
        table: As it was when the files were listed.
        where: Its folder.
        worker: Its owner.
        changes: Files of one date, and the rows that stand for them, in order of commits; no rows when nothing is left.
        now_ms: Clock.
        rows_change: Not only their files.
        dropped: All commits up to this one are gone.
        commit: This is the owner's commit of that number.
        metadata: Kept with the Delta commit.

    Returns:
        Number of files that were replaced.

    Raises:
        CommitFailedError: another rewrite came first; nothing was changed.
    """
    store, folder = open_store(where)
    actions: list[AddAction | RemoveAction] = []
    num_replaced = 0
    for files, rows in changes:
        actions += [RemoveAction(f.path, rows_change, now_ms, size=f.num_bytes, partition_values={DATE: f.date}) for f in files]
        num_replaced += len(files)
        if len(rows):
            actions.append(_write_file(store, folder, files[0].date, rows, now_ms=now_ms, rows_change=rows_change))
    if actions or metadata or commit is not None:
        ids = [rewrite_mark(table, worker)]
        ids += [] if dropped is None else [Transaction(f"{worker}.dropped", dropped)]
        ids += [] if commit is None else [Transaction(worker, commit)]
        properties = CommitProperties(app_transactions=ids, custom_metadata=dict(metadata or {}))
        table.create_write_transaction(
            actions, "append", table.schema(), [DATE], commit_properties=properties, post_commithook_properties=NO_HOOKS
        )
        table.update_incremental()  # this call alone leaves the handle at the version before
    return num_replaced


def rewrite_mark(table: DeltaTable, worker: str) -> Transaction:
    """What a Delta commit that is no append carries, so that of two at the same time the later is refused."""
    return Transaction(f"{worker}.files", 1 + (table.transaction_version(f"{worker}.files") or 0))


def _write_file(store: fs.FileSystem, folder: str, date: str, rows: pa.Table, *, now_ms: int, rows_change: bool) -> AddAction:
    # A name that nobody else draws: of two rewrites at the same time one is refused, but its files are written by then. And one that never
    # comes again: a vacuum that has listed an orphan deletes it by its name, whatever stands there by then.
    path, sink = f"{DATE}={date}/part-{uuid.uuid4()}.zstd.parquet", pa.BufferOutputStream()
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": ["commit"]}
    parquet.write_table(rows, sink, row_group_size=ROW_GROUP, **options)
    content = sink.getvalue()
    write_durably(store, f"{folder}/{path}", content)
    commits = rows["commit"].to_numpy()
    low, high = {"commit": int(commits[0])}, {"commit": int(commits[-1])}
    stats = json.dumps({"numRecords": len(rows), "minValues": low, "maxValues": high, "nullCount": {"commit": 0}})
    return AddAction(path, content.size, {DATE: date}, now_ms, rows_change, stats)


def runs_to_merge(files: Sequence[LogFile], max_bytes: int) -> list[list[LogFile]]:
    """Neighbouring files of one date that together stay below a size; those above half of it have been merged enough."""
    runs: list[list[LogFile]] = []
    run: list[LogFile] = []
    for file in files:
        if run and (file.date != run[0].date or sum(f.num_bytes for f in run) + file.num_bytes > max_bytes):
            runs.append(run)
            run = []
        if file.num_bytes * 2 <= max_bytes:
            run.append(file)
        elif run:
            runs.append(run)
            run = []
    return [run for run in map(_tail, [*runs, run]) if len(run) > 1]


def _tail(run: list[LogFile]) -> list[LogFile]:
    """Without leading files that are larger than what follows them, so that a row is written again only when its file doubles."""
    first, after = 0, sum(file.num_bytes for file in run[1:])
    while first < len(run) and run[first].num_bytes > after:
        first += 1
        after -= sum(file.num_bytes for file in run[first : first + 1])
    return run[first:]
