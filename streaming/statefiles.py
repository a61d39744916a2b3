"""State files of one worker: what it needs to go on after commit n, in the same store as its table.

A file is whole, or has what changed since commit n-1 and names the whole one that it builds on; those between are read with it. The first
file of an incarnation is whole, and so is the next one once the changes since the last exceed it, in bytes: so a commit costs twice its
changes on average. Two chains are kept: when a file is damaged, the newest commit whose chain is readable is gone back to.

A file is written whole before the commit that makes it count, and checked by its sha256 when read. Its name carries the incarnation, so
that a fenced worker that wakes up between two steps of its commit cannot overwrite the state of the one that replaced it. On a local disk
it is fsynced under a temporary name, renamed, and its folder fsynced; an object store shows an object once it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path

import msgspec
import pyarrow as pa
from pyarrow import fs

from esrl_ray.errors import LogError

STATE_FOLDER = "_state"  # in the worker's table
KEPT_STATES = 3
SHA_BYTES = 32  # in front of a state file
MAX_CHAIN = 100  # files that a restart reads, at most: in an object store each costs a request


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to go on after commit n."""

    commit: int
    incarnation: str
    positions: dict[str, int]  # "topic/partition" -> next offset
    joiners: dict[int, list[bytes]]  # partition -> SessionJoiner.snapshot(), a whole one first unless this builds on another commit
    committed_ms: int
    topic_ids: dict[str, str] = {}  # topic -> Kafka's id of it
    reward: str = ""  # `RewardConfig.canonical` that the rewards in the table were made by
    epochs: dict[int, int] = {}  # partition -> how often it has moved from one worker's table to another's; 0 when it is not here
    given: dict[int, str] = {}  # partition -> worker that is to take it over; empty: whoever is dealt it
    builds_on: int | None = None  # commit of the newest whole state of this incarnation; None: this is whole

    @property
    def held(self) -> dict[int, list[bytes]]:
        """The joiners of partitions that are not given away."""
        return {p: chain for p, chain in self.joiners.items() if p not in self.given}


def open_store(root: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local path or a URI (`s3://`, `gs://`, `file://`, as Arrow knows them)."""
    store, path = fs.FileSystem.from_uri(root if "://" in root else str(Path(root).absolute()))
    return store, path.rstrip("/")


def sign_of_life(where: str) -> int | None:
    """A lock that every owner of a table shares as long as it lives, and that `rewrite` wants alone; None on an object store.

    Raises:
        LogError: the table is being rewritten.
    """
    if "://" in where:
        return None
    file = os.open(Path(where, "_alive"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise LogError("the rewards in this step log are being recomputed", where, "start again when that is done") from error
    return file


class StateFiles:
    """The folder of one worker's state files.

    Args:
        folder: Local path or URI; made when it is not there.
    """

    def __init__(self, folder: str) -> None:
        self._store, self._folder = open_store(folder)
        self._store.create_dir(self._folder, recursive=True)
        self._wholes: list[int] = []  # commits of the newest whole states
        self._bytes_whole = self._bytes_since = 0
        self.base: int | None = None

    def path(self, n: int, incarnation: str) -> str:
        """Where the state of a commit stands."""
        return f"{self._folder}/{n:012d}.{incarnation}.msgpack"

    def write(self, state: WorkerState, incarnation: str) -> None:
        """Make one state durable; after it `base` is what the next one may build on, or None when that must be whole.

        Raises:
            OSError: it was not written; nothing is left of it.
        """
        content = msgspec.msgpack.encode(state)
        path, raw = self.path(state.commit, incarnation), hashlib.sha256(content).digest() + content
        write_durably(self._store, path, raw)
        if state.builds_on is None:
            self._wholes = [*(n for n in self._wholes[-1:] if n != state.commit), state.commit]
            self._bytes_whole, self._bytes_since = len(raw), 0
        else:
            self._bytes_since += len(raw)
        whole = self._wholes[-1]
        self.base = whole if self._bytes_since < self._bytes_whole and state.commit - whole < MAX_CHAIN else None

    def read(self, n: int, incarnation: str | None) -> WorkerState:
        """State n of an incarnation, whole; None takes the only one there is.

        Raises:
            LogError: it, or one that it builds on, is damaged, or not there, or there are several.
        """
        state = self._read(n, incarnation)
        if state.builds_on is None:
            links, self._wholes = [state], [n]
        else:
            links, self._wholes = [self._read(m, state.incarnation) for m in range(state.builds_on, n)] + [state], [state.builds_on]
        joiners = {p: [part for link in links for part in link.joiners[p]] for p in state.joiners}
        return msgspec.structs.replace(state, joiners=joiners, builds_on=None)

    def numbers(self) -> list[int]:
        """Commits that have a state file, newest first."""
        return sorted({number for path in self._paths() if (number := _number(path)) is not None}, reverse=True)

    def _read(self, n: int, incarnation: str | None) -> WorkerState:
        path = self.path(n, incarnation) if incarnation is not None else self._only(n)
        try:
            with self._store.open_input_file(path) as file:
                raw = file.read()
            if hashlib.sha256(raw[SHA_BYTES:]).digest() != raw[:SHA_BYTES]:
                raise LogError("the sha256 of the state file does not match its content", path)
            state = msgspec.msgpack.decode(raw[SHA_BYTES:], type=WorkerState)
        except (OSError, pa.ArrowException, msgspec.MsgspecError) as error:
            raise LogError(f"cannot read the state file: {error}", path) from error
        if state.commit != n:
            raise LogError(f"the state file says commit {state.commit}, expected {n}", path)
        return state

    def sweep(self, n: int) -> None:
        """After commit n: remove files that no restart can need. Orphans of older commits go with them."""
        oldest = min(n - KEPT_STATES + 1, self._wholes[0])
        for path in self._paths():
            if (number := _number(path)) is not None and number < oldest:
                with contextlib.suppress(FileNotFoundError):  # a fenced worker may be sweeping too
                    self._store.delete_file(path)

    def _only(self, n: int) -> str:
        paths = [path for path in self._paths() if path.startswith(f"{self._folder}/{n:012d}.") and path.endswith(".msgpack")]
        if len(paths) != 1:
            raise LogError(f"{len(paths)} state files for commit {n}, expected 1", self._folder)
        return paths[0]

    def _paths(self) -> list[str]:
        return [str(entry.path) for entry in self._store.get_file_info(fs.FileSelector(self._folder))]


def _number(path: str) -> int | None:
    number = path.rsplit("/", 1)[-1].partition(".")[0]
    return int(number) if number.isdecimal() else None


def write_durably(store: fs.FileSystem, name: str, raw: bytes) -> None:
    """Write a whole file that survives a power cut.

    Raises:
        OSError: it was not written; nothing is left of it.
    """
    if not isinstance(store, fs.LocalFileSystem):
        with store.open_output_stream(name) as stream:
            stream.write(raw)
        return
    path = Path(name)
    temporary = path.with_suffix(".writing")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:  # a full disk: do not keep half of it
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
