"""The policy store as a detached actor: the plain store behind async methods, with a long-poll for replicas."""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from esrl_ray.config import Config
from esrl_ray.errors import PolicyRejected
from esrl_ray.evaluation.second_tier import SecondTierVerdict
from esrl_ray.policy.policy import Manifest
from esrl_ray.policy.store import PolicySnapshot, PolicyStore
from esrl_ray.vocabulary import Round, TransitionBatch

LOCK_FILE = ".lock"


def wall_clock_ms() -> int:
    """Wall clock in epoch milliseconds: this actor is a composition root."""
    return time.time_ns() // 1_000_000


@contextmanager
def own(folder: Path, *, wait_s: float = 0.0, address: str = "") -> Iterator[bool]:
    """Own a policy folder inside the block, if nobody else does. The lock dies with its process, also by kill -9.

    Args:
        folder: Of the policies; made when it is not there.
        wait_s: How long to wait for another owner to end.
        address: Where the owner can be reached, for `owner_address`.

    Yields:
        Whether this process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (folder / LOCK_FILE).open("a", encoding="utf-8") as lock:
        while not (owned := _lock(lock)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if owned:
            lock.truncate(0)
            lock.write(address)
            lock.flush()
        yield owned


def owner_address(folder: Path) -> str:
    """Where the process that owns a folder said that it can be reached; empty when it did not say."""
    return (folder / LOCK_FILE).read_text(encoding="utf-8")


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class PolicyStoreActor:
    """Async shell around `PolicyStore`: one call at a time changes it, any number wait for news.

    Its methods do their file work in the event loop (a publish takes some milliseconds), which is what keeps changes in order. A
    restarted actor waits for the dead one's lock, then reads everything from the files.

    Args:
        folder: Of the policies.
        config: Of the deployment.
        clock_ms: Wall clock.
        address: Of the Ray cluster that it runs in.

    Raises:
        PolicyRejected: another process owns the folder and does not end, or see `PolicyStore`.
    """

    OWN_WAIT_S = 20.0

    def __init__(self, folder: Path, config: Config, clock_ms: Callable[[], int] = wall_clock_ms, address: str = "") -> None:
        self._owned = own(folder, wait_s=self.OWN_WAIT_S, address=address)
        if not self._owned.__enter__():
            raise PolicyRejected("another process owns this policy store", str(folder), "end it, or use another run.dir")
        self._folder = folder
        self._store = PolicyStore(folder, config, clock_ms=clock_ms)
        self._changed = asyncio.Condition()

    async def publish(self, blob: bytes, probe: TransitionBatch | None) -> int:
        """See `PolicyStore.publish`."""
        version = self._store.publish(blob, probe)
        await self._tell()
        return version

    async def start_round(self, turn: Round) -> None:
        """See `PolicyStore.start_round`."""
        self._store.start_round(turn)
        await self._tell()

    async def keep_verdict(self, version: int, verdict: SecondTierVerdict) -> None:
        """See `PolicyStore.keep_verdict`."""
        self._store.keep_verdict(version, verdict)

    async def rollback(self, version: int) -> int:
        """See `PolicyStore.rollback`."""
        new = self._store.rollback(version)
        await self._tell()
        return new

    async def pin(self, version: int | Literal["static"]) -> int:
        """See `PolicyStore.pin`."""
        new = self._store.pin(version)
        await self._tell()
        return new

    async def unpin(self) -> None:
        """See `PolicyStore.unpin`."""
        self._store.unpin()
        await self._tell()

    async def snapshot(self) -> PolicySnapshot:
        """What serves now."""
        return self._store.snapshot()

    async def manifests(self) -> list[Manifest]:
        """Manifests of all whole versions, oldest first."""
        return self._store.manifests()

    async def published_ms(self) -> dict[int, int]:
        """See `PolicyStore.published_ms`."""
        return self._store.published_ms()

    async def folder(self) -> Path:
        """The folder that it owns."""
        return self._folder

    async def load_bytes(self, version: int) -> bytes:
        """`Policy.to_bytes` of one version."""
        return self._store.load(version).to_bytes()

    async def wait_newer(self, have: int, timeout_s: float) -> PolicySnapshot | None:
        """Wait for a snapshot with a sequence above `have`.

        Returns:
            At once when there is one; None when `timeout_s` passed without.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._store.current.sequence > have)
        except TimeoutError:
            return None
        return self._store.snapshot()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
