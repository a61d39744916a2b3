"""The RLlib Algorithm: env-less, fed by replay shards. Facts of RLlib 2.60 that this file depends on:

- `_is_online = False` (as MARWIL sets it) without an `input_` builds neither EnvRunners nor OfflineData; it is private, hence the pin.
- Without EnvRunners the stock `restore_from_path` and `set_state` raise AttributeError: both are overridden.
- `LearnerGroup.update(batch_refs=...)` takes exactly one reference per learner, each to a MultiAgentBatch.
- `training_step` returns None; results come from `self.metrics`.
- A dead learner is never restarted: the error surfaces from `train()`, or calls return fewer results than there are learners.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self, TypeVar

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core import COMPONENT_LEARNER_GROUP, COMPONENT_METRICS_LOGGER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import LEARNER_RESULTS, TIMERS
from ray.tune.result import TRAINING_ITERATION

from esrl_ray.algo.update import UpdateResult
from esrl_ray.config import Config
from esrl_ray.errors import LearnersLost, LoopError
from esrl_ray.learning.feed import BatchFeed
from esrl_ray.learning.learner import GRADIENT_STEPS, EnhancedRLLearner
from esrl_ray.learning.module import DEPLOYMENT, EnhancedRLModule
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.vocabulary import Floats, Lineage

T = TypeVar("T")

CPU_SHARE = 0.01
"""CPUs that a remote learner reserves: a reservation of whole ones would keep the loop from starting on a small machine."""

CALLS_PER_ITERATION = 4
"""Learner calls in one `train()`: its bookkeeping costs about 3 ms."""

WAIT_S = 0.5
"""`train()` returns without an update when the shards give nothing for this long."""


class EnhancedRLConfig(AlgorithmConfig):  # type: ignore[misc]  # RLlib is untyped
    """RLlib's configuration of `EnhancedRL`; everything is derived from the deployment's `Config`."""

    deployment: Config

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or EnhancedRL)
        self._is_online = False
        self.num_env_runners = 0
        self.torch_skip_nan_gradients = True  # RLlib's own check waits for the device twice per parameter
        self.min_time_s_per_iteration = 0
        self.deployment = Config()

    def training(self, *, deployment: Config = NotProvided, **kwargs: Any) -> Self:
        """Set the deployment; secrets are taken out, because RLlib pickles its configuration into checkpoints."""
        super().training(**kwargs)
        if deployment is not NotProvided:
            kafka = deployment.kafka.model_copy(update={"sasl_password": None})
            serve = deployment.serve.model_copy(update={"bearer_token": None})
            self.deployment = deployment.model_copy(update={"kafka": kafka, "serve": serve})
            learner, spec = deployment.learner, deployment.spec.build()
            self.gamma = learner.gamma
            self.train_batch_size_per_learner = learner.batch_size * learner.updates_per_call
            self.learners(num_learners=learner.num_learners, num_cpus_per_learner=CPU_SHARE, num_gpus_per_learner=int(_has_gpu(deployment)))
            self.environment(
                observation_space=gym.spaces.Box(-np.inf, np.inf, (spec.num_features + spec.num_scores,), np.float32),
                action_space=gym.spaces.Box(-1.0, 1.0, (spec.num_actions,), np.float32),
            )
        return self

    def get_default_learner_class(self) -> type[Learner]:
        """The fused learner."""
        return EnhancedRLLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The networks of the deployment."""
        return RLModuleSpec(module_class=EnhancedRLModule, model_config={DEPLOYMENT: self.deployment})


class EnhancedRL(Algorithm):  # type: ignore[misc]  # RLlib is untyped
    """EnhancedRL on RLlib. Call `draw_from` before `train`."""

    lineage: dict[str, int]

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
        """Build the learners."""
        super().setup(config)
        self._feed: BatchFeed | None = None
        self.lineage = {}

    def draw_from(self, shards: Sequence[ActorHandle]) -> None:
        """Take batches from these replay shards. Handles are not part of the configuration: a checkpoint must not hold them."""
        self._feed = BatchFeed(shards, self.config.train_batch_size_per_learner, max(1, self.config.num_learners))

    def training_step(self) -> None:
        """Some learner calls; `lineage` follows the data that they drew. Returns early when the shards have nothing to give."""
        if self._feed is None:
            raise LoopError("train() without replay shards", "EnhancedRL", "call draw_from(shards) first")
        for _ in range(CALLS_PER_ITERATION):
            with self.metrics.log_time((TIMERS, "replay_wait")):
                drawn = self._feed.next(WAIT_S)
            if drawn is None:
                return
            self.learn(*drawn)

    def learn(self, lineage: Lineage, refs: list[ray.ObjectRef]) -> None:
        """One learner call on one batch reference per learner."""
        with self.metrics.log_time((TIMERS, "learner_update")):
            results = self.learner_group.update(batch_refs=refs)
        self._all_there(len(results))
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.lineage = {**self.lineage, **lineage}

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
        """RLlib's state and the lineage."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        return {**state, "lineage": self.lineage}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_state`, without the EnvRunners that the stock one asks for."""
        if COMPONENT_LEARNER_GROUP in state:
            self.learner_group.set_state(state[COMPONENT_LEARNER_GROUP])
        if COMPONENT_METRICS_LOGGER in state:
            self.metrics.set_state(state[COMPONENT_METRICS_LOGGER])
        if TRAINING_ITERATION in state:
            self._iteration = state[TRAINING_ITERATION]
        self.lineage = dict(state.get("lineage", {}))

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


def _has_gpu(deployment: Config) -> bool:
    """Whether learners get a GPU: this process's for a local one, the cluster's for remote ones."""
    if deployment.learner.device != "auto":
        return deployment.learner.device.startswith("cuda")
    if deployment.learner.num_learners == 0:
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= deployment.learner.num_learners)
