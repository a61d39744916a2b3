"""Off-policy estimates against values known in closed form, numbers worked by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from esrl_ray.config import Config
from esrl_ray.errors import ConfigError, MethodError
from esrl_ray.evaluation.estimators import CONSERVATIVE, Draws, FixedPoint, Paths, doubly_robust, ncis
from esrl_ray.evaluation.list_features import mean_so_far
from esrl_ray.evaluation.metrics import group_auc, label_of, shown_pairs
from esrl_ray.evaluation.offline import Estimate, OffPolicy, Settings
from esrl_ray.evaluation.support import Lists, SupportLimits, effective_size, inclusion
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import CUT, LEFT, UNKNOWN, Steps
from tests.transitions import with_codes
from tests.two_items import ALWAYS_A, ALWAYS_B, LEAVES, REWARDS, log_of, two_items, vector

NO_LIMITS = SupportLimits(0, 0, 0.0, 0.0, 0.0, max_width=1e9)
FAST = Settings(num_updates=0, resamples=100, num_groups=100, min_effective_sessions=0.0, limits=NO_LIMITS, kernel=1.0)


@pytest.fixture(scope="module")
def setting() -> Config:
    return two_items()


@pytest.fixture(scope="module")
def asked(setting: Config) -> OffPolicy:
    """A log of 1,500 sessions in which noise chose between A and B."""
    return OffPolicy(log_of(setting, REWARDS, LEAVES, sessions=1_500, seed=0), setting, num_candidates=2, seed=0, settings=FAST)


# Fixed point


def chain(actions: list[int], following: list[int], rewards: list[float], always: int) -> FixedPoint:
    """Lists with one feature for each of two actions; the policy always takes one of them."""
    taken = np.eye(2)[actions]
    chosen = np.tile(np.eye(2)[always], (len(actions), 1))
    n, after = len(actions), np.array(following)
    first = np.ones(n, np.bool_)
    first[after[after >= 0]] = False
    groups = np.arange(n) // (n // 2)
    return FixedPoint.of(taken, chosen, np.array(rewards), after, first=first, known=np.ones(n, np.bool_), groups=groups, gamma=1.0)


def test_the_fixed_point_of_two_actions_is_reward_over_the_chance_to_leave() -> None:
    # Both actions earn 1; action 0 ends two lists of four, action 1 two of eight. Always 0: 1 / .5 = 2; always 1: 1 / .25 = 4.
    # Sessions: 0* and 0 1 1 1 1*, twice.
    actions: list[int] = []
    following: list[int] = []
    rewards: list[float] = []
    for _ in range(2):
        start = len(actions)
        actions += [0, 0, 1, 1, 1, 1]
        following += [LEFT, start + 2, start + 3, start + 4, start + 5, LEFT]
        rewards += [1.0] * 6
    once = np.ones((1, 2))
    for always, expected in ((0, 2.0), (1, 4.0)):
        point = chain(actions, following, rewards, always).drawn(once)
        assert point.values()[0] / point.sessions[0] == pytest.approx(expected, rel=1e-3)


def test_the_doubly_robust_value_of_the_same_users_is_the_fixed_point_itself() -> None:
    point = chain([0, 1, 0, 1], [1, LEFT, 3, LEFT], [1.0, 2.0, 1.0, 2.0], 1).drawn(np.ones((1, 2)))
    assert doubly_robust(point, point)[0] == pytest.approx(point.values()[0], rel=1e-3)


def test_ratios_weigh_rewards_to_the_value() -> None:
    actions, following, rewards = [0, 1, 1, 0], [1, LEFT, 3, LEFT], [1.0, 2.0, 3.0, 4.0]
    point = chain(actions, following, rewards, 1).drawn(np.ones((1, 2)))
    ratios = np.eye(2)[actions] @ point.ratios()[0]
    assert ratios @ np.array(rewards) == pytest.approx(point.values()[0], rel=1e-3)


def test_the_conservative_value_is_lower_where_the_policy_leaves_the_log() -> None:
    point = chain([0, 0, 0, 1], [LEFT] * 4, [1.0, 1.0, 1.0, 1.0], 1).drawn(np.ones((1, 2)))
    plain, conservative = point.values()[0], point.values(conservative=CONSERVATIVE)[0]
    # gap of action 1: 4 chosen - 1 taken = 3; its matrix entry is 1, so w_1 falls by alpha / 2 * 3, and 4 sessions start there.
    assert conservative - plain == pytest.approx(-4 * CONSERVATIVE / 2 * 3, rel=1e-3)


# Importance sampling


def test_ncis_of_two_sessions_is_the_one_worked_by_hand() -> None:
    # Session 0: ratios 2, 1 and rewards 1, 3; session 1: ratio .5, reward 4, then it has ended (ratio stays .5, reward 0).
    # t = 0: (2 * 1 + .5 * 4) / 2.5 = 1.6; t = 1: (2 * 3 + .5 * 0) / 2.5 = 2.4.
    following = np.array([1, LEFT, LEFT])
    paths = Paths.of(np.array([0, 2]), following, np.array([0, 0, 1]))
    value = ncis(paths, np.array([2.0, 1.0, 0.5]), np.array([1.0, 3.0, 4.0]), np.ones((1, 2)), gamma=1.0)
    assert value[0] == pytest.approx(4.0)
    assert ncis(paths, np.array([2.0, 1.0, 0.5]), np.array([1.0, 3.0, 4.0]), np.ones((1, 2)), gamma=0.5)[0] == pytest.approx(2.8)
    # With the cap at 1: (1 + 2) / 1.5 = 2 and 3 / 1.5 = 2.
    assert ncis(paths, np.array([2.0, 1.0, 0.5]), np.array([1.0, 3.0, 4.0]), np.ones((1, 2)), gamma=1.0, cap=1.0)[0] == pytest.approx(4.0)


def test_the_effective_size_is_the_number_of_equal_weights() -> None:
    assert effective_size(np.full(7, 3.0)) == pytest.approx(7)
    assert effective_size([1.0, 0.0, 0.0]) == 1.0
    assert effective_size([]) == 0.0


def test_an_unshown_pair_that_stands_for_three_fills_what_is_left_of_the_list() -> None:
    # l = 2; by score: an unshown pair that stands for 3 takes both places with 2/3 of itself. Next list: shown, then unshown 1/3.
    scores = np.array([[1.0, 3.0, 2.0], [3.0, 2.0, 1.0]])
    masses = np.array([[1.0, 3.0, 1.0], [1.0, 3.0, 1.0]])
    assert np.allclose(inclusion(scores, masses, np.array([2.0, 2.0])), [[0, 2 / 3, 0], [1, 1 / 3, 0]])


def test_padding_is_never_chosen() -> None:
    assert inclusion(np.array([[9.0, 1.0]]), np.array([[0.0, 1.0]]), np.array([1.0])).tolist() == [[0.0, 1.0]]


def test_propensities_are_the_triangular_distribution_of_the_noise(setting: Config) -> None:
    # Both pairs score 1.2 a log(pred + .55 + .0 a) with log = log(2.05) and log(1.05): A wins when u_A .718 > u_B .0488, u ~ U(-.15, .15),
    # hence with 1/2 at anchor 0; with the anchor of A at +.05: P(u_A > .0679 u_B - .05) = (.05 + .15) / .3 = 2/3.
    steps = log_of(setting, REWARDS, LEAVES, sessions=400, seed=1)
    lists, of = Lists.of(steps, setting, 2), np.arange(len(steps))
    item_a = steps.columns["states"][..., 0] > 0
    assert lists.propensities(None, of, kernel=1.0, seed=0)[item_a].mean() == pytest.approx(0.5, abs=0.02)
    steps.columns["anchor_actions"][item_a, 0] = 0.05
    assert lists.propensities(None, of, kernel=1.0, seed=0)[item_a].mean() == pytest.approx(2 / 3, abs=0.02)


def test_a_policy_that_is_the_anchor_has_ratio_one_everywhere(setting: Config, asked: OffPolicy) -> None:
    value = asked.value(Policy.static(setting.spec.build()))
    paths = asked._paths
    assert value.effective_sessions == pytest.approx(len(paths.groups))


# Values


@pytest.mark.parametrize(("action", "truth"), [(ALWAYS_A, 2.0), (ALWAYS_B, 4.0)])
def test_fqe_and_doubly_robust_find_the_value_that_is_known_in_closed_form(
    setting: Config, asked: OffPolicy, action: float, truth: float
) -> None:
    estimates = asked.value(vector(setting, action)).estimates
    for name in ("fqe", "dr", "conservative"):
        found = Estimate.of(estimates[name])
        assert found.ci_low <= truth <= found.ci_high, f"{name}: {found}"
        assert found.mean == pytest.approx(truth, rel=0.15), name


def test_the_value_per_list_by_importance_sampling_is_the_reward_of_the_item(setting: Config, asked: OffPolicy) -> None:
    for action, reward in ((ALWAYS_A, REWARDS[0]), (ALWAYS_B, REWARDS[1])):
        assert asked.value(vector(setting, action)).estimates["ncis_list"].mean == pytest.approx(reward, rel=0.05)


def test_ncis_per_session_is_the_value_that_is_known_in_closed_form_near_the_anchor(setting: Config) -> None:
    """Near it no product of ratios reaches the cap. With the log's kernel it is the value of the policy with the log's noise around it."""
    rewards, leaves = (1.0, 0.2), (0.1, 0.5)
    asked = OffPolicy(log_of(setting, rewards, leaves, sessions=3_000, seed=0), setting, num_candidates=2, seed=0, settings=FAST)
    for action, truth in ((0.0, 2.0), (0.03, 2.568), (-0.03, 1.558)):
        # A wins when (a + u_A) .718 > (a + u_B) .0488, hence with p = 1/2 + a (1 - .0488 / .718) / .3, as u is within .15 of 0.
        p = 0.5 + action * (1 - 0.0488 / 0.718) / 0.3
        assert (p * rewards[0] + (1 - p) * rewards[1]) / (p * leaves[0] + (1 - p) * leaves[1]) == pytest.approx(truth, abs=1e-3)
        value = asked.value(vector(setting, action))
        assert value.effective_sessions > 2_000
        assert value.estimates["ncis"].mean == pytest.approx(truth, rel=0.05), action  # at most 4.1 % off with six seeds


def test_paired_differences_are_narrower_than_the_two_intervals(setting: Config, asked: OffPolicy) -> None:
    near = asked.value(vector(setting, 0.02)).estimates["fqe"]
    control = asked.value(vector(setting, 0.01)).estimates["fqe"]
    assert np.std(near.minus(control).draws) < 0.7 * np.std(near.draws)
    same = control.minus(control)
    assert (same.mean, same.bound(0.025), same.bound(0.975)) == (0.0, 0.0, 0.0)


def test_equal_seeds_give_equal_estimates(setting: Config, asked: OffPolicy) -> None:
    again = OffPolicy(asked.lists.steps, setting, num_candidates=2, seed=0, settings=FAST)
    policy = vector(setting, ALWAYS_A)
    assert again.value(policy).estimates["dr"].mean == asked.value(policy).estimates["dr"].mean
    assert again.digest == asked.digest


def _one_more(name: str) -> Callable[[Steps], None]:
    """Change one column or key of the first list."""

    def change(steps: Steps) -> None:
        of = steps.columns[name] if name in steps.columns else getattr(steps, name)
        of[0] += 1

    return change


CHANGES: dict[str, Callable[[Steps], None]] = {
    **{name: _one_more(name) for name in ("states", "categorical", "scores", "anchor_actions", "rewards", "sessions", "users", "arms")},
    "shown": lambda steps: steps.columns["shown"][0].put([0, 1], [0, 1]),
    "valid": lambda steps: steps.columns["valid"][0].put(1, 0),
    "following": lambda steps: steps.follow(np.array([0]), UNKNOWN),
}


def test_whatever_estimates_read_of_a_log_changes_its_digest(setting: Config) -> None:
    config = with_codes(setting)

    def digest(change: Callable[[Steps], None], *, num_candidates: int = 2, without_first: bool = False) -> str:
        made = log_of(setting, REWARDS, LEAVES, sessions=30, seed=2)
        steps, n = Steps(config, len(made)), len(made)
        keys = {name: getattr(made, name) for name in ("sessions", "users", "rounds", "arms")}
        steps.add(keys, {**made.columns, "categorical": np.zeros((n, 2, 2), np.int32)})
        steps.follow(np.arange(n), made.following)
        change(steps)
        users = (np.arange(n) > 0) | (not without_first)
        return OffPolicy(steps, config, num_candidates=num_candidates, seed=0, settings=FAST, users=users).digest

    def nothing(steps: Steps) -> None:
        """As it is."""

    found = {name: digest(change) for name, change in CHANGES.items()}
    found |= {"num_candidates": digest(nothing, num_candidates=3), "left out": digest(nothing, without_first=True)}
    found["an unknown one left out"] = digest(CHANGES["following"], without_first=True)  # no fit reads it, but a session starts there
    assert digest(nothing) == digest(nothing) and digest(nothing) not in found.values()
    assert len(set(found.values())) == len(found)


def test_a_log_that_never_shows_what_the_policy_would_is_refused_with_the_numbers(setting: Config) -> None:
    steps = log_of(setting, REWARDS, LEAVES, sessions=300, seed=2, anchor=ALWAYS_B)
    settings = Settings(num_updates=0, resamples=20, limits=SupportLimits(min_users=10, min_sessions=10, min_ess=10))
    value = OffPolicy(steps, setting, num_candidates=2, seed=0, settings=settings).value(vector(setting, ALWAYS_A))
    assert not value.estimates
    assert "overlap 0, at least 0.45 needed" in value.refused["fqe"]


@pytest.mark.parametrize(("share", "num_candidates", "refused"), [(0.1, 2, True), (0.02, 2, False), (0.1, 1, False)])
def test_lists_that_do_not_say_what_was_not_shown_are_no_support(setting: Config, share: float, num_candidates: int, refused: bool) -> None:
    steps = log_of(setting, REWARDS, LEAVES, sessions=300, seed=2)
    silent = np.random.default_rng(0).random(len(steps)) < share
    steps.columns["valid"][silent] = steps.columns["shown"][silent]
    limits = SupportLimits(min_users=10, min_sessions=10, min_ess=10)
    candidates = np.where(silent, num_candidates, 2)
    settings = Settings(num_updates=0, resamples=20, limits=limits)
    value = OffPolicy(steps, setting, num_candidates=candidates, seed=0, settings=settings).value(vector(setting, ALWAYS_A))
    assert value.support.compared == pytest.approx(1 - (silent.mean() if num_candidates == 2 else 0))
    assert any("serve.num_unshown" in reason for reason in value.refused.values()) == refused
    assert not refused or not value.estimates


def test_too_few_users_are_refused(setting: Config) -> None:
    steps = log_of(setting, REWARDS, LEAVES, sessions=60, seed=2)
    value = OffPolicy(steps, setting, num_candidates=2, seed=0, settings=Settings(num_updates=0, resamples=20)).value(vector(setting, 0.0))
    assert "users" in value.refused["dr"] and "sessions 60, at least 300 needed" in value.refused["dr"]


def test_a_log_without_ended_sessions_has_no_reward_per_session(setting: Config) -> None:
    steps = log_of(setting, REWARDS, LEAVES, sessions=30, seed=2)
    steps.follow(np.flatnonzero(steps.following == LEFT), CUT)
    with pytest.raises(MethodError, match="no session ends"):
        OffPolicy(steps, setting, num_candidates=2, seed=0, settings=FAST)
    assert OffPolicy(steps, setting, num_candidates=2, seed=0, settings=Settings(gamma=0.0)).digest


def test_ncis_keeps_the_sessions_that_ended_where_others_were_cut_off(setting: Config) -> None:
    steps = log_of(setting, REWARDS, LEAVES, sessions=1_500, seed=2)
    left = np.flatnonzero(steps.following == LEFT)
    cut = np.random.default_rng(0).random(len(left)) < 0.2  # whoever they are, so that the others tell as much
    steps.follow(left[cut], CUT)
    policy = vector(setting, 0.0)
    asked = OffPolicy(steps, setting, num_candidates=2, seed=0, settings=FAST)
    assert len(asked._paths.groups) == (~cut).sum()
    assert asked.value(policy).estimates["ncis"].mean == pytest.approx(steps.list_rewards.sum() / len(left), rel=0.1)
    strict = Settings(num_updates=0, resamples=20, limits=NO_LIMITS, min_effective_sessions=1e9)
    refused = OffPolicy(steps, setting, num_candidates=2, seed=0, settings=strict).value(policy).refused["ncis"]
    assert f"of {(~cut).sum()} ({cut.sum()} were cut off and are left out)" in refused


def test_the_mean_so_far_follows_the_session(setting: Config) -> None:
    steps = Steps(setting, 3)
    steps.add(
        {"sessions": 0, "users": 0, "rounds": 0, "arms": 0}, {name: column[:3] for name, column in Steps(setting, 3)._columns.items()}
    )
    steps.follow(np.array([0]), np.array([2]))
    assert mean_so_far(np.array([[1.0], [5.0], [3.0]]), steps).tolist() == [[1.0], [5.0], [2.0]]


def test_bounds_take_the_spread_and_not_the_bias_of_resamples() -> None:
    draws = Draws(1.0, np.array([2.0, 3.0, 4.0]))
    assert draws.bound(0.0) == 0.0 and draws.bound(1.0) == 2.0


# MTF-GAUC of steps and the command


def test_shown_pairs_carry_label_weight_and_user(config: Config) -> None:
    assert label_of(config, None) == (1, 10.0)
    assert label_of(config, "like>0.5") == (2, 0.5)
    with pytest.raises(ConfigError, match="not behaviour>threshold"):
        label_of(config, "likes>1")
    steps = Steps(config, 1)
    columns = {name: column[:1].copy() for name, column in Steps(config, 1)._columns.items()}
    columns["shown"][0, :2] = columns["valid"][0, :2] = 1
    columns["behaviours"][0, :2, 1] = (11.0, 10.0)
    columns["rewards"][0, :2] = ((0.5, 0.25), (0.0, -3.0))
    steps.add({"sessions": 4, "users": 7, "rounds": 0, "arms": 0}, columns)
    pairs = shown_pairs(steps, config, label=(1, 10.0))
    assert pairs.labels.tolist() == [1.0, 0.0] and pairs.user.tolist() == [7, 7]
    assert pairs.weights.tolist() == [1.75, 0.0]
    assert shown_pairs(steps, config, label=(1, 10.0), plus_one=False).weights.tolist() == [0.75, 0.0]
    with pytest.raises(ConfigError, match="no categorical feature"):
        shown_pairs(steps, config, label=(1, 10.0), context="tab")


def test_shown_pairs_are_grouped_by_user_and_context(config: Config) -> None:
    """User 7 in tab 1, in tab 2, user 8 in tab 1: what is ranked rightly in each tab is not over both."""
    config = with_codes(config)
    steps = Steps(config, 3)
    columns = {name: column[:3].copy() for name, column in Steps(config, 3)._columns.items()}
    columns["shown"][:, :2] = columns["valid"][:, :3] = 1
    columns["behaviours"][:, 0, 2] = 1  # a like of the first pair
    columns["categorical"][..., 1] = np.array([1, 2, 1])[:, None]
    columns["categorical"][..., 0] = np.arange(config.max_pairs) % 7  # of items: they group nothing
    steps.add({"sessions": [0, 1, 2], "users": [7, 7, 8], "rounds": 0, "arms": 0}, columns)
    pairs = shown_pairs(steps, config, label=(2, 0.5), context="tab")
    assert pairs.labels.tolist() == [1, 0, 1, 0, 1, 0] and pairs.user.tolist() == [7, 7, 7, 7, 8, 8]
    assert pairs.groups["user"].tolist() == pairs.user.tolist()
    assert pairs.groups["user_tab"].tolist() == [0, 0, 1, 1, 2, 2]
    scores = np.array([0.2, 0.1, 0.8, 0.3, 0.4, 0.5], np.float32)
    found = {name: group_auc(scores, pairs.labels, pairs.weights, groups, pairs.user) for name, groups in pairs.groups.items()}
    # User 7 over both tabs: .2 > .1, .8 > .1, .8 > .3 of four comparisons.
    assert found["user"].auc.tolist() == [0.75, 0.0] and found["user"].user.tolist() == [7, 8]
    assert found["user_tab"].auc.tolist() == [1.0, 1.0, 0.0] and found["user_tab"].user.tolist() == [7, 7, 8]
