"""Eq. (2) of EnhancedRL (v4): r = sum_i w_i v_i per pair, split in q reward groups."""

from __future__ import annotations

import numpy as np

from esrl_ray.config import RewardConfig
from esrl_ray.vocabulary import Floats


def rewards_of(behaviours: Floats, config: RewardConfig) -> Floats:
    """Rewards of pairs from their combined behaviours.

    Args:
        behaviours: (..., num_behaviours) combined values in the order of `config.behaviours`.
        config: Terms, groups and scale.

    Returns:
        (..., q) float32: per group `sum_terms weight * (min(v, cap) | [v > above]) / scale`.
    """
    column = {b.name: i for i, b in enumerate(config.behaviours)}
    rewards = np.zeros((*behaviours.shape[:-1], config.num_groups), np.float32)
    for g, group in enumerate(config.groups):
        for term in group.terms:
            v = behaviours[..., column[term.behaviour]]
            counted = v if term.cap is None else np.minimum(v, term.cap)
            if term.above is not None:
                counted = (v > term.above).astype(np.float32)
            rewards[..., g] += np.float32(term.weight) * counted
    rewards /= np.float32(config.scale)
    return rewards
