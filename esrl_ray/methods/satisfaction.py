"""The user-satisfaction reward of BatchRL-MTF (arXiv 2208.04560): `r(s, a) = sum_i w_i v_i` over behaviours of stickiness and activeness.

Published: the linear form; play time and play integrity for stickiness, interactions for activeness; that w_i come from a statistical
analysis of how behaviours go with later dwell time. Not published: w_i and the analysis. Ours: v_i are the summands of the deployment's
reward without their coefficients, summed over the list; w_i are the coefficients of a ridge regression of the dwell time that the session
still had, after the list, on them; the result is scaled to the standard deviation of the deployment's list reward.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.expression import evaluate, summands, used
from esrl_ray.replay.steps import LEFT, Steps
from esrl_ray.reward import RewardConfig
from esrl_ray.vocabulary import Floats

Doubles = npt.NDArray[np.float64]
RIDGE = 1.0
"""Penalty of the standardised coefficients, in numbers of lists."""


def behaviour_terms(steps: Steps, config: RewardConfig) -> Floats:
    """v_i: the summands of the reward without their coefficients, summed over the shown pairs, (n, number of summands)."""
    behaviours = steps.columns["behaviours"]
    columns = {name: behaviours[..., i] for i, name in enumerate(config.names)}
    parts = [part for g in range(config.num_groups) for _, part in summands(config.parsed(g)) if used(part)]
    return np.stack([(evaluate(part, columns) * steps.columns["shown"]).sum(1) for part in parts], axis=-1)


def later_dwell(steps: Steps, config: RewardConfig, behaviour: str) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Dwell time of the later lists of each step's session (n,), and whether the session's end is known (n,)."""
    column = [b.name for b in config.behaviours].index(behaviour)
    dwell = (steps.columns["behaviours"][..., column] * steps.columns["shown"]).sum(1).astype(np.float64)
    following = steps.following
    later, ended = np.zeros(len(steps)), following == LEFT
    for number in range(len(steps) - 1, -1, -1):  # a step's next one stands behind it
        if (after := following[number]) >= 0:
            later[number], ended[number] = dwell[after] + later[after], ended[after]
    return later, ended


def satisfaction_weights(steps: Steps, config: Config, *, dwell: str) -> Floats:
    """w_i of the satisfaction reward, one for each summand of the deployment's reward.

    Args:
        steps: Whole sessions.
        config: Deployment.
        dwell: The behaviour that counts time.

    Raises:
        MethodError: there is no such behaviour, or no session has ended.
    """
    if dwell not in (names := [b.name for b in config.reward.behaviours]):
        raise MethodError(f"no behaviour {dwell!r} counts the dwell time", "reward.behaviours", f"take one of {', '.join(names)}")
    values, (later, ended) = behaviour_terms(steps, config.reward), later_dwell(steps, config.reward, dwell)
    if not ended.any():
        raise MethodError(f"none of {len(steps)} steps is of an ended session", "satisfaction reward", "give whole sessions")
    v, y = values[ended].astype(np.float64), later[ended]
    std = np.maximum(v.std(0), 1e-6)
    x = (v - v.mean(0)) / std
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (y - y.mean())) / std
    scale = steps.list_rewards.sum(1).std() / max(float((values @ weights).std()), 1e-6)
    scaled: Floats = (weights * scale).astype(np.float32)
    return scaled
