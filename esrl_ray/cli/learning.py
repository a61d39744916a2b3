"""The learning parts of a loop inside Ray actors: replay shards and the training loop."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.parts import Part
from esrl_ray.config import Config
from esrl_ray.learning.loop import TrainingLoop
from esrl_ray.learning.replay_shard import ReplayShard
from streaming.partitions import commits_of_shard, live_workers
from streaming.recompute import check_rewards
from streaming.steplog import read_newest


def _commits_after(root: str, config: Config, shard: int, worker: str, after: int) -> Iterator[tuple[int, pa.Table]]:
    check_rewards(root, config.reward)
    return commits_of_shard(root, shard, config.replay.num_shards, worker, after)


def replay_shards(config: Config) -> list[ActorHandle]:
    """The detached replay shards, made by whoever comes first; shard i holds the partitions p with p % num_shards == i.

    A shard that was made for another reward or number of shards is ended, and one that refills from the log comes in its place.

    Raises:
        LogError: the rewards in the log are of another reward.
    """
    check_rewards(config.log_root, config.reward)
    return [_shard(config, i) for i in range(config.replay.num_shards)]


def _shard(config: Config, i: int) -> ActorHandle:
    def spawn() -> ActorHandle:
        return actors.spawn(
            f"replay-{i}",
            ReplayShard,
            config,
            config.learner.seed + i,
            functools.partial(_commits_after, config.log_root, config, i),
            clock_ms,
            functools.partial(live_workers, config.log_root),
            detached=True,
        )

    shard = spawn()
    if actors.insist(shard.made_for.remote) != (config.reward.digest, config.replay.num_shards):
        actors.end({f"replay-{i}": shard})
        shard = spawn()
    return shard


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
    return TrainingLoop(
        config,
        store=store,
        shards=shards,
        checkpoint_dir=config.run.path / "checkpoints",
        clock_ms=clock_ms,
        read_newest=functools.partial(read_newest, config.log_root),
    )


def spawn_learner(config: Config, store: ActorHandle, shards: Sequence[ActorHandle]) -> ActorHandle:
    """The learner's actor; it takes a GPU when there is one to be had and it computes itself."""
    wants_gpu = config.learner.num_learners == 0 and config.learner.device != "cpu"
    num_gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0)) if wants_gpu else 0
    return actors.spawn("learner", LearnerPart, config, store, shards, max_concurrency=4, num_gpus=num_gpus)
