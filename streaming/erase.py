"""Taking one user out of a worker's table, whether its owner runs or not.

Delivery: one Delta commit for a table, which nothing but another rewrite at the same moment can refuse; then the files that held the user
are removed, those of earlier rewrites too. A crash in between is made good by running it again: what is gone is not counted twice.

Delta knows the files of its latest commits only. A commit that crashed leaves one that it never knew, and what a rewrite took away is
forgotten after `log.keep_hours`, whether the file went or not: so the folder is searched as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from pyarrow import dataset, fs

from streaming.logfiles import DATE, NO_HOOKS, LogFile, list_files, read_files, rewrite
from streaming.session_state import users_in
from streaming.statefiles import SHA_BYTES, STATE_FOLDER, WorkerState, open_store
from streaming.stepreader import table_place

ATTEMPTS = 10  # the owner rewrites once in many commits
COMMIT_MS = 3_600_000  # no commit lasts so long: a file that is older and in no table belongs to none


@dataclass(frozen=True, slots=True)
class Erased:
    """What a table held of the user."""

    worker: str
    rows: int
    num_steps: int
    commits: tuple[int, ...]
    """Those that wrote the rows."""
    open_sessions: bool
    """State files still name the user: a session is open, or ended within the last commits."""
    unsettled: int
    """Files that hold the user, or cannot be read, and may belong to a commit that is under way."""


def erase_user(root: str | Path, worker: str, user_ids: Collection[str], *, now_ms: int, dry_run: bool) -> Erased:
    """Take a user's rows out of a worker's table and remove the files that held them.

    Args:
        root: Folder of all workers' tables.
        worker: Name.
        user_ids: Every form of the user's id that the log may have.
        now_ms: Clock.
        dry_run: Only count.

    Raises:
        CommitFailedError, FileNotFoundError: other rewrites came first, again and again.
    """
    where = table_place(root, worker)
    store, folder = open_store(where)
    for attempt in range(1, ATTEMPTS + 1):
        table = DeltaTable(where)
        try:
            found = [(file, rows) for file in list_files(table) if len(rows := _rows_of(store, f"{folder}/{file.path}", user_ids))]
            if not dry_run:
                rewrite(table, where, worker, _without(store, folder, [file for file, _ in found], user_ids), now_ms=now_ms)
            break
        except (CommitFailedError, FileNotFoundError):  # the owner has merged files, and may have removed them
            if attempt == ATTEMPTS:
                raise
    if not dry_run:  # not the full one: it would take the files of a commit that is under way
        table.vacuum(0, dry_run=False, enforce_retention_duration=False, post_commithook_properties=NO_HOOKS)
    unsettled = 0 if dry_run else _remove_unnamed(store, folder, where, user_ids, before_ms=now_ms - COMMIT_MS)
    held = pa.concat_tables([rows for _, rows in found]) if found else None
    return Erased(
        worker=worker,
        rows=0 if held is None else len(held),
        num_steps=0 if held is None else pc.count_distinct(held["step_id"]).as_py(),
        commits=() if held is None else tuple(np.unique(held["commit"].to_numpy()).tolist()),
        open_sessions=_named_in_states(store, f"{folder}/{STATE_FOLDER}", user_ids),
        unsettled=unsettled,
    )


def _remove_unnamed(store: fs.FileSystem, folder: str, where: str, user_ids: Collection[str], *, before_ms: int) -> int:
    """Remove old files that are in no table and hold the user; how many are too young for that."""
    selector = fs.FileSelector(folder, recursive=True)
    found = [entry for entry in store.get_file_info(selector) if entry.path.removeprefix(f"{folder}/").startswith(f"{DATE}=")]
    named = {f"{folder}/{file.path}" for file in list_files(DeltaTable(where))}  # after the listing, or a new commit's file looked unnamed
    num_young = 0
    for entry in found:
        if entry.type != fs.FileType.File or entry.path in named:
            continue
        try:
            if not len(_rows_of(store, entry.path, user_ids)):
                continue
        except FileNotFoundError:  # its owner came first
            continue
        except pa.ArrowInvalid:  # half of it was written
            pass
        if entry.mtime_ns // 1_000_000 < before_ms:
            store.delete_file(entry.path)
        else:
            num_young += 1
    return num_young


def _rows_of(store: fs.FileSystem, path: str, user_ids: Collection[str]) -> pa.Table:
    """step_id and commit of the user's rows in a file."""
    rows = dataset.dataset(path, format="parquet", filesystem=store)
    return rows.to_table(columns=["step_id", "commit"], filter=pc.field("user_id").isin(list(user_ids)))


def _without(
    store: fs.FileSystem, folder: str, files: list[LogFile], user_ids: Collection[str]
) -> Iterator[tuple[list[LogFile], pa.Table]]:
    for file in files:
        rows = read_files(store, folder, [file.path])
        yield [file], rows.filter(pc.invert(pc.is_in(rows["user_id"], pa.array(user_ids, pa.string()))))


def _named_in_states(store: fs.FileSystem, folder: str, user_ids: Collection[str]) -> bool:
    for entry in store.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        try:
            with store.open_input_file(entry.path) as file:
                if _names(file.read(), user_ids):
                    return True
        except FileNotFoundError:  # swept by the owner
            continue
    return False


def _names(state: bytes, user_ids: Collection[str]) -> bool:
    """Whether a state file holds steps of the user. What else reads like the id may be that of an item."""
    if not any(msgspec.msgpack.encode(user_id) in state for user_id in user_ids):  # as it stands there: with its length in front
        return False
    try:
        joiners = msgspec.msgpack.decode(state[SHA_BYTES:], type=WorkerState).joiners
        return any(users_in(part) & {*user_ids} for parts in joiners.values() for part in parts)
    except (msgspec.MsgspecError, UnicodeDecodeError):  # damaged: nobody can tell
        return True
