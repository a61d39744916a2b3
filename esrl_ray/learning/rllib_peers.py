"""SAC, CQL and IQL as RLlib ships them, on logged requests: RLlib's networks, losses and optimisers; ours are input and conversion.

Facts of RLlib 2.60 that this file depends on:

- SAC's training step needs an environment to step. CQL is derived from SAC and reads offline input; `sac` is RLlib's CQL algorithm with
  SAC's own RLModule and SAC's own learner (public settings), so that loss, networks and optimisers are SAC's to the letter.
- An algorithm with `_is_online` builds EnvRunners, which need an environment. MARWIL (IQL's parent) unsets it, CQL forgets to; it is
  private, hence the pin.
- Targets follow once per learner call, not once per gradient step: tau is compounded over the call's steps.
- CQL's `bc_iters` is compared with gradient steps of the present learner call, because the counter is reduced after each: any value
  from `UPDATES_PER_CALL` on means behaviour cloning for ever. It is 0 here.
- `TorchSquashedGaussian.to_deterministic()` gives the mean before tanh (ray-project/ray#51544), which is not an action that the
  critics were trained with. All three have that distribution; the converted policy is tanh(mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.cql import CQLConfig
from ray.rllib.algorithms.iql import IQLConfig
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.algorithms.sac.torch.sac_torch_learner import SACTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.offline.offline_data import OfflineData

from esrl_ray.algo.actor import Actor
from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.learning.offline_input import LoggedRequests, to_records, write_records
from esrl_ray.methods.method import Exploration
from esrl_ray.methods.request_level import RequestRounds
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.spec import Spec

UPDATES_PER_CALL = 10
"""Gradient steps in one `train()`."""

TAU = 0.005
"""Polyak step of the targets per gradient step, as published for all three."""

CQL_WEIGHT, CQL_ACTIONS = 1.0, 4
"""Weight of the conservative term and sampled actions per state; RLlib's 5 and 10 are for robots' datasets and cost twice the time."""

IQL_EXPECTILE, IQL_BETA = 0.8, 1.0
"""RLlib's expectile; the largest inverse temperature that its MARWIL allows (3 is published, RLlib's default .1 is nearly cloning)."""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """What was tuned, by 20,000 lists in worlds 0 and 3, by hand, no script kept.

    IQL ends at 20.1 and 17.6 (as RLlib ships it 19.3 and 17.2), SAC at 15.5 and 17.3 (14.4 and 11.4). An action moves a list's reward by
    hundredths of it, so that as shipped IQL clones and SAC collects entropy. CQL ends at control with ten times the rewards as well (19.6
    and 17.3), and has RLlib's rates. SAC's actor left its data with the deployment's rate.
    """

    actor_lr: float  # Adam
    critic_lr: float  # Adam, of critics, of SAC's temperature and of IQL's value network
    steps_share: float = 1.0  # gradient steps, as a share of those that the new steps allow
    reward_scale: float = 1.0  # multiplies rewards: RLlib's beta, entropy and conservative weight are in units of them
    initial_alpha: float = 1.0  # of the entropy, SAC and CQL


SETTINGS = {
    "sac": PeerSettings(3e-5, 1e-3, reward_scale=10, initial_alpha=0.1),
    "cql": PeerSettings(1e-4, 1e-3, steps_share=0.5),
    "iql": PeerSettings(3e-4, 1e-3, reward_scale=30),
}
"""A gradient step takes some 13, 33 and 14 ms on one core at batch 128 and 64-64 (seconds over steps of benchmarks/results/methods.md)."""


class RLlibPeer:
    """One of RLlib's algorithms at the level of requests, by rounds or on a log.

    Args:
        name: `sac`, `cql` or `iql`.
        config: Deployment: discount, batch size, hidden sizes, bounds.
        seed: Of parameters and sampling.
        gradient_steps: In each `fit`, rounded up to whole calls of `UPDATES_PER_CALL`; default: `settings.steps_share`, rounded,
            but at least one call: after none the policy would be RLlib's random network.
        settings: Instead of `SETTINGS`.

    Raises:
        MethodError: there is no such algorithm, or the spec has no numeric feature of user or context.
    """

    def __init__(
        self, name: str, config: Config, *, seed: int, gradient_steps: int | None = None, settings: PeerSettings | None = None
    ) -> None:
        if name not in PEERS:
            raise MethodError(f"no RLlib peer {name!r}", "method", f"take one of {', '.join(PEERS)}")
        self.name, self._config, self._gradient_steps, self.settings = name, config, gradient_steps, settings or SETTINGS[name]
        self._rounds = RequestRounds(name, config, seed=seed)
        if not self._rounds.spec.request_inputs:
            raise MethodError(f"{name} sees user and context only, and spec has no numeric feature of either", "spec", "add one")
        self._seed, self._rng = seed, np.random.default_rng(seed)
        self._algorithm: Algorithm | None = None

    def exploration(self) -> Exploration:
        """Uniform within the bounds around the newest policy, one draw per request."""
        return self._rounds.exploration(None)

    def fit(self, steps: Steps) -> Policy:
        """Gradient steps of RLlib on batches of all steps.

        Raises:
            MethodError: no step has a known next list or end.
        """
        requests, allowed = self._rounds.begin(steps, without_next=self._config.replay.sample_without_next)
        requests = replace(requests, rewards=self.settings.reward_scale * requests.rewards)
        if self._gradient_steps is None:
            calls = max(1, round(allowed * self.settings.steps_share / UPDATES_PER_CALL))
        else:
            calls = math.ceil(self._gradient_steps / UPDATES_PER_CALL)
        with TemporaryDirectory(prefix=f"esrl-{self.name}-") as folder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self._rng.integers(2**62)))
            write_records(to_records(requests, steps.sessions, self._rounds.spec), Path(folder))
            if self._algorithm is None:
                self._algorithm = build(self.name, self._config, folder, seed=self._seed, settings=self.settings)
            else:
                self._algorithm.offline_data.read(Path(folder))
            for _ in range(calls):
                self._algorithm.train()
        self._rounds.gradient_steps += calls * UPDATES_PER_CALL
        return self._rounds.publish(self._actor())

    @property
    def algorithm(self) -> Algorithm:
        """RLlib's algorithm.

        Raises:
            MethodError: there was no fit yet.
        """
        if self._algorithm is None:
            raise MethodError(f"{self.name} has no networks before its first fit")
        return self._algorithm

    @property
    def module(self) -> RLModule:
        """RLlib's networks, after a fit."""
        (result,) = self.algorithm.learner_group.foreach_learner(lambda learner: learner.module[DEFAULT_MODULE_ID].unwrapped())
        return result.get()

    def _actor(self) -> Actor:
        learner = self._config.learner
        return to_actor(self.module, self._rounds.spec, learner.hidden_sizes, learner.embedding_size)


def to_actor(module: RLModule, spec: Spec, hidden_sizes: Sequence[int], embedding_size: int) -> Actor:
    """The mean of RLlib's squashed Gaussian policy as our actor, exactly: `mu(s) = tanh(loc(s))`.

    RLlib's encoder is Linear and ReLU, its head Linear to (loc, log std): the actor takes the first half. Embedded codes, which RLlib's
    networks do not see, get weight 0.

    Args:
        module: Trained with an observation of `spec.request_inputs`.
        spec: Widths.
        hidden_sizes: Of the encoder.
        embedding_size: Width of the actor's embeddings.
    """
    actor = Actor(spec, hidden_sizes, embedding_size, level="request")
    trained = [layer for part in (module.pi_encoder, module.pi) for layer in part.modules() if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for ours, theirs in zip(actor.layers, trained, strict=True):
            assert isinstance(ours, torch.nn.Linear)
            ours.weight.zero_()
            ours.weight[:, : theirs.in_features] = theirs.weight[: ours.out_features]
            ours.bias[:] = theirs.bias[: ours.out_features]
    return actor


def build(
    name: str, config: Config, folder: str, *, seed: int, settings: PeerSettings, source: type[OfflineData] = LoggedRequests
) -> Algorithm:
    """One of RLlib's algorithms that reads a folder of records; it needs no running Ray, unless `source` is RLlib's own `OfflineData`."""
    learner, spec = config.learner, config.spec.build()
    rllib: AlgorithmConfig = PEERS[name](settings)
    rllib._is_online = False
    rllib.environment(
        observation_space=gym.spaces.Box(-np.inf, np.inf, (len(spec.request_inputs),), np.float32),
        action_space=gym.spaces.Box(-1.0, 1.0, (spec.num_actions,), np.float32),
    )
    rllib.training(gamma=learner.gamma, lr=None, train_batch_size_per_learner=learner.batch_size, tau=1 - (1 - TAU) ** UPDATES_PER_CALL)
    rllib.training(actor_lr=settings.actor_lr, critic_lr=settings.critic_lr)
    rllib.rl_module(
        model_config=DefaultModelConfig(
            fcnet_hiddens=list(learner.hidden_sizes),
            fcnet_activation="relu",
            head_fcnet_hiddens=[],
            fusionnet_hiddens=[learner.hidden_sizes[-1]],  # behind the two streams of a critic; 256 x 3 by default
            fusionnet_activation="relu",
        )
    )
    rllib.offline_data(input_=folder, offline_data_class=source, dataset_num_iters_per_learner=UPDATES_PER_CALL)
    rllib.learners(num_learners=0, num_gpus_per_learner=0).env_runners(num_env_runners=0)  # with a GPU RLlib asks Ray, and starts it
    rllib.framework("torch", torch_skip_nan_gradients=True).debugging(seed=seed, log_level="ERROR")
    rllib.reporting(min_time_s_per_iteration=0, min_train_timesteps_per_iteration=0, min_sample_timesteps_per_iteration=0)
    return rllib.build_algo()


def _sac(settings: PeerSettings) -> AlgorithmConfig:
    sac = CQLConfig().training(alpha_lr=settings.critic_lr, initial_alpha=settings.initial_alpha).learners(learner_class=SACTorchLearner)
    return sac.rl_module(rl_module_spec=RLModuleSpec(module_class=DefaultSACTorchRLModule))


def _cql(settings: PeerSettings) -> AlgorithmConfig:
    cql = CQLConfig().training(bc_iters=0, min_q_weight=CQL_WEIGHT, num_actions=CQL_ACTIONS)
    return cql.training(alpha_lr=settings.critic_lr, initial_alpha=settings.initial_alpha)


def _iql(settings: PeerSettings) -> AlgorithmConfig:
    return IQLConfig().training(expectile=IQL_EXPECTILE, beta=IQL_BETA, value_lr=settings.critic_lr)


PEERS: dict[str, Callable[[PeerSettings], AlgorithmConfig]] = {"sac": _sac, "cql": _cql, "iql": _iql}
"""What distinguishes them."""
