"""State files of one worker: what it needs to go on after commit n, in the same store as its table.

A file is written whole before the commit that makes it count, and checked by its sha256 when read. Its name carries the incarnation, so
that a fenced worker that wakes up between two steps of its commit cannot overwrite the state of the one that replaced it. On a local disk
it is fsynced under a temporary name, renamed, and its folder fsynced; an object store shows an object once it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec
import pyarrow as pa
from pyarrow import fs

from esrl_ray.errors import LogError

KEPT_STATES = 3


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to go on after commit n."""

    commit: int
    incarnation: str
    positions: dict[str, int]  # "topic/partition" -> next offset
    joiners: dict[int, bytes]  # partition -> SessionJoiner.snapshot()
    committed_ms: int
    topic_ids: dict[str, str] = {}  # topic -> Kafka's id of it
    reward: str = ""  # `RewardConfig.canonical` that the rewards in the table were made by


def open_store(root: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local path or a URI (`s3://`, `gs://`, `file://`, as Arrow knows them)."""
    store, path = fs.FileSystem.from_uri(root if "://" in root else str(Path(root).absolute()))
    return store, path.rstrip("/")


class StateFiles:
    """The folder of one worker's state files.

    Args:
        folder: Local path or URI; made when it is not there.
    """

    def __init__(self, folder: str) -> None:
        self._store, self._folder = open_store(folder)
        self._store.create_dir(self._folder, recursive=True)

    def path(self, n: int, incarnation: str) -> str:
        """Where the state of a commit stands."""
        return f"{self._folder}/{n:012d}.{incarnation}.msgpack"

    def write(self, state: WorkerState, incarnation: str) -> None:
        """Make one state durable.

        Raises:
            OSError: it was not written; nothing is left of it.
        """
        content = msgspec.msgpack.encode(state)
        path, raw = self.path(state.commit, incarnation), hashlib.sha256(content).digest() + content
        if isinstance(self._store, fs.LocalFileSystem):
            _write_durably(Path(path), raw)
            return
        with self._store.open_output_stream(path) as stream:
            stream.write(raw)

    def read(self, n: int, incarnation: str | None) -> WorkerState:
        """State n of an incarnation; None takes the only one there is.

        Raises:
            LogError: it is damaged, or not there, or there are several.
        """
        path = self.path(n, incarnation) if incarnation is not None else self._only(n)
        try:
            with self._store.open_input_file(path) as file:
                raw = file.read()
            if hashlib.sha256(raw[32:]).digest() != raw[:32]:
                raise LogError("the sha256 of the state file does not match its content", path)
            state = msgspec.msgpack.decode(raw[32:], type=WorkerState)
        except (OSError, pa.ArrowException, msgspec.MsgspecError) as error:
            raise LogError(f"cannot read the state file: {error}", path) from error
        if state.commit != n:
            raise LogError(f"the state file says commit {state.commit}, expected {n}", path)
        return state

    def sweep(self, n: int) -> None:
        """After commit n: remove files that no restart can need. Orphans of older commits go with them."""
        for path in self._paths():
            number = path.rsplit("/", 1)[-1].split(".")[0]
            if number.isdecimal() and int(number) <= n - KEPT_STATES:
                with contextlib.suppress(FileNotFoundError):  # a fenced worker may be sweeping too
                    self._store.delete_file(path)

    def _only(self, n: int) -> str:
        paths = [path for path in self._paths() if path.startswith(f"{self._folder}/{n:012d}.") and path.endswith(".msgpack")]
        if len(paths) != 1:
            raise LogError(f"{len(paths)} state files for commit {n}, expected 1", self._folder)
        return paths[0]

    def _paths(self) -> list[str]:
        return [str(entry.path) for entry in self._store.get_file_info(fs.FileSelector(self._folder))]


def _write_durably(path: Path, raw: bytes) -> None:
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
