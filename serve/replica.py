"""What one replica does between HTTP, the policy store and Kafka; a plain class that runs without Ray Serve in a test.

Delivery: a reply does not wait for Kafka. The producer holds a decision in memory until it is acknowledged, and on disk while Kafka is
down. The store may be away at any time: at the start its files are read instead, later the replica serves what it has and asks again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import ray.exceptions

from esrl_ray.config import Config
from esrl_ray.errors import LoopError, PolicyRejected, RequestError
from esrl_ray.policy.store import PolicySnapshot, read_snapshot
from esrl_ray.secret import signed
from esrl_ray.telemetry import Telemetry, log_change
from serve.fuser import Served, decide
from serve.schemas import FuseReply, PolicyReply, SwapTime, parse
from streaming.wire import Decision

STORE_AWAY = (ray.exceptions.RayError, OSError, ValueError, PolicyRejected)
"""What a call to a store raises that is being restarted, is gone, or cannot read its folder."""
START_S, POLL_S, STATUS_S = 30.0, 20.0, 1.0
RETRY_S, MAX_RETRY_S = 0.05, 2.0
SWAPS_SHOWN, SWAPS_KEPT = 200, 10_000
WARM_PAIRS = 50

_logger = logging.getLogger(__name__)


class Store(Protocol):
    """The policy store as a replica sees it: `PolicyStoreActor`, here or in another process."""

    async def snapshot(self) -> PolicySnapshot:
        """What serves now."""

    async def wait_newer(self, have: int, timeout_s: float) -> PolicySnapshot | None:
        """The snapshot after sequence `have`; None when there was none in time."""


class Producer(Protocol):
    """Where decisions go: `streaming.producer.EventProducer`."""

    acked: Counter[str]
    spooled: int
    failed: int

    def send(self, event: Decision) -> None:
        """Never waits for Kafka."""

    def close(self, *, timeout_s: float) -> None:
        """Flush, then keep the rest on disk."""


class ReplicaStatus(msgspec.Struct, frozen=True):
    """What one replica has done: the file `<run>/serve/<replica>.json`, written every second and at the end."""

    replica: str
    pid: int
    updated_ms: int
    closed: bool  # it ended in order; else its last second may be missing here
    version: int
    decisions: int  # replies with a decision
    refused: int  # requests answered with 422
    acked: dict[str, int]  # events that Kafka acknowledged, by topic
    spooled: int
    failed: int
    swaps: list[SwapTime]


class Replica:
    """Serves one policy at a time and swaps it by one rebinding.

    Args:
        config: Of the deployment.
        name: Of this replica.
        store: Of policies.
        producer: Of decisions.
        clock_ms: Wall clock.
        new_id: Mints decision ids.
        telemetry: Metrics of this process, or None.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        *,
        store: Store,
        producer: Producer,
        clock_ms: Callable[[], int],
        new_id: Callable[[], str],
        telemetry: Telemetry | None,
    ) -> None:
        self.config, self.name, self.spec = config, name, config.spec.build()
        self._store, self._producer, self._clock_ms, self._new_id, self._telemetry = store, producer, clock_ms, new_id, telemetry
        self._served: Served | None = None
        self._have = -1  # sequence of the newest snapshot that was looked at
        self._since_ms = 0
        self._swaps: deque[SwapTime] = deque(maxlen=SWAPS_KEPT)
        self._decisions = self._refused = 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def version(self) -> int:
        """The version that serves."""
        return self.served.current.version

    @property
    def served(self) -> Served:
        """What serves now."""
        assert self._served is not None, "start first"
        return self._served

    async def start(self, *, timeout_s: float = START_S) -> None:
        """Load the policy from the store, or from its files when it does not answer; then follow the store.

        Raises:
            PolicyRejected: neither has a whole policy of this spec.
        """
        try:
            snapshot = await asyncio.wait_for(self._store.snapshot(), timeout_s)
        except STORE_AWAY as error:
            _logger.warning("the policy store does not answer, reading its files: %s", _first_line(error))
            snapshot = read_snapshot(self.config.run.path / "policies")
        self._swap(snapshot, await asyncio.to_thread(self._prepare, snapshot))
        self._tasks = [
            asyncio.create_task(self._follow(), name="following the policy store"),
            asyncio.create_task(self._report(), name="reporting"),
        ]

    def check(self) -> None:
        """Raise LoopError when following or reporting has ended: Serve then replaces this replica."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                raise LoopError(f"{task.get_name()} ended: {task.exception()!r}", f"replica {self.name}")

    async def stop(self, *, timeout_s: float = 10.0) -> None:
        """Stop following, flush the producer, write the last status."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # `check` has told why one ended before
        await asyncio.to_thread(self._producer.close, timeout_s=timeout_s)
        self._write_status(closed=True)

    def fuse(self, body: bytes) -> FuseReply:
        """Answer one request and send its decision on its way.

        Raises:
            RequestError: malformed; nothing was sent.
        """
        served = self.served
        try:
            parsed = parse(body, self.spec, self.config)
        except RequestError:
            self._refused += 1
            raise
        decision_id = signed(self._new_id(), parsed.request.session_id, self.config.serve.decision_keys)
        reply, decision = decide(parsed, served, self.config, decision_id=decision_id, now_ms=self._clock_ms())
        self._producer.send(decision)
        self._decisions += 1
        return reply

    def policy(self) -> PolicyReply:
        """What serves now, and since when."""
        served = self.served
        return PolicyReply(
            version=served.current.version,
            digest=served.current.manifest.digest,
            kind=served.current.manifest.kind.value,
            round=served.round.number,
            anchor_version=served.round.anchor_version,
            pinned=served.pinned,
            published_ms=served.published_ms,
            swapped_ms=self._since_ms,
            replica=self.name,
            swaps=list(self._swaps)[-SWAPS_SHOWN:],
        )

    def status(self, *, closed: bool = False) -> ReplicaStatus:
        """What this replica has done so far."""
        producer = self._producer
        return ReplicaStatus(
            replica=self.name,
            pid=os.getpid(),
            updated_ms=self._clock_ms(),
            closed=closed,
            version=self.version,
            decisions=self._decisions,
            refused=self._refused,
            acked=dict(producer.acked),
            spooled=producer.spooled,
            failed=producer.failed,
            swaps=list(self._swaps),
        )

    def _prepare(self, snapshot: PolicySnapshot) -> Served:
        """Build the new policies beside the old ones and run them once."""
        served = Served.decode(snapshot)
        if served.spec != self.spec:
            raise PolicyRejected(
                f"spec {served.spec.digest} differs from this deployment's {self.spec.digest}", f"policy {served.current.version}"
            )
        served.warm(WARM_PAIRS)
        return served

    def _swap(self, snapshot: PolicySnapshot, served: Served) -> None:
        old, new = self._served, served.current.version
        self._have = max(self._have, snapshot.sequence)
        if old is not None and (new, served.sequence) < (old.current.version, old.sequence):
            raise PolicyRejected(f"version {new} after {old.current.version}", f"replica {self.name}")
        self._served = served  # requests in flight keep the old object
        if old is not None and old.current.version == new:
            return
        self._since_ms = now_ms = self._clock_ms()
        log_change(_logger, "policy swapped", {"version": new, "round": served.round.number, "pinned": served.pinned, "replica": self.name})
        if self._telemetry is not None:
            self._telemetry.gauge("esrl_policy_served_version", new, replica=self.name)
        if old is None:
            return  # the first one is no swap: it may have been published long before this replica was there
        self._swaps.append(SwapTime(new, served.published_ms, now_ms))
        if self._telemetry is not None:
            self._telemetry.observe("esrl_policy_swap_seconds", max(0, now_ms - served.published_ms) / 1e3)

    async def _follow(self) -> None:
        """Long-poll the store for ever; while it is away, keep serving."""
        retry_s = RETRY_S
        while True:
            try:
                snapshot = await asyncio.wait_for(self._store.wait_newer(self._have, POLL_S), POLL_S + 5.0)
            except STORE_AWAY as error:
                if retry_s == RETRY_S:
                    _logger.warning("the policy store does not answer, still serving version %d: %s", self.version, _first_line(error))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, MAX_RETRY_S)
                continue
            retry_s = RETRY_S
            if snapshot is None:
                continue
            self._have = max(self._have, snapshot.sequence)
            try:
                self._swap(snapshot, await asyncio.to_thread(self._prepare, snapshot))
            except PolicyRejected as error:
                _logger.error("refused, still serving version %d: %s", self.version, error)

    async def _report(self) -> None:
        """Write the status file every second."""
        spooled = 0
        while True:
            await asyncio.sleep(STATUS_S)
            self._write_status(closed=False)
            if self._telemetry is not None:
                self._telemetry.count("esrl_decision_spooled_total", self._producer.spooled - spooled)
                spooled = self._producer.spooled

    def _write_status(self, *, closed: bool) -> None:
        folder = self.config.run.path / "serve"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{self.name}.json"
            temporary.write_bytes(msgspec.json.encode(self.status(closed=closed)))
            temporary.rename(folder / f"{self.name}.json")
        except OSError as error:
            _logger.warning("cannot write the status file: %s", error)


def read_statuses(run: Path) -> list[ReplicaStatus]:
    """Status of every replica that the run ever had, by its file."""
    return [msgspec.json.decode(path.read_bytes(), type=ReplicaStatus) for path in sorted((run / "serve").glob("[!.]*.json"))]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
