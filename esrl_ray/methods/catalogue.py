"""All methods by name: what `esrl train --method`, the benchmarks and the conformance suite can ask for."""

from __future__ import annotations

from typing import Any

from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.methods.batchrl import BatchRL
from esrl_ray.methods.enhancedrl import EnhancedRL
from esrl_ray.methods.method import Method
from esrl_ray.methods.static import Static
from esrl_ray.methods.td3 import TD3_BC, Td3

ENHANCEDRL: dict[str, dict[str, Any]] = {
    "enhancedrl": {},
    "enhancedrl-split": {"critic": "split", "critics_per_group": 3, "gamma": 0.98, "actor_lr": 1e-3},
    "enhancedrl-list-sum": {"critic": "list_sum"},
    "enhancedrl-per-pair": {"critic": "per_pair"},
    "enhancedrl-printed": {"critic": "list_sum", "actor_loss": "printed"},
    "unifiedrl": {"critic": "list_sum", "level": "request", "actor_loss": "printed", "critics_per_group": 24},
}
"""Learner settings of the methods that are EnhancedRL's update with other losses."""

NAMES = (*ENHANCEDRL, "td3", "td3-bc", "batchrl-mtf", "static")


def create_method(name: str, config: Config, *, seed: int) -> Method:
    """A method for a deployment.

    Args:
        name: One of `NAMES`.
        config: Deployment.
        seed: Of everything random in the method.

    Raises:
        MethodError: there is no such method.
    """
    if name in ENHANCEDRL:
        learner = config.learner.model_copy(update=ENHANCEDRL[name])
        return EnhancedRL(name, config.model_copy(update={"learner": learner}), seed=seed)
    if name in ("td3", "td3-bc"):
        return Td3(name, config, seed=seed, settings=TD3_BC if name == "td3-bc" else None)
    if name == "batchrl-mtf":
        return BatchRL(name, config, seed=seed)
    if name == "static":
        return Static(name, config)
    raise MethodError(f"no method {name!r}", "method", f"take one of {', '.join(NAMES)}")
