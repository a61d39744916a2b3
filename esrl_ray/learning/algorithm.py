"""The RLlib Algorithm: env-less, fed by replay shards or by a log. Facts of RLlib 2.60 that this file depends on:

- Without EnvRunners the stock `restore_from_path`, `set_state` and `get_module` raise AttributeError: all are overridden.
- `LearnerGroup.update(batch_refs=...)` takes exactly one reference per learner, each to a MultiAgentBatch.
- `training_step` returns None; results come from `self.metrics`.
- A dead learner is never restarted: the error surfaces from `train()`, or calls return fewer results than there are learners.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_LEARNER_GROUP, COMPONENT_METRICS_LOGGER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.policy.sample_batch import MultiAgentBatch
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import LEARNER_RESULTS, TIMERS
from ray.tune.result import TRAINING_ITERATION

from esrl_ray.algo.update import UpdateResult
from esrl_ray.config import Config
from esrl_ray.errors import Diverged, LearnersLost, LoopError
from esrl_ray.learning.algorithm_config import EnhancedRLConfig
from esrl_ray.learning.feed import BatchFeed
from esrl_ray.learning.learner import GRADIENT_STEPS, EnhancedRLLearner
from esrl_ray.learning.logged_anchor import logged_anchor
from esrl_ray.learning.module import DEPLOYMENT, EnhancedRLModule
from esrl_ray.learning.rounds import fit_scales
from esrl_ray.learning.steps_feed import LoggedSteps, StepsFeed
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Floats, Lineage

__all__ = ["EnhancedRL", "EnhancedRLConfig", "learner_results"]

T = TypeVar("T")

CALLS_PER_ITERATION = 4
"""Learner calls in one `train()`: its bookkeeping costs about 3 ms."""

WAIT_S = 0.5
"""`train()` returns without an update when the shards give nothing for this long."""


class Feed(Protocol):
    """Where batches come from."""

    def next(self, wait_s: float) -> tuple[Lineage, list[Any]] | None:
        """What can have been drawn from, and one `MultiAgentBatch` or reference to one per learner; None = nothing now."""


class EnhancedRL(Algorithm):  # type: ignore[misc]  # RLlib is untyped
    """EnhancedRL on RLlib. Call `draw_from` or `draw_from_steps` before `train`, unless there is `offline_data(input_=...)`.

    Attributes:
        lineage: {worker: commit} of the data drawn so far.
        num_calls: Learner calls so far.
    """

    lineage: dict[str, int]
    num_calls: int

    @classmethod
    def get_default_config(cls) -> EnhancedRLConfig:
        """A configuration without a deployment."""
        return EnhancedRLConfig()

    @classmethod
    def of(cls, deployment: Config) -> EnhancedRL:
        """Build the algorithm of a deployment; 0.1 s with `num_learners` 0, some seconds with learner actors."""
        algorithm = EnhancedRLConfig().training(deployment=deployment).build_algo()
        assert isinstance(algorithm, EnhancedRL)
        return algorithm

    def setup(self, config: AlgorithmConfig) -> None:
        """Build the learners; with `offline_data(input_=...)` learning begins where the log's newest round was explored around."""
        super().setup(config)
        self._feed: Feed | None = None
        self.lineage, self.num_calls = {}, 0
        if isinstance(self.offline_data, LoggedSteps):
            self.draw_from_steps(self.offline_data.steps)
            if (anchor := logged_anchor(self.offline_data.steps, self.config.deployment)) is not None:
                self.set_anchor(anchor)
                self.start_from_anchor()

    def _setup_logdir(self) -> None:
        """A trial of Tune keeps its folder; else there is none, where the stock one leaves an empty one in the home folder each time."""
        if self._storage:
            super()._setup_logdir()

    def draw_from(self, shards: Sequence[ActorHandle]) -> None:
        """Take batches from these replay shards. Handles are not part of the configuration: a checkpoint must not hold them."""
        self._feed = BatchFeed(shards, self.config.train_batch_size_per_learner, max(1, self.config.num_learners))

    def draw_from_steps(self, steps: Steps, *, num_calls: int | None = None) -> None:
        """Take batches from a log in memory, and fit the scales on it when nothing has been learnt yet.

        Args:
            steps: The log.
            num_calls: Learner calls in all, also those before a checkpoint; `train` makes no more. None = no end.
        """
        count = self.config.num_learners
        feed = StepsFeed(steps, self.config.deployment, max(1, count), by_reference=count > 0)
        feed.call, feed.last = self.num_calls, num_calls
        if self.num_calls == 0:
            self.set_scales(*fit_scales(feed.spread()), fold=False)
        self._feed = feed

    def training_step(self) -> None:
        """Some learner calls; `lineage` follows the data that they drew. Returns early when the shards have nothing to give."""
        if self._feed is None:
            raise LoopError("train() without anything to draw from", "EnhancedRL", "call draw_from(shards) or draw_from_steps(steps) first")
        for _ in range(CALLS_PER_ITERATION):
            with self.metrics.log_time((TIMERS, "replay_wait")):
                drawn = self._feed.next(WAIT_S)
            if drawn is None:
                return
            self.learn(*drawn)

    def learn(self, lineage: Lineage, batches: list[Any]) -> None:
        """One learner call on one batch reference per learner, or on the batch itself for a local one.

        Raises:
            LearnersLost: a learner is gone, or diverged.
        """
        local = isinstance(batches[0], MultiAgentBatch)
        with self.metrics.log_time((TIMERS, "learner_update")):
            try:
                results = self.learner_group.update(**({"batch": batches[0]} if local else {"batch_refs": batches}))
            except RayTaskError as error:
                if isinstance(error.cause, Diverged):
                    raise error.cause from None  # its own text, not Ray's traceback
                raise
        self._all_there(len(results))
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.lineage, self.num_calls = {**self.lineage, **lineage}, self.num_calls + 1

    def each_learner(self, call: Callable[[EnhancedRLLearner], T]) -> list[T]:
        """Call a function on every learner and return the results.

        Raises:
            LearnersLost: a learner is gone.
        """
        results = list(self.learner_group.foreach_learner(call))
        self._all_there(sum(r.ok for r in results))
        return [r.get() for r in results]

    def published(self) -> tuple[dict[str, Floats], Normaliser, int]:
        """The actor's parameters, the normaliser, and the gradient steps behind them."""
        return self.each_learner(_published)[0]

    def get_module(self, module_id: str = DEFAULT_MODULE_ID) -> EnhancedRLModule:
        """A copy of the module's part that decides, as `EnhancedRLModule.from_checkpoint(..., inference_only=True)` reads it."""
        path = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}/{module_id}"
        state = self.learner_group.get_state(components=[path], inference_only=True)
        module = EnhancedRLModule(inference_only=True, model_config={DEPLOYMENT: self.config.deployment})
        module.set_state(state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][module_id])
        return module

    def set_scales(self, normaliser: Normaliser, value_scale: Floats, *, fold: bool) -> None:
        """`Networks.set_scales` on every learner."""
        self.each_learner(lambda learner: learner.learn_state.networks.set_scales(normaliser, value_scale, fold=fold))

    def set_anchor(self, policy: Policy) -> None:
        """Make a policy the anchor on every learner."""
        if policy.manifest.kind is PolicyKind.STATIC:
            action = policy.parameters["action"]
            self.each_learner(lambda learner: learner.learn_state.networks.set_static_anchor(action))
        else:
            parameters, normaliser = dict(policy.parameters), policy.normaliser
            self.each_learner(lambda learner: learner.learn_state.networks.set_anchor(parameters, normaliser))

    def start_from_anchor(self) -> None:
        """`Networks.start_from_anchor` on every learner."""
        self.each_learner(lambda learner: learner.learn_state.networks.start_from_anchor())

    def _all_there(self, num_answers: int) -> None:
        if num_answers < (expected := max(1, self.config.num_learners)):
            raise LearnersLost(f"{num_answers} of {expected} learners answer", "EnhancedRL", "rebuild from the newest checkpoint")

    def get_state(
        self, components: str | Collection[str] | None = None, *, not_components: str | Collection[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state, the lineage and the number of learner calls."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        return {**state, "lineage": self.lineage, "num_calls": self.num_calls}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_state`, without the EnvRunners that the stock one asks for."""
        if COMPONENT_LEARNER_GROUP in state:
            self.learner_group.set_state(state[COMPONENT_LEARNER_GROUP])
        if COMPONENT_METRICS_LOGGER in state:
            self.metrics.set_state(state[COMPONENT_METRICS_LOGGER])
        if TRAINING_ITERATION in state:
            self._iteration = state[TRAINING_ITERATION]
        self.lineage, self.num_calls = dict(state.get("lineage", {})), state.get("num_calls", 0)
        if isinstance(self._feed, StepsFeed):
            self._feed.call = self.num_calls

    def restore_from_path(self, path: str | pathlib.Path, *args: Any, **kwargs: Any) -> None:
        """Restore a checkpoint, without the EnvRunners that the stock one asks for."""
        Checkpointable.restore_from_path(self, path, *args, **kwargs)


def learner_results(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of `UpdateResult` and the gradient steps in what `train()` returned; empty when it made no update.

    Of an iteration without an update RLlib reports every learner metric as NaN (or none, before the first update): the counter tells.
    """
    found = results.get(LEARNER_RESULTS, {}).get(DEFAULT_MODULE_ID, {})
    if math.isnan(found.get(GRADIENT_STEPS, math.nan)):
        return {}
    return {name: float(found[name]) for name in (*UpdateResult._fields, GRADIENT_STEPS)}


def _published(learner: EnhancedRLLearner) -> tuple[dict[str, Floats], Normaliser, int]:
    state = learner.learn_state
    parameters = {name: tensor.cpu().numpy().copy() for name, tensor in state.networks.actor.state_dict().items()}
    return parameters, state.networks.normaliser, state.gradient_steps
