"""Made-up transitions for tests of learning."""

from __future__ import annotations

from typing import Any

import numpy as np

from esrl_ray.config import Config
from esrl_ray.normaliser import mean_input
from esrl_ray.vocabulary import TransitionBatch


def with_learner(config: Config, **learner: Any) -> Config:
    """The deployment with other settings of `learner`, small by default; checked, so that no test is of what a deployment cannot be."""
    small = {"hidden_sizes": (16,), "batch_size": 8}
    return Config.model_validate({**dict(config), "learner": {**config.learner.model_dump(), **small, **learner}})


def with_codes(config: Config) -> Config:
    """The deployment with a categorical feature of the item and one of the request."""
    features = [{"name": "tag", "cardinality": 7, "side": "item"}, {"name": "tab", "cardinality": 4, "side": "context"}]
    return Config.model_validate({**dict(config), "spec": {**config.spec.model_dump(), "categorical_features": features}})


def make_transitions(
    config: Config, num_steps: int, *, seed: int = 0, list_size: int | None = None, horizon: int | None = None
) -> TransitionBatch:
    """Lists of different length in shuffled places, padding filled with garbage, some sessions ended, actions explored around 0.1.

    Args:
        config: Widths, list size, number of unshown pairs.
        num_steps: B.
        seed: Of everything.
        list_size: Shown pairs of every list; by default 1 to the configured size.
        horizon: H > 0 adds what long-term value needs: sessions that end, by the user or unknown, after up to H lists; by default as the
            configuration needs.
    """
    horizon = config.learner.num_future if horizon is None else horizon
    spec, rng, g = config.spec.build(), np.random.default_rng(seed), config.max_pairs
    f, k, a, q = spec.num_features, spec.num_scores, spec.num_actions, config.reward.num_groups
    cardinalities = np.array([c.cardinality for c in spec.categorical_features], np.int64)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(num_steps, g, *shape)).astype(np.float32)

    def codes() -> np.ndarray:
        return (rng.integers(0, 1 << 30, (num_steps, g, len(cardinalities))) % np.maximum(cardinalities, 1)).astype(np.int32)

    def masks() -> tuple[np.ndarray, np.ndarray]:
        sizes = np.full(num_steps, list_size) if list_size else rng.integers(1, config.serve.list_size + 1, num_steps)
        pairs = np.full(num_steps, g) if list_size else rng.integers(config.serve.list_size, g + 1, num_steps)
        order = rng.permuted(np.tile(np.arange(g), (num_steps, 1)), axis=1)  # which place has which rank
        return (order < sizes[:, None]).astype(np.float32), (order < pairs[:, None]).astype(np.float32)

    shown, valid = masks()
    next_shown, _ = masks()
    terminated = (rng.random(num_steps) < 0.2).astype(np.float32)
    has_next = 1 - terminated
    anchors = np.full((num_steps, g, a), 0.1, np.float32)
    batch = TransitionBatch(
        states=normal(f),
        categorical=codes(),
        scores=np.exp(normal(k)),
        actions=anchors + rng.uniform(-0.15, 0.15, anchors.shape).astype(np.float32),
        anchor_actions=anchors,
        rewards=normal(q),
        shown=shown,
        valid=valid,
        next_states=normal(f),
        next_categorical=codes(),
        next_scores=np.exp(normal(k)),
        next_shown=next_shown * has_next[:, None],
        has_next=has_next,
        terminated=terminated,
    )
    if horizon:
        length = rng.integers(1, horizon + 1, num_steps) * has_next.astype(int)
        known = (np.arange(horizon) < length[:, None]).astype(np.float32)
        last = np.arange(horizon) == length[:, None] - 1
        batch["future_known"] = known
        batch["future_terminated"] = (last & (rng.random((num_steps, 1)) < 0.5)).astype(np.float32)
        batch["future_change"] = rng.normal(size=(num_steps, f + k)).astype(np.float32)
        batch["future_change_known"] = known[:, 1] if horizon > 1 else 0 * known[:, 0]
        batch["future_change"] *= batch["future_change_known"][:, None]
        batch["candidate_means"] = mean_input(batch["states"], batch["scores"], valid)
        batch["cohort"] = rng.integers(0, 3, num_steps).astype(np.int32)
    return batch
