"""MTF-GAUC against numbers worked by hand and a slow loop, and its intervals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esrl_ray.evaluation.metrics import GroupAuc, LabelledPairs, bootstrap, gauc_of_policies, group_auc
from esrl_ray.policy.policy import Policy
from esrl_ray.spec import Spec

SPEC = Spec((), (), (), (), ("click", "watch"), (1.0, 0.0), 1.0, 0.55, 0.5)

Sample = tuple[int, int, int, int]
"""(group, score, label, weight)."""


def slow_gauc(samples: list[Sample]) -> float:
    """The definition, pair by pair."""
    total = weight_of_all = 0.0
    for group in {g for g, _, _, _ in samples}:
        mine = [(s, y, w) for g, s, y, w in samples if g == group]
        wins = possible = 0.0
        for s, y, w in mine:
            for other_s, other_y, other_w in mine:
                if y == 1 and other_y == 0:
                    possible += w * other_w
                    wins += w * other_w * (1.0 if s > other_s else 0.5 if s == other_s else 0.0)
        if possible:
            weight = sum(w for _, _, w in mine)
            total += weight * wins / possible
            weight_of_all += weight
    return total / weight_of_all if weight_of_all else float("nan")


def gauc(samples: list[Sample]) -> GroupAuc:
    """The fast form; each group is a user of its own."""
    g, s, y, w = np.array(samples, np.float64).reshape(-1, 4).T
    return group_auc(s, y, w, g, g)


def test_the_gauc_of_two_users_is_the_one_worked_by_hand() -> None:
    # User 0: positive 3 (weight 2) beats negative 1 (weight 1), ties with negative 3 (weight 1): (2*1 + 2*1/2) / (2*2) = .75, weight 4.
    # User 1: positive 1 (weight 1) loses to negative 2 (weight 1): 0, weight 2. Mean: (4 * .75 + 2 * 0) / 6 = .5.
    parts = gauc([(0, 3, 1, 2), (0, 1, 0, 1), (0, 3, 0, 1), (1, 1, 1, 1), (1, 2, 0, 1)])
    assert parts.auc.tolist() == [0.75, 0.0]
    assert parts.weight.tolist() == [4.0, 2.0]
    assert parts.mean == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 1), st.integers(1, 5)), max_size=40))
def test_the_fast_form_equals_the_slow_loop(samples: list[Sample]) -> None:
    assert gauc(samples).mean == pytest.approx(slow_gauc(samples), nan_ok=True)


def test_a_user_with_one_class_is_left_out() -> None:
    parts = gauc([(0, 1, 1, 1), (0, 2, 1, 1), (7, 2, 1, 1), (7, 1, 0, 1)])
    assert parts.user.tolist() == [7]
    assert parts.mean == 1.0


def test_min_max_normalising_the_scores_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    s, y, g = rng.normal(size=500), rng.integers(0, 2, 500), rng.integers(0, 60, 500)
    scaled = (s - s.min()) / (s.max() - s.min())
    assert group_auc(s, y, np.ones(500), g, g).mean == group_auc(scaled, y, np.ones(500), g, g).mean


def test_the_bootstrap_draws_a_user_with_all_of_its_groups() -> None:
    # Two users of equal weight: user 0 has two groups with AUC 1, user 1 one group with AUC 0. A resample of two users gives 0, .5 or 1.
    part = GroupAuc(np.array([1.0, 1.0, 0.0]), np.array([1.0, 1.0, 2.0]), np.array([0, 0, 1], np.int32))
    draws = bootstrap([part, part], num_users=2, seed=0, resamples=400)
    assert set(np.round(draws[0], 12)) == {0.0, 0.5, 1.0}
    assert np.array_equal(draws[0], draws[1])
    assert draws[0].mean() == pytest.approx(0.5, abs=0.08)


def labelled(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> LabelledPairs:
    """Five exposures of each user."""
    n = len(labels)
    user = (np.arange(n) // 5).astype(np.int32)
    return LabelledPairs(
        states=np.zeros((n, 0), np.float32),
        categorical=np.zeros((n, 0), np.int32),
        scores=scores,
        labels=labels,
        weights=np.ones(n, np.float32),
        user=user,
        groups={"user_block": user.astype(np.int64), "user_tab": np.arange(n, dtype=np.int64)},
    )


def test_a_policy_that_looks_at_the_right_score_beats_control_with_its_whole_interval() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 2_000).astype(np.float32)
    scores = np.stack([rng.random(2_000), rng.random(2_000) + labels], axis=1).astype(np.float32)
    right = Policy.static(SPEC, np.array([-1, 1, 0, 0], np.float32), note="right").numbered(5)
    table = gauc_of_policies([Policy.static(SPEC).numbered(1), right], labelled(scores, labels), seed=0, resamples=200)
    control, better = table["user_block"]
    assert (control.policy, better.policy) == ("version 1 (control)", "version 5 (right)")
    assert control.gauc == pytest.approx(0.5, abs=0.03)
    assert better.gauc is not None and better.gauc > 0.95
    (difference,) = table["user_block_difference"]
    assert difference.ci_low is not None and difference.ci_low > 0.3
    assert difference.gauc == pytest.approx(better.gauc - (control.gauc or 0.0))


def test_a_grouping_without_two_classes_anywhere_has_no_gauc() -> None:
    labels = np.array([0, 1, 0, 1, 0] * 4, np.float32)
    table = gauc_of_policies([Policy.static(SPEC).numbered(1)], labelled(np.ones((20, 2), np.float32), labels), seed=0, resamples=10)
    assert [(g.gauc, g.ci_low, g.units) for g in table["user_tab"]] == [(None, None, 0)]
    assert [(g.gauc, g.units) for g in table["user_block"]] == [(0.5, 4)]
