"""RLlib's configuration of EnhancedRL. Facts of RLlib 2.60 that this file depends on:

- `_is_online = False` (as MARWIL sets it) builds no EnvRunners, and OfflineData only with an `input_`; it is private, hence the pin.
- Tune turns a configuration into a dict of its attributes, fills in what it searches, and sets them one by one on a fresh one:
  so settings are attributes, and what follows from them is worked out in `validate`, which every Algorithm calls first.
- `seed` would seed the process's global generators: ours goes into the deployment and is taken off the configuration.
"""

from __future__ import annotations

import difflib
from typing import Any, Self

import gymnasium as gym
import numpy as np
import ray
import torch
from pydantic import ValidationError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.search.sample import Domain

from esrl_ray.config import Config, LearnerConfig
from esrl_ray.errors import ConfigError
from esrl_ray.learning.learner import EnhancedRLLearner
from esrl_ray.learning.module import DEPLOYMENT, EnhancedRLModule
from esrl_ray.learning.steps_feed import LoggedSteps

CPU_SHARE = 0.01
"""CPUs that a remote learner reserves: a reservation of whole ones would keep the loop from starting on a small machine."""

SETTINGS = tuple(LearnerConfig.model_fields)
"""Keyword arguments of `training`: the method's own settings."""

STOCK = ("model", "optimizer", "replay_buffer_config")
"""Keyword arguments of the stock `training` that RLlib itself passes on; nothing here reads them."""


class EnhancedRLConfig(AlgorithmConfig):  # type: ignore[misc]  # RLlib is untyped
    """RLlib's configuration of `EnhancedRL`: a deployment's `Config`, and settings that win over it.

    Each field of `LearnerConfig` is an attribute; None means the deployment's, until `validate` fills it in. `learners(num_learners=)` and
    `learners(num_gpus_per_learner=)` win over `learner.num_learners` and `learner.device`. `offline_data(input_=PATH)` learns from Parquet
    files of the step log's schema as `esrl train --log` does: without held-out users, and from the logged anchor on.
    """

    deployment: Config
    num_cpus_per_learner: float | str
    num_gpus_per_learner: float | None

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        from esrl_ray.learning.algorithm import EnhancedRL  # each names the other

        super().__init__(algo_class=algo_class or EnhancedRL)
        self._is_online = False
        self.num_env_runners = 0
        self.torch_skip_nan_gradients = True  # RLlib's own check waits for the device twice per parameter
        self.min_time_s_per_iteration = 0
        self.offline_data_class = LoggedSteps
        self.num_gpus_per_learner = None
        self.deployment = Config()
        for name in SETTINGS:
            setattr(self, name, None)

    def training(self, *, deployment: Config = NotProvided, **settings: Any) -> Self:
        """Set the deployment, and settings of the learner.

        Args:
            deployment: Secrets are taken out, because RLlib pickles its configuration into checkpoints.
            settings: Fields of `LearnerConfig`, e.g. `gamma=0.95`; search spaces of Tune are checked when their trial begins.

        Raises:
            ConfigError: an unknown setting (names the nearest), or a value that is not allowed. Whether values go together is known
                only when the algorithm is built.
        """
        super().training(**{name: settings.pop(name) for name in STOCK if name in settings})
        if deployment is not NotProvided:
            self.deployment = deployment.without_secrets()
        for name in settings:
            if name not in SETTINGS:
                near = difflib.get_close_matches(name, SETTINGS, 1) or [f"none of {', '.join(SETTINGS)}"]
                raise ConfigError(f"unknown setting {name!r}; nearest: {near[0]}", "EnhancedRLConfig.training")
        try:
            LearnerConfig.model_validate({name: value for name, value in settings.items() if not isinstance(value, Domain | dict)})
        except ValidationError as error:
            if any(problem["loc"] for problem in error.errors()):
                raise _config_error(error, "EnhancedRLConfig.training") from error
        for name, value in settings.items():
            setattr(self, name, value)
        return self

    def validate(self) -> None:
        """Put the settings into the deployment, and derive from it what RLlib must know. RLlib calls it before it builds anything.

        Raises:
            ConfigError: values that do not go together.
        """
        chosen = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        sections = {name: getattr(self.deployment.without_secrets(), name) for name in Config.model_fields}
        try:
            learner = LearnerConfig.model_validate(self.deployment.learner.model_dump() | chosen)
            self.deployment = Config.model_validate(sections | {"learner": learner})
        except ValidationError as error:
            raise _config_error(error, "EnhancedRLConfig") from error
        for name in SETTINGS:
            setattr(self, name, getattr(learner, name))
        self.seed = None
        self.train_batch_size_per_learner = learner.batch_size * learner.updates_per_call
        if self.num_cpus_per_learner == "auto":
            self.num_cpus_per_learner = CPU_SHARE
        if self.num_gpus_per_learner is None:
            self.num_gpus_per_learner = int(_has_gpu(self.deployment))
        if (index := _gpu_index(learner.device)) is not None:
            if learner.num_learners > 0 or _in_actor():
                text = f"{learner.device} names one GPU, and Ray deals GPUs to remote learners and to actors (live loop, Tune)"
                raise ConfigError(text, "learner.device", "say cuda; CUDA_VISIBLE_DEVICES, where Ray is started, chooses")
            self.local_gpu_idx = index
        spec = self.deployment.spec.build()
        self.environment(
            observation_space=gym.spaces.Box(-np.inf, np.inf, (spec.num_features + spec.num_scores,), np.float32),
            action_space=gym.spaces.Box(-1.0, 1.0, (spec.num_actions,), np.float32),
        )
        super().validate()

    def get_default_learner_class(self) -> type[Learner]:
        """The fused learner."""
        return EnhancedRLLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The networks of the deployment."""
        return RLModuleSpec(module_class=EnhancedRLModule, model_config={DEPLOYMENT: self.deployment})


def _config_error(error: ValidationError, where: str) -> ConfigError:
    problems = error.errors(include_url=False, include_input=False)
    lines = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" if p["loc"] else p["msg"].removeprefix("Value error, ") for p in problems]
    return ConfigError("; ".join(lines), where)


def _gpu_index(device: str) -> int | None:
    """Of `cuda:1`; None where no one GPU is named."""
    return torch.device(device).index if device.startswith("cuda") else None


def _in_actor() -> bool:
    """Whether RLlib's local learner would take the GPU that Ray dealt to this process, whatever `local_gpu_idx` says."""
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def _has_gpu(deployment: Config) -> bool:
    """Whether learners get a GPU: this process's for a local one, the cluster's for remote ones."""
    if deployment.learner.device != "auto":
        return deployment.learner.device.startswith("cuda")
    if deployment.learner.num_learners == 0:
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= deployment.learner.num_learners)
