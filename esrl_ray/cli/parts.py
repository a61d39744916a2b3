"""The parts of a loop as they run inside Ray actors: thin shells that build the plain classes and keep their threads."""

from __future__ import annotations

import functools
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config
from esrl_ray.errors import EsrlError
from esrl_ray.learning.loop import TrainingLoop
from esrl_ray.learning.replay_shard import ReplayShard
from serve.deployment import policy_store
from streaming.deadletter import DeadLetters
from streaming.source import Source
from streaming.steplog import StepLog, read_commits
from streaming.worker import IngestWorker

__all__ = ["policy_store"]

_logger = logging.getLogger(__name__)


def log_root(config: Config) -> Path:
    """Folder of the step logs of this spec."""
    return config.run.path / "log" / config.spec.build().digest


def worker_names(config: Config) -> list[str]:
    """Names of the ingest workers; worker i owns the partitions p with p % num_workers == i."""
    return [f"ingest-{i}" for i in range(config.ingest.num_workers)]


def _commits_after(root: str, worker: str, after: int) -> Iterator[tuple[int, pa.Table]]:
    return read_commits(root, worker, after=after)


def replay_shards(config: Config) -> list[ActorHandle]:
    """The detached replay shards, made by whoever comes first; shard i is fed by the workers j with j % num_shards == i."""
    root, count = str(log_root(config)), config.replay.num_shards
    return [
        actors.spawn(
            f"replay-{i}",
            ReplayShard,
            config,
            config.learner.seed + i,
            functools.partial(_commits_after, root),
            clock_ms,
            worker_names(config)[i::count],
            detached=True,
        )
        for i in range(count)
    ]


class Publisher:
    """Hands committed rows to a replay shard without waiting for it.

    A call that fails or is dropped leaves a gap in the shard's commits, which it closes from the log at the next one. So the step log is
    never held up: at most `MAX_WAITING` calls are under way, and one is waited for at most `WAIT_S`.
    """

    MAX_WAITING, WAIT_S = 4, 2.0

    def __init__(self, shard: ActorHandle) -> None:
        self._shard = shard
        self._waiting: deque[ray.ObjectRef] = deque()

    def __call__(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        self._waiting.append(self._shard.apply.remote(worker, commit, rows, committed_ms))
        while len(self._waiting) > self.MAX_WAITING:
            ref = self._waiting.popleft()
            try:
                ray.get(ref, timeout=self.WAIT_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                _logger.warning("replay shard does not answer, it will read the log: %s", str(error).splitlines()[0])


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
        index = worker_names(config).index(worker)
        partitions = range(index, config.kafka.num_partitions, config.ingest.num_workers)
        self._worker = IngestWorker(
            config,
            worker,
            partitions,
            log=StepLog(log_root(config), worker, uuid.uuid4().hex, config.spec.build()),
            source_factory=lambda positions: Source(config.kafka, partitions, positions, max_poll_records=config.ingest.max_poll_records),
            dead_letters=DeadLetters(config.kafka),
            publish=[Publisher(shards[index % len(shards)])],
            clock_ms=clock_ms,
        )
        super().__init__(self._worker.run)

    def status(self) -> dict[str, Any]:
        """The worker's status, with the error that ended it."""
        return {**self._worker.status(), "error": self._error, "pid": os.getpid()}

    def drain(self, until: Mapping[str, int], timeout_s: float) -> dict[str, Any]:
        """Stop the loop, read on to the end offsets, close what is open as truncated, commit, publish."""
        self.halt()
        if self._error is None:
            self._worker.drain(until, timeout_s)
        return self.status()


class LearnerPart(Part):
    """The training loop in its actor."""

    def __init__(self, config: Config, store: ActorHandle, shards: Sequence[ActorHandle]) -> None:
        self._loop = training_loop(config, store, shards)
        super().__init__(self._loop.run)

    def status(self) -> dict[str, Any]:
        """The loop's status, with the error that ended it."""
        return {**self._loop.status(), "error": self._error, "pid": os.getpid()}


def training_loop(config: Config, store: ActorHandle, shards: Sequence[ActorHandle]) -> TrainingLoop:
    """The training loop over the given actors, resuming from the run's newest checkpoint."""
    return TrainingLoop(config, store=store, shards=shards, checkpoint_dir=config.run.path / "checkpoints", clock_ms=clock_ms)


def spawn_ingest(config: Config, shards: Sequence[ActorHandle]) -> dict[str, ActorHandle]:
    """The ingest workers' actors by name."""
    return {name: actors.spawn(name, IngestPart, config, name, shards, max_concurrency=4) for name in worker_names(config)}


def spawn_learner(config: Config, store: ActorHandle, shards: Sequence[ActorHandle]) -> ActorHandle:
    """The learner's actor; it takes a GPU when there is one to be had and it computes itself."""
    wants_gpu = config.learner.num_learners == 0 and config.learner.device != "cpu"
    num_gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0)) if wants_gpu else 0
    return actors.spawn("learner", LearnerPart, config, store, shards, max_concurrency=4, num_gpus=num_gpus)
