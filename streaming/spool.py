"""Records on disk that Kafka has not acknowledged: first in, first out, owned by one live process, adopted from dead ones.

`<root>/<owner>/00000001.spool` ... are segments of length-prefixed records; a segment goes when all of it is acknowledged, so a crash
while sending repeats at most one (the join drops repeats by event id). `<root>/<owner>/lock` is held while the owner lives. What is
appended survives a kill of the process at once, and a crash of the machine once synced (with an append, at most every second).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

_logger = logging.getLogger(__name__)

SEGMENT_BYTES, MAX_BYTES, FSYNC_INTERVAL_S = 4 * 2**20, 2**30, 1.0
_HEADER = struct.Struct("<II")  # length and crc32 of what follows


class Outgoing(NamedTuple):
    """A record on its way to Kafka."""

    topic: str
    key: bytes
    value: bytes


class Spool:
    """A queue of `Outgoing` records on disk. Not thread-safe.

    Args:
        root: Folder that the spools of all owners share.
        owner: Client id; what an earlier process of this owner left is kept, in front.
        max_bytes: Appends beyond it are refused.
        clock_s: Monotonic clock.
    """

    def __init__(self, root: Path, owner: str, *, max_bytes: int = MAX_BYTES, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._root, self._max_bytes, self._clock_s = root, max_bytes, clock_s
        self._folder, self._lock = _own(root, re.sub(r"[^A-Za-z0-9._-]", "_", owner))
        self._segments = sorted(self._folder.glob("*.spool"))
        self._adopt()
        self._num_bytes = sum(path.stat().st_size for path in self._segments)
        self._file: IO[bytes] | None = None  # open end of the last segment
        self._synced_s = clock_s()

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._segments

    def append(self, records: Sequence[Outgoing]) -> int:
        """Add records at the end; returns how many were taken (the rest did not fit).

        Raises:
            OSError: the disk refused.
        """
        try:
            taken = self._write(records)
            if self._file is not None:
                self._file.flush()
                if (now := self._clock_s()) - self._synced_s >= FSYNC_INTERVAL_S:
                    os.fsync(self._file.fileno())
                    self._synced_s = now
            return taken
        except OSError:
            broken, self._file = self._file, None  # its end may be half a record: what comes next goes to a new segment
            if broken is not None:
                with contextlib.suppress(OSError):
                    broken.close()
            raise

    def oldest(self) -> list[Outgoing]:
        """Records of the oldest segment, which gets no more of them; `drop` removes it."""
        if len(self._segments) == 1 and self._file is not None:
            self._close_file()
        return _read(self._segments[0])

    def drop(self) -> None:
        """Remove the oldest segment: all of it is acknowledged."""
        path = self._segments.pop(0)
        self._num_bytes -= path.stat().st_size
        path.unlink()

    def close(self) -> None:
        """Sync and let go; an empty spool leaves no folder."""
        self._close_file()
        if self.empty:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _write(self, records: Sequence[Outgoing]) -> int:
        for taken, record in enumerate(records):
            payload = msgspec.msgpack.encode(record)
            if self._num_bytes + len(payload) > self._max_bytes:
                return taken
            if self._file is None or self._file.tell() >= SEGMENT_BYTES:
                self._next_segment()
            assert self._file is not None
            self._num_bytes += self._file.write(_HEADER.pack(len(payload), zlib.crc32(payload)) + payload)
        return len(records)

    def _next_segment(self) -> None:
        self._close_file()
        number = int(self._segments[-1].stem) + 1 if self._segments else 1
        path = self._folder / f"{number:08d}.spool"
        self._file = path.open("ab")
        self._segments.append(path)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _adopt(self) -> None:
        """Take over the segments of owners that are dead: a new replica has a new id, and nobody else would send them."""
        for folder in sorted(self._root.iterdir()):
            if folder == self._folder or not folder.is_dir() or (lock := _try_lock(folder)) is None:
                continue
            for path in sorted(folder.glob("*.spool")):
                number = int(self._segments[-1].stem) + 1 if self._segments else 1
                self._segments.append(path.rename(self._folder / f"{number:08d}.spool"))
            _logger.info("spool adopted from=%s", folder.name)
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _own(root: Path, owner: str) -> tuple[Path, IO[bytes]]:
    number = 0
    while True:
        folder = root / (f"{owner}-{number}" if number else owner)
        folder.mkdir(parents=True, exist_ok=True)
        if (lock := _try_lock(folder)) is not None:
            return folder, lock
        number += 1  # a live process has this client id too


def _try_lock(folder: Path) -> IO[bytes] | None:
    """The held lock of a folder, or None when a live process has it or the folder is being removed."""
    path = folder / "lock"
    try:
        file = path.open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.fstat(file.fileno()).st_ino == path.stat().st_ino  # else somebody removed it in between
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if ours:
        return file
    file.close()
    return None


def _read(path: Path) -> list[Outgoing]:
    """Whole records; a crash of the machine may have cut off what was not synced yet."""
    content, start, records = path.read_bytes(), 0, []
    while start + _HEADER.size <= len(content):
        length, checksum = _HEADER.unpack_from(content, start)
        payload = content[start + _HEADER.size : start + _HEADER.size + length]
        if len(payload) != length or zlib.crc32(payload) != checksum:
            break
        records.append(msgspec.msgpack.decode(payload, type=Outgoing))
        start += _HEADER.size + length
    if start < len(content):
        _logger.warning("spool segment damaged file=%s read=%d lost_bytes=%d", path, len(records), len(content) - start)
    return records
