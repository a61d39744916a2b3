"""The RLModule: a shell around `algo.networks.Networks`, so that RLlib moves, counts and checkpoints what the core made."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch import TorchRLModule

from esrl_ray.algo.update import make_networks
from esrl_ray.config import Config

DEPLOYMENT = "deployment"
"""Key of the `Config` in `model_config`."""


class EnhancedRLModule(TorchRLModule):  # type: ignore[misc]  # RLlib is untyped
    """All networks of EnhancedRL: actor, critics, targets, anchor, normaliser and value scales are its state.

    Its parameters are those of `make_networks(config)`, seeded by `learner.seed`: each learner builds the same.
    """

    def setup(self) -> None:
        """Build the networks from the deployment's configuration."""
        deployment = self.model_config[DEPLOYMENT]
        assert isinstance(deployment, Config)
        self.networks = make_networks(deployment)

    def _forward(self, batch: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """mu(s) of raw pairs: `states` (..., F), `scores` (..., k), `categorical` (..., C) to `actions` (..., A)."""
        numeric = self.networks.numeric(batch["states"], batch["scores"])
        return {Columns.ACTIONS: self.networks.actor(numeric, batch["categorical"].long())}
