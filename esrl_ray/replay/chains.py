"""The next lists of a session, as far as they are here: what long-term value is learnt from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esrl_ray.vocabulary import Arm, Floats, Ints

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


def cohorts(rounds: npt.NDArray[Any], arms: npt.NDArray[Any]) -> Ints:
    """(n,) a number for each (round, index of the arm): lists of one number were served by one policy, or by policies of one round."""
    numbers: Ints = (rounds * len(Arm) + arms).astype(np.int32)
    return numbers


def long_term_columns(
    terminated: npt.NDArray[Any], steps: Indices, chain: Indices, *, means: Floats, told: npt.NDArray[Any], cohorts: Ints
) -> dict[str, npt.NDArray[Any]]:
    """The columns of a `TransitionBatch` that only long-term value needs.

    Args:
        terminated: (n,) whether the user left after a step.
        steps: (B,) numbers of the steps themselves.
        chain: (B, H) from `followers`.
        means: (n, F + k) of each request's raw inputs over its candidates.
        told: (n,) whether they are over all candidates, or over the logged ones.
        cohorts: (n,) as above.
    """
    there, known = np.maximum(chain, 0), (chain >= 0).astype(np.float32)
    here, own, second = means[steps], told[steps], there[:, min(1, chain.shape[1] - 1)]
    # Shown pairs are many of the logged ones: means of one kind less those of the other would tell how the list was chosen.
    compared = known[:, 1] * (told[second] == own) if chain.shape[1] > 1 else np.zeros(len(chain), np.float32)
    return {
        "candidate_means": here,
        "cohort": 2 * cohorts[steps] + (own > 0),
        "future_known": known,
        "future_terminated": terminated[there].astype(np.float32) * known,
        "future_change_known": compared,
        "future_change": compared[:, None] * (means[second] - here),
    }
