"""The parts as the Ray actors of a deployment, with Ray's own restarts; the training loop can be one of them."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any

import psutil
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.cli import learning, parts
from esrl_ray.cli.chaos.fleet import START_S
from esrl_ray.cli.chaos.ingest_part import ChaosIngestPart
from esrl_ray.cli.chaos.shard_part import ChaosReplayShard
from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config
from esrl_ray.errors import LoopError
from streaming.partitions import commits_of_shard, live_workers

LEARNER = "learner"


class ActorFleet:
    """Starts, asks and watches the actors of one run; Ray must be running.

    Args:
        config: Deployment; `run.dir` is the run's.
        folder: For orders to workers.
        with_learner: Whether a training loop draws from the shards and publishes policies.
    """

    restarts_itself = True

    def __init__(self, config: Config, folder: Path, *, with_learner: bool) -> None:
        logging.getLogger(actors.__name__).setLevel(logging.ERROR)  # that a part does not answer is what is wanted here
        self.config, self.folder = config, folder
        self.workers = parts.worker_names(config)
        self.shards = [f"replay-{i}" for i in range(config.replay.num_shards)]
        self.others = [LEARNER] if with_learner else []
        self._handles: dict[str, ActorHandle] = {}
        self._pids: dict[str, int] = {}

    def start(self, name: str) -> None:
        """Make the actor, or wait until Ray has started it again.

        Raises:
            LoopError: it does not come, or it ended with an error.
        """
        dead = self._pids.get(name)
        if name not in self._handles:
            self._handles[name] = self._spawn(name)
        deadline = time.monotonic() + START_S
        while (status := self.status(name)) is None or status["pid"] == dead:
            if time.monotonic() > deadline:
                raise LoopError(f"{name} does not come up within {START_S:.0f} s")
            time.sleep(0.1)
        self._pids[name] = status["pid"]

    def _spawn(self, name: str) -> ActorHandle:
        config, shards = self.config, [self._handles[shard] for shard in self.shards if shard in self._handles]
        if name == LEARNER:
            from serve.deployment import policy_store  # Serve and torch, for this part alone

            return learning.spawn_learner(config, policy_store(config), shards)
        if name not in self.shards:
            return actors.spawn(name, ChaosIngestPart, config, name, shards, self.folder, max_concurrency=4)
        index = self.shards.index(name)
        read_log = functools.partial(commits_of_shard, config.log_root, index, len(self.shards))
        workers = functools.partial(live_workers, config.log_root)
        return actors.spawn(name, ChaosReplayShard, config, config.learner.seed + index, read_log, clock_ms, workers)

    def deal(self, num_workers: int) -> None:
        """Kill all workers for good and start another number of them, as a start of `esrl ingest` does."""
        actors.end({name: self._handles[name] for name in self.workers})
        deadline = time.monotonic() + START_S
        while not all(self.wait_dead(name, 1.0) for name in self.workers) or actors.present(self.workers):
            if time.monotonic() > deadline:  # a new one would be given the handle of the old
                raise LoopError(f"the workers do not end within {START_S:.0f} s")
            time.sleep(0.1)
        self.config = self.config.model_copy(update={"ingest": self.config.ingest.model_copy(update={"num_workers": num_workers})})
        parts.deal(self.config, [self._handles[shard] for shard in self.shards])
        workers = parts.worker_names(self.config)
        for name in workers:
            self._handles[name] = self._spawn(name)
            self.start(name)
        self.workers = workers  # as a whole: another thread looks at it

    def status(self, name: str) -> dict[str, Any] | None:
        """Of one part; None while it does not answer.

        Raises:
            LoopError: it ended with an error that it does not come back from.
        """
        status: dict[str, Any] | None = actors.ask(self._handles[name].status.remote)
        if status is not None and status.get("error"):
            raise LoopError(f"{name} ended: {status['error']}")
        return status

    def pid(self, name: str) -> int:
        """Process id when it last started."""
        return self._pids[name]

    def wait_dead(self, name: str, timeout_s: float) -> bool:
        """Wait until the process has ended."""
        try:
            psutil.Process(self._pids[name]).wait(timeout_s)
        except psutil.TimeoutExpired:
            return False
        except psutil.NoSuchProcess:
            return True
        return True

    def ask(self, name: str, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of a part, again while it is being restarted."""
        return actors.insist(getattr(self._handles[name], method).remote, *args, timeout_s=timeout_s)

    def end(self) -> None:
        """End all actors for good."""
        actors.end(self._handles)
