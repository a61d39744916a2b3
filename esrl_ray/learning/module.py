"""The RLModule: a shell around `algo.networks.Networks`, so that RLlib moves, counts and checkpoints what the core made.

Facts of RLlib 2.60 that this file depends on:
- `RLModule.from_checkpoint(path, inference_only=True)` looks the argument up in the constructor's signature: `TorchRLModule` hides it
  behind `**kwargs` and ignores it without a word, hence the explicit constructor.
- `get_state(inference_only=True)` leaves out every key below `get_non_inference_attributes()`; dots reach into sub-modules.
- A module's state is loaded with `strict=False`; only an inference-only module complains of keys that are missing.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule

from esrl_ray.algo.networks import Networks
from esrl_ray.algo.update import make_networks
from esrl_ray.config import Config

DEPLOYMENT = "deployment"
"""Key of the `Config` in `model_config`."""

INFERENCE = ("actor", "mean", "std")
"""What of `Networks` decides: the actor and the normaliser of its input."""


def make_actor_networks(config: Config) -> Networks:
    """`make_networks`, of which only what decides takes memory; the actor is zero, the control policy, until it is loaded."""
    with torch.device("meta"):
        networks = make_networks(config)
    for name in {key.partition(".")[0] for key in networks.state_dict()}.difference(INFERENCE):
        delattr(networks, name)
    networks.to_empty(device="cpu")
    for name, tensor in networks.state_dict().items():
        tensor.fill_(1.0 if name == "std" else 0.0)
    return networks


class EnhancedRLModule(TorchRLModule, InferenceOnlyAPI):  # type: ignore[misc]  # RLlib is untyped
    """All networks of EnhancedRL: actor, critics, targets, anchor, normaliser and value scales are its state.

    Its parameters are those of `make_networks(config)`, seeded by `learner.seed`: each learner builds the same.

    Args:
        observation_space: RLlib's; not used.
        action_space: RLlib's; not used.
        inference_only: Build only what decides (`make_actor_networks`).
        learner_only: RLlib's.
        model_config: {`DEPLOYMENT`: Config}.
        catalog_class: RLlib's; not used.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        *,
        inference_only: bool | None = None,
        learner_only: bool = False,
        model_config: dict[str, Any] | None = None,
        catalog_class: type | None = None,
    ) -> None:
        super().__init__(
            observation_space=observation_space,
            action_space=action_space,
            inference_only=inference_only,
            learner_only=learner_only,
            model_config=model_config,
            catalog_class=catalog_class,
        )

    def setup(self) -> None:
        """Build the networks from the deployment's configuration."""
        deployment = self.model_config[DEPLOYMENT]
        assert isinstance(deployment, Config)
        self.networks = make_actor_networks(deployment) if self.inference_only else make_networks(deployment)

    def get_non_inference_attributes(self) -> list[str]:
        """Everything of `Networks` but `INFERENCE`."""
        names = {key.partition(".")[0] for key in self.networks.state_dict()}
        return sorted(f"networks.{name}" for name in names.difference(INFERENCE))

    def _forward(self, batch: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """mu(s) of raw pairs: `states` (..., F), `scores` (..., k), `categorical` (..., C) to `actions` (..., A)."""
        numeric = self.networks.numeric(batch["states"], batch["scores"])
        return {Columns.ACTIONS: self.networks.actor(numeric, batch["categorical"].long())}
