"""The next lists of a session, as far as they are here: what long-term value is learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def followers(following: Indices, steps: Indices, horizon: int) -> Indices:
    """The next `horizon` steps of each step.

    Args:
        following: (n,) the number of the step that follows each; negative = none, or none known.
        steps: (B,) numbers.
        horizon: H.

    Returns:
        (B, H) numbers; -1 from where the chain ends.
    """
    chain = np.empty((len(steps), horizon), np.int64)
    current = steps
    for h in range(horizon):
        current = np.where(current >= 0, following[current], -1)
        chain[:, h] = np.maximum(current, -1)
    return chain


def future_columns(columns: Mapping[str, npt.NDArray[Any]], terminated: npt.NDArray[Any], chain: Indices) -> dict[str, npt.NDArray[Any]]:
    """The `future_*` columns of a `TransitionBatch`.

    Args:
        columns: Of all steps: states, categorical, rewards, shown, (n, G, ...) each; the first pair of a step is a real one.
        terminated: (n,) whether the user left after a step.
        chain: (B, H) from `followers`.
    """
    known = (chain >= 0).astype(np.float32)
    steps = np.maximum(chain, 0)
    rewards = (columns["rewards"][steps] * columns["shown"][steps][..., None]).sum(2)  # (B, H, q)
    return {
        "future_states": columns["states"][steps, 0] * known[..., None],
        "future_categorical": columns["categorical"][steps, 0] * known[..., None].astype(np.int32),
        "future_rewards": rewards * known[..., None],
        "future_known": known,
        "future_terminated": terminated[steps].astype(np.float32) * known,
    }
