"""Reward per session of each arm, from the step log.

Sessions are taken by when they *started*: to take those that have ended would favour short ones. Users, not sessions, are independent,
so intervals are clustered by user.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.evaluation.report import ArmPoint, Interval
from esrl_ray.vocabulary import Arm

Strings = npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class SessionRewards:
    """One entry per session, in the order of the session ids."""

    session_ids: Strings  # (n,)
    users: Strings  # (n,)
    arms: Strings  # (n,)
    start_ms: npt.NDArray[np.int64]  # (n,) of the first decision
    rewards: npt.NDArray[np.float64]  # (n,) sum over shown pairs and reward groups
    num_steps: npt.NDArray[np.int64]  # (n,)


def step_rewards(steps: pa.Table) -> npt.NDArray[np.float64]:
    """Reward of each step: the sum over its shown pairs and all reward groups.

    Args:
        steps: Columns `shown` (G) and `rewards` (G * q, row-major) of n steps.

    Returns:
        (n,) float64.
    """
    shown, rewards = steps["shown"].combine_chunks(), steps["rewards"].combine_chunks()
    num_pairs = pc.list_value_length(shown).to_numpy()
    num_values = pc.list_value_length(rewards).to_numpy()
    groups = num_values // np.maximum(num_pairs, 1)  # q of each step
    step_of_pair = np.repeat(np.arange(len(steps)), num_pairs)
    mask = np.repeat(shown.flatten().to_numpy(zero_copy_only=False), groups[step_of_pair])
    weights = np.where(mask, rewards.flatten().to_numpy(), 0.0)
    return _sums(np.repeat(np.arange(len(steps)), num_values), weights, len(steps))


def session_rewards(steps: pa.Table) -> SessionRewards:
    """Sum the steps of each session.

    Args:
        steps: Merged steps with columns session_id, user_id, arm, event_time_ms, shown, rewards.
    """
    ids, first, code = np.unique(_strings(steps, "session_id"), return_index=True, return_inverse=True)
    times = steps["event_time_ms"].to_numpy()
    start = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(start, code, times)
    return SessionRewards(
        session_ids=ids,
        users=_strings(steps, "user_id")[first],
        arms=_strings(steps, "arm")[first],
        start_ms=start,
        rewards=_sums(code, step_rewards(steps), len(ids)),
        num_steps=np.bincount(code, minlength=len(ids)),
    )


def arm_rewards(sessions: SessionRewards, *, before_ms: float, since_ms: float = 0.0) -> dict[str, Interval]:
    """Mean reward per session of each arm with its interval clustered by user.

    Args:
        sessions: Of the whole run.
        before_ms: Sessions that started at or after this are left out: they may be cut short by the end of the run.
        since_ms: Sessions that started before this are left out.

    Returns:
        {arm: interval} for all three arms; an arm without sessions has None.
    """
    chosen = (sessions.start_ms >= since_ms) & (sessions.start_ms < before_ms)
    return {a.value: _interval(sessions, chosen & (sessions.arms == a.value)) for a in Arm}


def arm_curve(sessions: SessionRewards, *, start_ms: float, before_ms: float, num_points: int = 10) -> tuple[ArmPoint, ...]:
    """Reward per session of each arm over the run, in stretches of equal length.

    Args:
        sessions: Of the whole run.
        start_ms: Time zero of the curve.
        before_ms: Sessions that started at or after this are left out.
        num_points: Stretches.
    """
    if before_ms <= start_ms:
        return ()
    edges = np.linspace(start_ms, before_ms, num_points + 1)
    points = []
    for low, high in itertools.pairwise(edges):
        for arm, reward in arm_rewards(sessions, before_ms=high, since_ms=low).items():
            if reward.sessions:
                points.append(ArmPoint(float((low + high) / 2 - start_ms) / 1e3, arm, reward))
    return tuple(points)


def clustered_mean(values: npt.NDArray[np.float64], clusters: Strings) -> tuple[float, float, float]:
    """Mean of observations that are independent between clusters only, with its 95 % interval (sandwich variance).

    `var = U / (U - 1) * sum_u (sum_{i in u} (x_i - mean))^2 / n^2` over U clusters; normal quantile 1.96.

    Args:
        values: (n,).
        clusters: (n,) such as user ids.

    Returns:
        mean, low, high; NaN where there are too few observations (the mean needs one, the interval two clusters).
    """
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    mean = float(values.mean())
    _, code = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(code, values - mean)
    if len(residuals) < 2:
        return mean, float("nan"), float("nan")
    half = 1.96 * float(np.sqrt(len(residuals) / (len(residuals) - 1) * (residuals**2).sum())) / len(values)
    return mean, mean - half, mean + half


def _interval(sessions: SessionRewards, chosen: npt.NDArray[np.bool_]) -> Interval:
    mean, low, high = clustered_mean(sessions.rewards[chosen], sessions.users[chosen])
    return Interval.of(mean, low, high, int(chosen.sum()))


def _sums(code: npt.NDArray[np.int64], values: npt.NDArray[np.float64], num_groups: int) -> npt.NDArray[np.float64]:
    """(num_groups,) sums of the values with each code; 0 where there is none, and float even then."""
    return np.bincount(code, values, minlength=num_groups).astype(np.float64)


def _strings(steps: pa.Table, name: str) -> Strings:
    column: Strings = steps[name].to_numpy(zero_copy_only=False).astype(str)
    return column
