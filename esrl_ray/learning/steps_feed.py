"""Batches of a log that is in memory: what offline learning draws from instead of replay shards, with and without Ray.

Facts of RLlib 2.60 that this file depends on: with `offline_data(input_=PATH)` an env-less Algorithm makes `offline_data_class(config)`,
which must be a subclass of `OfflineData`, and sets attributes on it; nothing else calls it. The stock one turns rows into Episodes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import ray
from pyarrow import dataset
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.offline.offline_data import OfflineData
from ray.rllib.policy.sample_batch import MultiAgentBatch

from esrl_ray.config import Config
from esrl_ray.errors import InputDataError, MethodError
from esrl_ray.evaluation.second_tier import Rule, held_out_rows
from esrl_ray.learning.feed import to_multi_agent_batch
from esrl_ray.replay.logged import logged_steps
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import TransitionBatch

SCALE_STEPS = 20_000
"""Steps that the normaliser of a log is fitted on, evenly spaced: their columns are copied at once."""


class LoggedSteps(OfflineData):  # type: ignore[misc]  # RLlib is untyped
    """RLlib's offline data of EnhancedRL: a Parquet file, or several, of the step log's schema, as `Steps` in memory.

    Users whom `policy.held_out_share` leaves out of learning are left out, as `esrl train --log` does.

    Args:
        config: With `input_`, a path or a list of paths, and `deployment`.

    Raises:
        InputDataError: no file, one that does not hold steps of this deployment, or one of held-out users alone.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config
        where, share = str(config.input_), config.deployment.policy.held_out_share
        try:
            table = dataset.dataset(config.input_, format="parquet").to_table()
        except (OSError, ValueError) as error:
            raise InputDataError(f"cannot read Parquet: {error}", where, "give files of the step log's schema") from error
        self.steps = logged_steps(table, config.deployment, where)
        if share:
            left = table.filter(pa.array(~held_out_rows(table, rule=Rule(held_out_share=share))))
            if not len(left):
                text = f"of {len(table)} steps none is of a user left to learn from (policy.held_out_share {share:g})"
                raise InputDataError(text, where, "change the share")
            self.steps = logged_steps(left, config.deployment, where)


class StepsFeed:
    """Batches for learner calls, one per learner, drawn uniformly from the steps that can be sampled.

    What call number n draws is a function of seed, n and learner: a run that was interrupted goes on as if it had not been.

    Args:
        steps: The log.
        config: Deployment: seed, batch size, gradient steps per call.
        num_learners: Batches per call, at least 1.
        by_reference: Put batches into Ray's object store, for learners in other processes.

    Attributes:
        call: Number of the next call.
        last: Number of the call after the last one; None = no end.

    Raises:
        MethodError: no step has a known next list or end.
    """

    def __init__(self, steps: Steps, config: Config, num_learners: int, *, by_reference: bool) -> None:
        self._steps, self._config, self._num_learners, self._by_reference = steps, config, num_learners, by_reference
        self._samplable = steps.samplable(without_next=config.replay.sample_without_next)
        if not len(self._samplable):
            raise MethodError(f"none of {len(steps)} steps has a known next list or end", "the log", "give whole sessions")
        self.call = 0
        self.last: int | None = None

    def next(self, wait_s: float) -> tuple[dict[str, int], list[ray.ObjectRef | MultiAgentBatch]] | None:
        """An empty lineage and a batch (or a reference to one) per learner; None after the last call. Never waits."""
        if self.last is not None and self.call >= self.last:
            return None
        batches = [to_multi_agent_batch(self._draw(learner)) for learner in range(self._num_learners)]
        self.call += 1
        return {}, [ray.put(batch) for batch in batches] if self._by_reference else batches

    def spread(self) -> TransitionBatch:
        """Steps from the whole log, `SCALE_STEPS` at most: for the normaliser."""
        count = min(len(self._steps), SCALE_STEPS)
        return self._steps.transitions(np.linspace(0, len(self._steps) - 1, count).astype(np.int64))

    def _draw(self, learner: int) -> TransitionBatch:
        settings = self._config.learner
        rng = np.random.default_rng([settings.seed, self.call, learner])
        numbers = rng.choice(self._samplable, settings.batch_size * settings.updates_per_call)
        return self._steps.transitions(numbers, horizon=settings.num_future)
