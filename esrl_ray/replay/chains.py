"""The next lists of a session, as far as they are here: what long-term value is learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from esrl_ray.normaliser import MIN_SCORE
from esrl_ray.vocabulary import Floats

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


def future_columns(terminated: npt.NDArray[Any], chain: Indices, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Floats]:
    """The `future_*` columns of a `TransitionBatch`.

    Args:
        terminated: (n,) whether the user left after a step.
        chain: (B, H) from `followers`.
        columns: Of n steps: `states`, `scores` and `valid`, (n, G, ...) each.
    """
    there, known = np.maximum(chain, 0), (chain >= 0).astype(np.float32)
    inputs = np.zeros((len(chain), columns["states"].shape[-1] + columns["scores"].shape[-1]), np.float32)
    if chain.shape[1] > 1:
        states, scores, valid = (columns[name][there[:, 1]] for name in ("states", "scores", "valid"))
        count = np.maximum(valid.sum(1, keepdims=True), 1)
        share = (known[:, 1:2] * valid / count)[:, None]  # (B, 1, G): means as products, without copies
        inputs = np.concatenate([(share @ values)[:, 0] for values in (states, np.log(np.maximum(scores, MIN_SCORE)))], -1)
    return {"future_known": known, "future_terminated": terminated[there].astype(np.float32) * known, "future_inputs": inputs}
