"""The benchmark of long-term credit: its targets on a hand-made log, and one tiny world through all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.credit import (
    BY_ADAM,
    CEILING,
    CHANGE,
    COLUMNS,
    HELD,
    INPUTS,
    KINDS,
    SPLIT,
    around,
    least_squares,
    look_ahead,
    make,
    measure,
    report,
    targets,
)
from esrl_ray.config import load_config
from esrl_ray.replay.steps import CUT, LEFT, UNKNOWN

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
FOLLOWING = np.array([2, 3, 4, LEFT, 6, 7, UNKNOWN, CUT])
"""Sessions in turns: 0 2 4 6 is still running, 1 3 ended by its user, 5 7 was cut off."""
REWARDS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
NAN = np.nan


def test_lists_ahead_and_their_rewards_are_counted_as_far_as_the_log_tells() -> None:
    ahead, total = look_ahead(FOLLOWING, REWARDS, 2, gamma=0.5)
    assert ahead.tolist() == pytest.approx([2, 1, 2, 0, NAN, NAN, NAN, NAN], nan_ok=True)
    # 3 / 2 + 5 / 4; 4 / 2; 5 / 2 + 7 / 4; nothing follows
    assert total.tolist() == pytest.approx([2.75, 2.0, 4.25, 0, NAN, NAN, NAN, NAN], nan_ok=True)


def test_targets_are_larger_the_longer_users_stay_and_unknown_where_the_log_ends() -> None:
    found = {name: y.tolist() for name, y in targets(FOLLOWING, REWARDS).items()}
    assert found["left within 1"] == pytest.approx([0, 0, 0, -1, 0, 0, NAN, NAN], nan_ok=True)
    assert found["left within 3"] == pytest.approx([0, -1, NAN, -1, NAN, NAN, NAN, NAN], nan_ok=True)
    assert found["reward of the next 1"] == pytest.approx([3, 4, 5, 0, 7, 8, NAN, NAN], nan_ok=True)
    ended = {"lists to come, up to 12": (1, 0), "discounted leaving, 0.85": (-0.85, -1), "return of reward, 0.98": (0.98 * 4, 0)}
    for name, (first, last) in ended.items():
        assert found[name] == pytest.approx([NAN, first, NAN, last, NAN, NAN, NAN, NAN], nan_ok=True), name


def test_a_user_who_stays_longer_than_the_windows_has_not_left() -> None:
    found = targets(np.array([*range(1, 31), LEFT]), np.ones(31))
    assert found["left within 12"][0] == 0 and found["discounted leaving, 0.6"][0] == 0
    assert found["lists to come, up to 12"][0] == found["reward of the next 12"][0] == 12
    assert found["discounted leaving, 0.6"][11] == pytest.approx(-(0.6**19)) and found["discounted leaving, 0.6"][10] == 0


def test_the_change_around_a_list_goes_from_the_request_before_it_to_the_one_after() -> None:
    after, change = around(FOLLOWING, REWARDS[:, None])
    assert after[:, 0].tolist() == pytest.approx([3, 4, 5, NAN, 7, 8, NAN, NAN], nan_ok=True)
    assert change[:, 0].tolist() == pytest.approx([NAN, NAN, 5 - 1, NAN, 7 - 3, NAN, NAN, NAN], nan_ok=True)


def test_a_tiny_world_has_a_correlation_for_every_fit_and_input() -> None:
    torch.set_num_threads(1)
    world = ["simulation.num_users=100", "simulation.num_items=2000", "exploration.explore_share=1", "exploration.exploit_share=0"]
    log = make(load_config(DEMO, world), lists=4_500, seed=0, sessions=20, reward_steps=5)
    scores = measure(log, adam_steps=3, seed=0)
    by_adam = {f"{name}, by Adam, {kind}" for name in BY_ADAM for kind in KINDS}
    held = {HELD.format(CHANGE.format(score)) for score in ("click", "valid")}
    assert set(scores) == {CEILING, *log.targets, *held, *SPLIT, *by_adam}
    assert set(measure(log, adam_steps=0, seed=0)) == set(scores) - by_adam
    for name, of in scores.items():
        assert len(of) == len(COLUMNS if name in {*log.targets, *held} else INPUTS) and np.all(np.abs(of) <= 1), name
        if name in log.targets:  # no linear function beats that of the truth
            assert np.all(np.array(of) <= np.tile(scores[CEILING], 2) + 1e-9), name
    shifted = log.users * 7.0  # what is the same for all lists of a user changes nothing, less the user's means
    fits = [least_squares(log, log.inputs[0], log.targets["left within 1"] + more, within_users=True) for more in (0.0, shifted)]
    np.testing.assert_allclose(fits[0], fits[1], atol=1e-8)
    table = report([scores, {name: [1.0] * len(of) for name, of in scores.items()}])
    assert [row[0] for row in table.rows] == list(scores) and table.columns == ("target", *COLUMNS)
    assert table.rows[0][-2:] == ("-", "-") and all(len(row) == len(table.columns) for row in table.rows)
    mean = (1 + scores[CEILING][0]) / 2
    assert table.rows[0][1] == f"{mean:.2f} ({scores[CEILING][0]:.2f} to 1.00)"
