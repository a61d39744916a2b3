"""All methods by name: what `esrl train --method`, the benchmarks and the conformance suite can ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.methods.batchrl import SATISFACTION, BatchRL
from esrl_ray.methods.enhancedrl import EnhancedRL
from esrl_ray.methods.method import Method
from esrl_ray.methods.search import SearchSettings, VectorSearch
from esrl_ray.methods.searchers import Cem, CmaEs, MakeSearcher, OptunaTpe
from esrl_ray.methods.static import Static
from esrl_ray.methods.supervised import Supervised, SupervisedWeights
from esrl_ray.methods.td3 import TD3_BC, Td3

Make = Callable[[str, Config, int], Method]
"""A method from its name, a deployment and a seed."""

ENHANCEDRL: dict[str, dict[str, Any]] = {
    "enhancedrl": {},
    "enhancedrl-list-sum": {"critic": "list_sum"},
    "enhancedrl-per-pair": {"critic": "per_pair"},
    "enhancedrl-printed": {"critic": "list_sum", "actor_loss": "printed"},
    "unifiedrl": {"critic": "list_sum", "level": "request", "actor_loss": "printed", "critics_per_group": 24},
}
"""Losses and level of the methods that are EnhancedRL's update, and UnifiedRL's published number of critics; discount, rates, bounds and
the other numbers of critics are what the deployment configures."""

RLLIB_PEERS = ("sac", "cql", "iql")
"""What RLlib ships."""

SEARCH: dict[str, tuple[MakeSearcher, SearchSettings]] = {
    "cem": (Cem, SearchSettings()),
    "cma-es": (CmaEs, SearchSettings(online="sessions")),
    "optuna": (OptunaTpe, SearchSettings(population=1, generations=150)),
}
"""Searchers of one vector for all users, and how they are used."""


def _enhancedrl(name: str, config: Config, seed: int) -> Method:
    learner = config.learner.model_copy(update=ENHANCEDRL[name])
    return EnhancedRL(name, config.model_copy(update={"learner": learner}), seed=seed)


def _search(name: str, config: Config, seed: int) -> Method:
    make_searcher, settings = SEARCH[name]
    return VectorSearch(name, config, seed=seed, make_searcher=make_searcher, settings=settings)


def _rllib_peer(name: str, config: Config, seed: int) -> Method:
    from esrl_ray.learning.rllib_peers import RLlibPeer  # RLlib takes seconds to import

    return RLlibPeer(name, config, seed=seed)


METHODS: dict[str, Make] = {
    **dict.fromkeys(ENHANCEDRL, _enhancedrl),
    "td3": lambda name, config, seed: Td3(name, config, seed=seed),
    "td3-bc": lambda name, config, seed: Td3(name, config, seed=seed, settings=TD3_BC),
    "batchrl-mtf": lambda name, config, seed: BatchRL(name, config, seed=seed),
    "batchrl-mtf-satisfaction": lambda name, config, seed: BatchRL(name, config, seed=seed, settings=SATISFACTION),
    **dict.fromkeys(RLLIB_PEERS, _rllib_peer),
    **dict.fromkeys(SEARCH, _search),
    "supervised": lambda name, config, seed: Supervised(name, config, seed=seed),
    "supervised-weights": lambda name, config, seed: SupervisedWeights(name, config, seed=seed),
    "static": lambda name, config, seed: Static(name, config),
}
NAMES = tuple(METHODS)
WITHOUT_GRADIENTS = (*SEARCH, "static")
"""What takes no gradient steps."""


def create_method(name: str, config: Config, *, seed: int) -> Method:
    """A method for a deployment.

    Args:
        name: One of `NAMES`.
        config: Deployment.
        seed: Of everything random in the method.

    Raises:
        MethodError: there is no such method.
    """
    if name not in METHODS:
        raise MethodError(f"no method {name!r}", "method", f"take one of {', '.join(NAMES)}")
    return METHODS[name](name, config, seed)
