"""Frozen evaluation: what is compared are policies, on the same users and moods."""

from __future__ import annotations

import numpy as np
import pytest

from esrl_ray.config import Config
from esrl_ray.evaluation.frozen import FrozenResult, evaluate_frozen, play
from esrl_ray.policy.policy import Policy

SESSIONS = 400


@pytest.fixture(scope="module")
def policies(config: Config) -> list[Policy]:
    """Control, control again under another number, and a policy that turns the ranking round."""
    spec = config.spec.build()
    upside_down = Policy.static(spec, np.full(spec.num_actions, -1.0, np.float32), note="upside down")
    return [Policy.static(spec), Policy.static(spec).numbered(7), upside_down.numbered(8)]


@pytest.fixture(scope="module")
def results(policies: list[Policy], config: Config) -> list[FrozenResult]:
    return evaluate_frozen(policies, config, seed=3, sessions=SESSIONS)


def test_a_policy_does_not_differ_from_itself(results: list[FrozenResult]) -> None:
    same = results[1].difference
    assert (same.mean, same.ci_low, same.ci_high, same.sessions) == (0.0, 0.0, 0.0, SESSIONS)
    assert results[0].reward == results[1].reward


def test_a_worse_policy_is_worse_with_its_whole_interval(results: list[FrozenResult]) -> None:
    worse = results[2].difference
    assert worse.ci_high is not None and worse.ci_high < 0
    assert results[2].version == 8
    assert results[2].pages < results[0].pages


def test_the_difference_is_that_of_the_means_and_pairing_narrows_it(results: list[FrozenResult]) -> None:
    control, worse = results[0], results[2]
    assert control.reward.mean is not None and worse.reward.mean is not None
    assert worse.difference.mean == pytest.approx(worse.reward.mean - control.reward.mean)
    assert control.reward.ci_low is not None and control.reward.ci_low < control.reward.mean < (control.reward.ci_high or 0)


def test_results_depend_on_neither_order_nor_company(policies: list[Policy], config: Config, results: list[FrozenResult]) -> None:
    alone = evaluate_frozen([policies[2]], config, seed=3, sessions=SESSIONS)[0]
    assert alone.reward == results[2].reward
    assert alone.difference.mean == 0.0


def test_the_sessions_are_not_those_of_the_traffic(config: Config, results: list[FrozenResult]) -> None:
    control = Policy.static(config.spec.build())
    reward, pages, watch_s = play(control, config, seed=3, sessions=SESSIONS)
    assert reward.shape == pages.shape == watch_s.shape == (SESSIONS,)
    assert reward.mean() != results[0].reward.mean
    assert pages.min() >= 1
