"""Parts of a loop as they run inside Ray actors: thin shells that build the plain classes and keep their threads.

Here is what needs no torch; an actor imports only the module of its class, and torch costs 300 MB in every process.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config
from esrl_ray.errors import EsrlError
from esrl_ray.telemetry import Telemetry
from esrl_ray.vocabulary import Bucket
from streaming.deadletter import DeadLetters
from streaming.partitions import deal_partitions, owners_of, rows_of_shard
from streaming.source import Source
from streaming.steplog import StepLog
from streaming.worker import IngestWorker

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
BEGIN_S = 600.0  # of a worker: it reads its state first
_logger = logging.getLogger(__name__)


def tune_process() -> None:
    """For a process that only ingests: a third of its time goes on Python's and the system's own thresholds.

    It makes no cycles, so they are looked for less often. And it keeps what it frees: a fetch or a commit needs megabytes for a moment,
    which glibc would give back at once, and touching new pages costs more than what is then written there.
    """
    gc.set_threshold(20_000, 20, 20)
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's
        mallopt(_TRIM_THRESHOLD, 256 * 2**20)
        mallopt(_MMAP_THRESHOLD, 64 * 2**20)


def worker_names(config: Config) -> list[str]:
    """Names of the ingest workers, in the order of their numbers."""
    return list(dict.fromkeys(owners_of(config).values()))


class Publisher:
    """Hands committed rows to the replay shard of their partitions without waiting for it.

    A call that fails, or is not made because `MAX_WAITING` are unanswered, leaves a gap in the shard's commits, which it closes from the
    log at the next one. So a shard that stands still neither holds up the step log nor gathers rows in memory.
    """

    MAX_WAITING = 4

    def __init__(self, shard: ActorHandle, number: int = 0, num_shards: int = 1) -> None:
        self._shard, self._number, self._num_shards = shard, number, num_shards
        self._waiting: list[ray.ObjectRef] = []
        self._left_out = 0

    def __call__(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        answered, self._waiting = ray.wait(self._waiting, num_returns=len(self._waiting), timeout=0) if self._waiting else ([], [])
        for ref in answered:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                _logger.warning("replay shard failed, it will read the log: %s", str(error).splitlines()[0])
        if len(self._waiting) < self.MAX_WAITING:
            own = rows_of_shard(rows, self._number, self._num_shards)
            self._waiting.append(self._shard.apply.remote(worker, commit, own, committed_ms))
            if self._left_out:
                _logger.info("replay shard answers again worker=%s commit=%d left_out=%d", worker, commit, self._left_out)
            self._left_out = 0
            return
        if not self._left_out:
            _logger.warning("replay shard does not answer, it will read the log worker=%s commit=%d", worker, commit)
        self._left_out += 1


class Part:
    """A thread that runs one plain part; the actor stays free to answer `status`.

    A known error (`EsrlError`) ends the part and is kept in the status: coming back would not help. Any other exception ends the
    process, so that Ray starts it again and it restores itself.
    """

    def __init__(self, run: Callable[[threading.Event], object]) -> None:
        self._stop = threading.Event()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._guard, args=(run,), daemon=True)
        self._thread.start()

    def _guard(self, run: Callable[[threading.Event], object]) -> None:
        try:
            run(self._stop)
        except EsrlError as error:
            _logger.error("part ended: %s", error)
            self._error = f"{type(error).__name__}: {error}"
        except BaseException:
            _logger.exception("part crashed; its process ends and Ray starts it again")
            os._exit(1)

    def halt(self, timeout_s: float = 60.0) -> None:
        """Ask the thread to end and wait for it."""
        self._stop.set()
        self._thread.join(timeout_s)

    def pid(self) -> int:
        """Process id of the actor."""
        return os.getpid()


class IngestPart(Part):
    """One ingest worker in its actor."""

    def __init__(self, config: Config, worker: str, shards: Sequence[ActorHandle]) -> None:
        tune_process()
        partitions = [p for p, owner in owners_of(config).items() if owner == worker]
        self._worker = IngestWorker(
            config,
            worker,
            partitions,
            log=StepLog(config.log_root, worker, uuid.uuid4().hex, config.spec.build(), config.log),
            source_factory=lambda positions: Source(config.kafka, partitions, positions, max_poll_records=config.ingest.max_poll_records),
            dead_letters=DeadLetters(config.kafka),
            publish=[Publisher(shard, i, len(shards)) for i, shard in enumerate(shards)],
            clock_ms=clock_ms,
        )
        self._released = False
        super().__init__(self._worker.run)
        self._meter = IngestMeter(worker)
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while not self._stop.wait(IngestMeter.EVERY_S):
            self._meter.read(self._worker.status(), now_ms=clock_ms())

    def status(self) -> dict[str, Any]:
        """The worker's status, with the error that ended it."""
        return {**self._worker.status(), "error": self._error, "released": self._released, "pid": os.getpid()}

    def release(self) -> dict[str, Any]:
        """Stop at a commit and give all partitions away; may be called twice.

        Raises:
            StreamError: the worker ended by an error.
        """
        self.halt()
        if not self._released:
            self._worker.release()
            self._released = True
        return self.status()

    def drain(self, until: Mapping[str, int], timeout_s: float) -> dict[str, Any]:
        """Stop the loop, read on to the end offsets, close what is open as truncated, commit, publish."""
        self.halt()
        if self._error is None:
            self._worker.drain(until, timeout_s)
        return self.status()


class IngestMeter:
    """Turns an ingest worker's status into metrics; the worker itself knows nothing of Ray.

    Args:
        worker: Its name, a tag of the metrics.
    """

    EVERY_S = 2.0

    def __init__(self, worker: str) -> None:
        self._worker, self._telemetry = worker, Telemetry()
        self._counted: dict[tuple[str, ...], int] = {}

    def _count(self, name: str, total: int, *, known: int | None = None, **tags: str) -> None:
        """Add what is new since the last time, the first time since `known`; None for totals that survive restarts."""
        key = (name, *tags.values())
        self._telemetry.count(name, total - self._counted.get(key, total if known is None else known), **tags)
        self._counted[key] = total

    def read(self, status: Mapping[str, Any], *, now_ms: int) -> None:
        """Take one status."""
        for topic, buckets in status["ledger"].items():
            for bucket, total in buckets.items():
                if bucket != Bucket.IN_OPEN_SESSION:  # they are not settled yet
                    self._count("esrl_event_settled_total", total, topic=topic, bucket=bucket)
        for topic, refused in status["refusals"].items():
            for code, total in refused.items():
                self._count("esrl_event_refused_total", total, known=0, topic=topic, code=code)
        self._count("esrl_step_closed_total", status["steps_closed"], worker=self._worker)
        self._count("esrl_log_commits_total", status["commit"], worker=self._worker)
        if status["commit_s"] is not None:
            self._telemetry.gauge("esrl_log_commit_seconds", status["commit_s"], worker=self._worker)
        self._telemetry.gauge("esrl_log_tidy_seconds", status["tidy_s"], worker=self._worker)
        for where, lag in status["lag"].items():
            topic, partition = where.rsplit("/", 1)
            self._telemetry.gauge("esrl_kafka_lag_events", lag, topic=topic, partition=partition)
        self._telemetry.gauge("esrl_kafka_lag_age_seconds", (now_ms - status["looked_ms"]) / 1e3, worker=self._worker)
        for partition, watermark_ms in status["watermarks_ms"].items():
            if watermark_ms == 0:
                continue  # no event yet: behind by the age of the epoch
            self._telemetry.gauge("esrl_watermark_behind_seconds", (now_ms - watermark_ms) / 1e3, partition=str(partition))
        for partition, sessions in status["open_sessions"].items():
            self._telemetry.gauge("esrl_session_open_count", sessions, partition=str(partition))
        for delay, total in status["label_delays"].items():
            self._count("esrl_step_label_delay_total", total, known=0, seconds=delay)
        if status["committed_ms"]:
            self._telemetry.gauge("esrl_log_last_commit_seconds", (now_ms - status["committed_ms"]) / 1e3, worker=self._worker)


def deal(config: Config, shards: Sequence[ActorHandle]) -> None:
    """Move partitions to the workers that own them now, and see that the shards know of all before.

    Raises:
        Fenced: workers of another number run still.
    """
    owners = owners_of(config)
    moved = deal_partitions(config.log_root, config.spec.build(), owners, incarnation=uuid.uuid4().hex, committed_ms=clock_ms())
    for p, before in sorted(moved.items()):
        _logger.info("partition moved partition=%d from=%s to=%s", p, before, owners[p])
    for shard in shards:
        actors.insist(shard.catch_up.remote)


def spawn_ingest(config: Config, shards: Sequence[ActorHandle]) -> dict[str, ActorHandle]:
    """The ingest workers' actors by name, each with the partitions that it owns now.

    Raises:
        Fenced: workers of another number run still.
        LoopError: a worker cannot begin.
    """
    deal(config, shards)
    workers = {name: actors.spawn(name, IngestPart, config, name, shards, max_concurrency=4) for name in worker_names(config)}
    for worker in workers.values():  # what it refuses to begin with, such as a log of another reward, is said here and now
        actors.insist(worker.pid.remote, timeout_s=BEGIN_S)
    return workers
