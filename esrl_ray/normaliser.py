"""Standardises the numeric input of the networks; frozen within a round, folded exactly into the first layers at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Bools, Floats

MIN_SCORE = 1e-6
"""Scores below this have the logarithm of this."""


def numeric_input(states: Floats, scores: Floats) -> Floats:
    """Raw numeric input of the networks: numeric state and log scores, (..., F + k)."""
    return np.concatenate([states, np.log(np.maximum(scores, MIN_SCORE))], axis=-1)


def mean_input(states: Floats, scores: Floats, valid: Floats) -> Floats:
    """Means of the raw numeric input over the valid pairs of each list.

    Args:
        states: (B, G, F).
        scores: (B, G, k).
        valid: (B, G) 1 = a real pair.

    Returns:
        (B, F + k).
    """
    share = (valid / np.maximum(valid.sum(1, keepdims=True), 1))[:, None]  # (B, 1, G): means as a product
    means: Floats = (share @ numeric_input(states, scores))[:, 0]
    return means


CONSTANT = 1e9
"""Standard deviation of an input that has never varied. Its weights are as they were drawn: whatever its unit, they must not meet it when
it first moves; and folding the next normaliser in, which knows its unit, leaves next to nothing of them."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """`x = (raw - mean) / std` for each of the F + k numeric inputs."""

    mean: Floats  # (F + k,)
    std: Floats  # (F + k,) never below 1e-3, CONSTANT of what did not vary

    @classmethod
    def identity(cls, spec: Spec) -> Self:
        """Mean 0, standard deviation 1."""
        width = spec.num_features + spec.num_scores
        return cls(np.zeros(width, np.float32), np.ones(width, np.float32))

    def take(self, columns: Sequence[int]) -> Self:
        """The statistics of some of the inputs."""
        chosen = list(columns)
        return type(self)(self.mean[chosen], self.std[chosen])

    @classmethod
    def fit(cls, states: Floats, scores: Floats, valid: Bools) -> Self:
        """Statistics of the valid pairs of a batch of lists.

        Args:
            states: (B, G, F).
            scores: (B, G, k).
            valid: (B, G); padding enters nothing.
        """
        raw = numeric_input(states[valid], scores[valid]).astype(np.float64)
        std = np.where(np.ptp(raw, axis=0) > 0, np.maximum(raw.std(0), 1e-3), CONSTANT)
        return cls(raw.mean(0).astype(np.float32), std.astype(np.float32))

    def after(self, old: Self) -> Self:
        """These statistics, and older ones of inputs that varied before and do not now."""
        still = self.std >= CONSTANT
        return type(self)(np.where(still, old.mean, self.mean), np.where(still, old.std, self.std))
