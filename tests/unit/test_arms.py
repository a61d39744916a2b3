"""Arm rewards and served fusion weights, from the step log."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from esrl_ray.config import load_config
from esrl_ray.evaluation import arms, weights
from esrl_ray.evaluation.report import Interval

SPEC = load_config(
    None,
    ["spec.user_features=[u, flag]", "spec.item_features=[i]", "spec.context_features=[c]", "spec.power_span=1.0", "spec.bias_span=0.5"],
).spec.build()


def step(  # noqa: PLR0917 - a table of rows reads better without names
    session: str, user: str, arm: str, at_ms: int, shown: list[bool], rewards: list[list[float]], *, version: int = 1, **bulky: list[float]
) -> dict[str, object]:
    """One merged step; `rewards` is (G, q)."""
    flat = [value for pair in rewards for value in pair]
    row = {"session_id": session, "user_id": user, "arm": arm, "event_time_ms": at_ms, "policy_version": version}
    return {**row, "shown": shown, "rewards": flat, **bulky}


def test_a_steps_reward_is_the_sum_over_shown_pairs_and_groups() -> None:
    table = pa.Table.from_pylist(
        [
            step("a", "u", "explore", 0, [True, False, True], [[1.0, 2.0], [10.0, 20.0], [0.5, 0.0]]),
            step("a", "u", "explore", 1, [False], [[9.0, 9.0]]),
            step("a", "u", "explore", 2, [True, True], [[1.0, 1.0], [-3.0, 0.0]]),
        ]
    )
    assert arms.step_rewards(table).tolist() == [3.5, 0.0, -1.0]
    assert arms.step_rewards(table.slice(1)).tolist() == [0.0, -1.0]


def test_sessions_sum_their_steps_and_count_by_when_they_started() -> None:
    table = pa.Table.from_pylist(
        [
            step("a", "u1", "explore", 100, [True], [[1.0]]),
            step("b", "u2", "explore", 500, [True], [[5.0]]),
            step("a", "u1", "explore", 900, [True], [[2.0]]),
            step("c", "u3", "control", 200, [True], [[7.0]]),
            step("d", "u4", "explore", 800, [True], [[100.0]]),
        ]
    )
    sessions = arms.session_rewards(table)
    assert sessions.session_ids.tolist() == ["a", "b", "c", "d"]
    assert sessions.rewards.tolist() == [3.0, 5.0, 7.0, 100.0]
    assert sessions.num_steps.tolist() == [2, 1, 1, 1]
    rewards = arms.arm_rewards(sessions, before_ms=800)  # a has a step after it, and counts whole
    assert (rewards["explore"].mean, rewards["explore"].sessions) == (4.0, 2)
    assert rewards["control"] == Interval(7.0, None, None, 1)  # one user: no interval
    assert rewards["exploit"] == Interval(None, None, None, 0)
    assert arms.arm_rewards(sessions, before_ms=801, since_ms=500)["explore"].sessions == 2


def test_no_steps_give_no_sessions() -> None:
    empty = pa.Table.from_pylist([step("a", "u", "explore", 0, [True], [[1.0]])]).slice(0, 0)
    assert arms.arm_rewards(arms.session_rewards(empty), before_ms=1)["explore"] == Interval(None, None, None, 0)


def test_the_curve_puts_sessions_where_they_started() -> None:
    table = pa.Table.from_pylist([step(f"s{i}", f"u{i}", "exploit", 1_000 * i, [True], [[float(i)]]) for i in range(10)])
    points = arms.arm_curve(arms.session_rewards(table), start_ms=0, before_ms=10_000, num_points=2)
    assert [(p.at_s, p.arm, p.reward.mean, p.reward.sessions) for p in points] == [(2.5, "exploit", 2.0, 5), (7.5, "exploit", 7.0, 5)]
    assert arms.arm_curve(arms.session_rewards(table), start_ms=5, before_ms=5) == ()


def test_a_clustered_interval_worked_by_hand() -> None:
    # Users a: 1, 3 and b: 8; mean 4; residual sums -4 and +4; var = 2/1 * 32 / 9; half = 1.96 * 8/3.
    mean, low, high = arms.clustered_mean(np.array([1.0, 3.0, 8.0]), np.array(["a", "a", "b"]))
    assert (mean, low, high) == pytest.approx((4.0, 4.0 - 1.96 * 8 / 3, 4.0 + 1.96 * 8 / 3))


def test_clustered_intervals_cover_the_truth_where_plain_ones_would_not() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 10).astype(str)
    hits = plain = 0
    for _ in range(400):
        values = np.repeat(rng.normal(size=60), 10) + rng.normal(scale=0.5, size=600)
        _, low, high = arms.clustered_mean(values, clusters)
        hits += low <= 0 <= high
        plain += abs(values.mean()) <= 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert 0.92 <= hits / 400 <= 0.98
    assert plain / 400 < 0.7


def test_weights_by_version_average_shown_pairs_of_the_arm() -> None:
    # k = 2: actions are (power, power, bias, bias); power = 1 + a, bias = .55 + .5 a.
    one, two, hidden = [0.1, 0.2, 0.0, 0.4], [0.3, 0.4, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9]
    table = pa.Table.from_pylist(
        [
            step("a", "u", "exploit", 0, [True, True, False], [[0.0]] * 3, version=3, actions=one + two + hidden),
            step("a", "u", "exploit", 1, [True], [[0.0]], version=4, actions=two),
            step("b", "v", "explore", 2, [True], [[0.0]], version=3, actions=hidden),
            step("c", "w", "exploit", 3, [True], [[0.0]], version=9, actions=hidden),
        ]
    )
    points = weights.weights_by_version(table, SPEC, published_ms={3: 5_000, 4: 8_000}, start_ms=3_000)
    assert [(p.at_s, p.version, p.pairs) for p in points] == [(2.0, 3, 2), (5.0, 4, 1)]
    assert points[0].powers == pytest.approx((1.2, 1.3)) and points[0].biases == pytest.approx((0.55, 0.65))
    assert points[1].powers == pytest.approx((1.3, 1.4))


def test_segments_follow_the_feature_that_drives_the_weights() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for n in range(300):
        u, i, c = rng.normal(size=3)
        action = [0.3 * np.tanh(u), 0.0, 0.0, 0.1 * np.tanh(i)]
        rows.append(step(f"s{n}", f"u{n}", "exploit", n, [True], [[0.0]], version=n, states=[u, 1.0, i, c], actions=action))
    segments = weights.weights_by_segment(pa.Table.from_pylist(rows), SPEC)
    assert [(s.feature, s.side, s.third) for s in segments] == [("u", "user", t) for t in weights.THIRDS] + [
        ("i", "item", t) for t in weights.THIRDS
    ]
    assert [s.pairs for s in segments] == [100] * 6
    low, middle, high = segments[:3]
    assert low.powers[0] < 0.85 < middle.powers[0] < 1.15 < high.powers[0]
    assert low.powers[1] == high.powers[1] == 1.0
    assert segments[3].biases[1] < segments[5].biases[1]
    assert {s.feature for s in weights.weights_by_segment(pa.Table.from_pylist(rows), SPEC, features=["i"])} == {"i"}
    assert sum(s.pairs for s in weights.weights_by_segment(pa.Table.from_pylist(rows), SPEC, features=["i"], min_version=150)) == 150


def test_segments_and_weights_of_an_arm_without_steps_are_empty() -> None:
    table = pa.Table.from_pylist([step("a", "u", "control", 0, [True], [[0.0]], states=[0.0] * 4, actions=[0.0] * 4)])
    assert weights.weights_by_segment(table, SPEC) == ()
    assert weights.weights_by_version(table, SPEC, published_ms={1: 0}, start_ms=0) == ()
