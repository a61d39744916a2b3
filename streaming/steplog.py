"""The step log: one Delta Lake table per ingest worker, where the truth lives.

Delivery: commit n holds the rows of n and, as Delta's application transaction, the number n itself; the state file n (positions, open
sessions, de-duplication) is written before it. So after any crash the table says which n is committed, and state n says where to go on.
A state file without its commit is an orphan: ignored, and swept later.

What Delta (deltalake 1.6.6) does and does not do: appending by path accepts an application version twice, so one held handle is used
and `transaction_version == n` is checked before n+1; a held handle whose application id has advanced is refused by Delta itself
(`CommitFailedError: Concurrent transaction failed`), which is what fences two workers that pass the check together. Custom metadata can
vanish when the log is cleaned, the transaction version does not: nothing but messages and `commit_history` depends on old metadata.
Statistics are kept of `commit` only, the first column, and
no dictionaries are written: with Delta's defaults the 120th commit takes nearly twice the processor time, and files are 1.7 times as large.
A handle that is held looks at every log entry since it was opened: 1,000 commits slow a commit from 15 to 70 ms, so `tidy` opens it anew.
"""

from __future__ import annotations

import fcntl
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Field, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import DeltaError

from esrl_ray.config import LogConfig
from esrl_ray.errors import Fenced, LogError
from esrl_ray.reward import digest_of
from esrl_ray.spec import Spec
from streaming.logfiles import DATE, NO_HOOKS, list_files, read_files, rewrite, rewrite_mark, runs_to_merge
from streaming.statefiles import STATE_FOLDER, StateFiles, WorkerState, open_store, sign_of_life
from streaming.stepreader import (
    COMMIT,
    COMMITTED_MS,
    INCARNATION,
    MERGED_BYTES,
    POSITIONS,
    REWARD,
    CommitInfo,
    commit_history,
    committed,
    last_commits,
    last_state,
    list_workers,
    made_commits,
    read_commits,
    read_newest,
    read_steps,
    table_place,
)
from streaming.steptable import check_widths, rows_to_table, step_schema

__all__ = [
    "CommitInfo",
    "StepLog",
    "WorkerState",
    "commit_history",
    "last_commits",
    "last_state",
    "list_workers",
    "read_commits",
    "read_newest",
    "read_steps",
    "rows_to_table",
    "step_schema",
]

_logger = logging.getLogger(__name__)


VACUUM_EVERY = 10  # rounds of care: it lists all files
DAY_MS = 24 * 3600 * 1000
_STOP_ONE = "another worker of this name is running: stop one"
_FILE_PROPERTIES = WriterProperties(
    compression="ZSTD", compression_level=1, default_column_properties=ColumnProperties(dictionary_enabled=False)
)


class StepLog:
    """One worker's table and its state files. Own it from one process; a second owner is fenced at its next commit.

    Args:
        root: Folder of all workers' tables of one spec: a local path, or a URI that Delta and Arrow both know.
        worker: Name of the worker, the application id of the transactions.
        incarnation: Unique for this process.
        spec: Widths that rows are checked against.
        care: How the table is kept small.

    Raises:
        LogError: the table cannot be opened.
    """

    def __init__(self, root: str | Path, worker: str, incarnation: str, spec: Spec, care: LogConfig | None = None) -> None:
        self._where = table_place(root, worker)
        self._worker, self._incarnation, self._spec = worker, incarnation, spec
        self._care = care or LogConfig()
        wanted = {
            "delta.dataSkippingNumIndexedCols": "1",
            "delta.logRetentionDuration": f"interval {self._care.history_minutes} minutes",
            "delta.deletedFileRetentionDuration": f"interval {self._care.keep_hours} hours",
        }
        try:
            self._states = StateFiles(f"{self._where}/{STATE_FOLDER}")
            if not DeltaTable.is_deltatable(self._where):
                schema = step_schema().append(pa.field(DATE, pa.string()))
                DeltaTable.create(self._where, schema=schema, mode="ignore", partition_by=[DATE], configuration=wanted)
            self._table = DeltaTable(self._where)
            if self._table.metadata().configuration != wanted:
                self._table.alter.set_table_properties(wanted)
            self._alive = sign_of_life(self._where)
        except (DeltaError, OSError) as error:
            raise LogError(f"cannot open the step log: {error}", self._where) from error
        if self._alive is not None:
            weakref.finalize(self, os.close, self._alive)
        if self._table.metadata().partition_columns != [DATE]:
            raise LogError("the step log is not partitioned by date: an older version wrote it", self._where, "start with a new run.dir")

    @property
    def incarnation(self) -> str:
        """Of this process."""
        return self._incarnation

    @property
    def table_id(self) -> str:
        """Of this table, and of none that is made in its place."""
        return str(self._table.metadata().id)

    @property
    def committed(self) -> int:
        """Number of the last commit; -1 before the first."""
        return committed(self._table, self._worker)

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
            return self._states.read(n, made_commits(self._table, 1).get(n, {}).get(INCARNATION))
        except LogError as damage:
            return self._go_back(n, damage)

    def _go_back(self, n: int, damage: LogError) -> WorkerState:
        made = made_commits(self._table)
        for m in self._states.numbers():
            if m >= n:
                continue
            try:
                before = self._states.read(m, made.get(m, {}).get(INCARNATION))
            except LogError:
                continue
            _logger.warning("commits are void, their events are read again first=%d last=%d reason=%s", m + 1, n, damage)
            state = msgspec.structs.replace(before, commit=n, incarnation=self._incarnation)
            self._states.write(state, self._incarnation)
            metadata = self._metadata(state)
            if metadata.get(REWARD) == made.get(n, {}).get(REWARD):
                self._void(m, metadata)
            else:  # one of them changed the rewards of all rows
                properties = CommitProperties(app_transactions=[rewrite_mark(self._table, self._worker)], custom_metadata=metadata)
                self._table.restore(int(made[m]["version"]), commit_properties=properties)
            self._table = DeltaTable(self._where)
            return state
        raise LogError(
            f"{damage.what}, and there is no commit before {n} to go back to", damage.where, "start with an empty log"
        ) from damage

    def _void(self, after: int, metadata: Mapping[str, str]) -> None:
        """Take the rows of later commits away; the Delta commit says what the last number is now. No file of the past is needed."""
        store, folder = open_store(self._where)
        files = [file for file in list_files(self._table) if file.high > after]
        read = [(file, read_files(store, folder, [file.path])) for file in files]
        changes = [([file], rows.filter(pc.less_equal(rows["commit"], after))) for file, rows in read]
        rewrite(self._table, self._where, self._worker, changes, now_ms=int(metadata[COMMITTED_MS]), metadata=metadata)

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
        check_widths(table, self._spec)
        n = state.commit
        rows = table.set_column(0, "commit", pa.array(np.full(len(table), n, np.int64)))
        rows = rows.append_column(DATE, pa.array([_date(state.committed_ms)] * len(rows), pa.string()))
        properties = CommitProperties(app_transactions=[Transaction(self._worker, n)], custom_metadata=self._metadata(state))
        with self._transaction(state):
            write_deltalake(
                self._table,
                rows,
                mode="append",
                commit_properties=properties,
                writer_properties=_FILE_PROPERTIES,
                post_commithook_properties=NO_HOOKS,
            )
        try:
            self._states.sweep(n)
        except OSError as error:  # the commit stands, and the next one tidies up
            _logger.warning("step log not tidied commit=%d reason=%s", n, error)

    def rewrite(self, state: WorkerState, change: Callable[[pa.Table], pa.Table]) -> None:
        """Change all rows, as one commit of its own: readers see all of it or nothing.

        Rows keep the numbers of the commits that made them; this one has none. Whoever goes on with the old ones is fenced by its number.

        Args:
            state: As for `commit`.
            change: Rows of a file -> as many; called once nobody else owns the table.

        Raises:
            LogError: a worker of this log is running, which is known on a local disk only.
            Fenced: another incarnation has committed to this table.
        """
        if self._alive is not None:
            try:
                fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LogError(f"worker {self._worker} is running", self._where, "stop `esrl ingest` first") from error
        store, folder = open_store(self._where)
        with self._transaction(state):
            changes = (([file], change(read_files(store, folder, [file.path]))) for file in list_files(self._table))
            now_ms, metadata = state.committed_ms, self._metadata(state)
            rewrite(self._table, self._where, self._worker, changes, now_ms=now_ms, commit=state.commit, metadata=metadata)

    @contextmanager
    def _transaction(self, state: WorkerState) -> Iterator[None]:
        """State n, then whatever commits n."""
        n = state.commit
        self._table.update_incremental()
        if (last := self.committed) != n - 1:
            raise Fenced(f"commit {n} of {self._worker} follows commit {last}", self._where, _STOP_ONE)
        there = {field.name for field in self._table.schema().fields}
        if newer := [Field.from_arrow(field) for field in step_schema() if field.name not in there]:  # an older version made the table
            self._table.alter.add_columns(newer)
        self._states.write(state, self._incarnation)
        try:
            yield
        except (DeltaError, OSError) as error:
            if not self._happened(n, error):
                raise

    def tidy(self, clock_ms: Callable[[], int], budget_ms: int) -> bool:
        """Between two commits of the owner, every `log.tidy_every` of them: keep the table as quick as a new one.

        Small files are merged, partitions beyond retention dropped, a checkpoint written, and what nobody can need any more is removed.
        A crash at any point leaves a whole table; a failure is logged and made good by the next time.

        Args:
            clock_ms: Wall clock.
            budget_ms: No further merge begins after this long; the next time goes on.

        Returns:
            Whether it was time.
        """
        n = self.committed
        if n < 0 or n % self._care.tidy_every != self._care.tidy_every - 1:
            return False
        start_ms = clock_ms()
        try:
            if (days := self._care.retention_days) is not None:
                self._drop(_date(start_ms - days * DAY_MS), start_ms)
            store, folder = open_store(self._where)
            for run in runs_to_merge(list_files(self._table), MERGED_BYTES):
                if clock_ms() - start_ms >= budget_ms:
                    break
                merged = read_files(store, folder, [file.path for file in run])
                rewrite(self._table, self._where, self._worker, [(run, merged)], now_ms=start_ms, rows_change=False)
            if n % (VACUUM_EVERY * self._care.tidy_every) == self._care.tidy_every - 1:
                hours = self._care.keep_hours
                self._table.vacuum(hours, dry_run=False, enforce_retention_duration=False, post_commithook_properties=NO_HOOKS, full=True)
            self._table.create_checkpoint()
            self._table.cleanup_metadata()
            self._table = DeltaTable(self._where)
        except (DeltaError, OSError) as error:
            _logger.warning("step log not tidied commit=%d reason=%s", n, error)
        return True

    def _drop(self, before: str, now_ms: int) -> None:
        """Drop whole partitions; what is dropped are always the first commits, or readers would see gaps."""
        files = list_files(self._table)
        kept = min((file.low for file in files if file.date >= before), default=self.committed + 1)
        old = [([file], step_schema().empty_table()) for file in files if file.high < kept]
        if old:
            rewrite(self._table, self._where, self._worker, old, now_ms=now_ms, dropped=kept - 1)
            _logger.info("step log partitions dropped before=%s through_commit=%d files=%d", before, kept - 1, len(old))

    def _happened(self, n: int, error: Exception) -> bool:
        """After a failed commit: it is done after all, or it did not happen, or another incarnation has made it."""
        self._table = DeltaTable(self._where)
        if self.committed < n:
            return False
        made = made_commits(self._table, self.committed - n + 1)
        if (owner := made.get(n, {}).get(INCARNATION)) != self._incarnation:
            raise Fenced(f"commit {n} was made by another incarnation {owner}", self._where, _STOP_ONE) from error
        return True

    def _metadata(self, state: WorkerState) -> dict[str, str]:
        positions = msgspec.json.encode(state.positions).decode()
        reward = {REWARD: digest_of(state.reward)} if state.reward else {}
        commit = {COMMIT: str(state.commit), COMMITTED_MS: str(state.committed_ms)}
        return {INCARNATION: self._incarnation, **commit, POSITIONS: positions, **reward}


def _date(epoch_ms: int) -> str:
    return datetime.fromtimestamp(epoch_ms / 1e3, UTC).date().isoformat()
