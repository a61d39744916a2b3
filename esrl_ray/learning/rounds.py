"""Progressive training: what is frozen within a round, and how the next one begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from esrl_ray.config import Config
from esrl_ray.exploration import hash64
from esrl_ray.normaliser import Normaliser
from esrl_ray.vocabulary import Floats, Round, TransitionBatch

MIN_REWARD_STD = 1e-3
"""A reward group that varies less than this has no events yet: it keeps scale 1."""


def next_round(number: int, anchor_version: int, config: Config, *, started_ms: int) -> Round:
    """A round of the configured bounds; its salt follows from seed and number, so that its noise can be recomputed."""
    salt = hash64(f"{config.learner.seed}/{number}") >> 1  # fits a signed 64-bit integer
    return Round(number, anchor_version, salt, config.exploration.low, config.exploration.high, started_ms)


def fit_scales(lists: TransitionBatch) -> tuple[Normaliser, Floats]:
    """Normaliser of the numeric input, over valid pairs, and standard deviation of a list's reward per group (q,)."""
    totals = (lists["rewards"] * lists["shown"][..., None]).sum(1)  # (B, q)
    std = totals.std(0).astype(np.float32)
    return Normaliser.fit(lists["states"], lists["scores"], lists["valid"] > 0), np.where(std < MIN_REWARD_STD, np.float32(1), std)


def together(batches: Sequence[TransitionBatch]) -> TransitionBatch:
    """The steps of several batches as one."""
    columns: dict[str, Any] = {name: np.concatenate([cast(dict[str, Any], b)[name] for b in batches]) for name in batches[0]}
    return cast(TransitionBatch, columns)
