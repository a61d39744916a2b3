"""The next lists of a session, as far as they are here: what long-term value is learnt from."""

from __future__ import annotations

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


def future_columns(terminated: npt.NDArray[Any], chain: Indices) -> dict[str, npt.NDArray[np.float32]]:
    """The `future_*` columns of a `TransitionBatch`.

    Args:
        terminated: (n,) whether the user left after a step.
        chain: (B, H) from `followers`.
    """
    known = (chain >= 0).astype(np.float32)
    return {"future_known": known, "future_terminated": terminated[np.maximum(chain, 0)].astype(np.float32) * known}
