"""Oracles: their truth against what users do, and that knowing more earns more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError
from esrl_ray.evaluation.frozen import evaluate_frozen, play, scores_of
from esrl_ray.policy.policy import Policy
from esrl_ray.reward import RewardConfig, RewardGroup, rewards_of
from esrl_ray.simulation.oracle import TrueOracle, create_oracle, expected_reward, full_oracle, observed_oracle
from esrl_ray.simulation.users import BEHAVIOURS, Page, Sessions, World
from esrl_ray.vocabulary import Floats

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
SEED, NUM_DRAWS = 5, 10_000


@pytest.fixture(scope="module")
def small() -> Config:
    """A world of few users and items, which is quickly made."""
    return load_config(DEMO, ["simulation.num_users=100", "simulation.num_items=2000"])


@pytest.fixture(scope="module")
def world(small: Config) -> World:
    return World(small, seed=SEED)


def same_user(world: World, count: int) -> Sessions:
    """Sessions of one user in one mood: they differ in their draws only."""
    sessions = world.start(np.arange(count), np.full(count, 3))
    sessions.satisfaction[:] = 0.3
    return sessions


@pytest.fixture(scope="module")
def first_places(world: World) -> tuple[Sessions, Page, Floats]:
    """Six items, each shown often in the first place, which is always looked at: (6, draws, behaviours)."""
    page = world.candidates(same_user(world, 1))
    seen = []
    for i in range(6):
        shown = np.tile(page.items[:, [i, *range(10, 14)]], (NUM_DRAWS, 1))
        seen.append(world.respond(same_user(world, NUM_DRAWS), shown)[0][:, 0])
    return same_user(world, 1), page, np.stack(seen)


@pytest.mark.parametrize(
    "expression",
    [
        None,
        "watch_s",
        "2 * min(watch_s, 20) - 3 * min(click, 0.5)",
        "(watch_s > 30) + (comment > 0)",
        "(watch_s > -1) + 5 * (watch_s > 240)",
        "1 + (log1p(like) + watch_s / 60) * 2",
    ],
    ids=["the demo's", "plain", "caps", "thresholds", "thresholds that are always or never passed", "other functions"],
)
def test_the_expected_reward_is_the_mean_of_what_users_do(
    small: Config, world: World, first_places: tuple[Sessions, Page, Floats], expression: str | None
) -> None:
    sessions, page, seen = first_places
    groups = small.reward.groups if expression is None else (RewardGroup(name="all", expression=expression),)
    config = RewardConfig(behaviours=small.reward.behaviours, groups=groups)
    rewards = rewards_of(seen, config).sum(-1).astype(np.float64)  # (6, draws)
    error = rewards.std(1) / np.sqrt(NUM_DRAWS)
    expected = expected_reward(world.truth(sessions, page.items[:, :6]), config)[0]
    assert np.abs(rewards.mean(1) - expected).max() < 4 * error.max() + 1e-9
    if np.ptp(expected) > 1e-9:
        assert np.corrcoef(rewards.mean(1), expected)[0, 1] > 0.98


@pytest.mark.parametrize(
    "group", [{"expression": "watch_s * like"}, {"expression": "click", "default": -1.0}], ids=["a product", "a default"]
)
def test_a_reward_without_a_closed_form_is_refused_by_name(small: Config, world: World, group: dict[str, Any]) -> None:
    sessions = same_user(world, 1)
    config = RewardConfig(behaviours=small.reward.behaviours, groups=(RewardGroup(name="all", **group),))
    with pytest.raises(ConfigError, match=r"reward\.groups\.0"):
        expected_reward(world.truth(sessions, world.candidates(sessions).items), config)


def test_rare_behaviours_happen_as_often_as_the_truth_says(world: World, first_places: tuple[Sessions, Page, Floats]) -> None:
    sessions, page, seen = first_places
    truth = world.truth(sessions, page.items[:, :6])
    for name in ("click", "like", "comment", "forward", "dislike"):
        expected = getattr(truth, name)[0]
        error = np.sqrt(expected * (1 - expected) / NUM_DRAWS)
        assert (np.abs(seen[..., BEHAVIOURS.index(name)].mean(1) - expected) < 4.5 * error + 1e-4).all(), name


def test_a_page_moves_satisfaction_by_the_true_gain(world: World) -> None:
    sessions = same_user(world, 50)
    page = world.candidates(sessions)
    shown = page.items[:, :5]
    gain = world.truth(sessions, shown).gain
    before = sessions.satisfaction.copy()
    world.respond(sessions, shown)
    np.testing.assert_allclose(sessions.satisfaction, 0.85 * before + 0.3 * gain.mean(1))


def test_asking_for_the_truth_changes_nothing(world: World) -> None:
    sessions = same_user(world, 10)
    before = sessions.take(slice(None))
    page = world.candidates(sessions)
    world.truth(sessions, page.items)
    for name in Sessions.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(sessions, name), getattr(before, name))


def test_the_oracle_of_instant_reward_orders_by_it(small: Config, world: World) -> None:
    oracle = create_oracle("oracle-instant", small, seed=0)
    sessions = world.start(np.arange(30), np.arange(30))
    page = world.candidates(sessions)
    np.testing.assert_allclose(scores_of(oracle, page, sessions), expected_reward(world.truth(sessions, page.items), small.reward))


def test_kappa_weighs_satisfaction(small: Config, world: World) -> None:
    sessions = world.start(np.arange(30), np.arange(30))
    page = world.candidates(sessions)
    without, with_it = (TrueOracle.create(small, kappa=k).score(page, sessions) for k in (0.0, 2.0))
    np.testing.assert_allclose(with_it - without, 2 * world.truth(sessions, page.items).gain)


def test_the_best_kappa_is_the_top_of_the_parabola(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def earn(ranker: TrueOracle, config: Config, *, seed: int, sessions: int) -> tuple[np.ndarray]:
        return (np.full(sessions, 5 - 100 * (ranker.kappa - 0.22) ** 2),)

    monkeypatch.setattr("esrl_ray.simulation.oracle.play", earn)
    assert full_oracle(small, seed=0, sessions=2).kappa == pytest.approx(0.22)
    assert full_oracle(small, seed=0, sessions=2, kappas=(0.3, 0.4, 0.5)).kappa == 0.3  # never beyond what was tried
    assert full_oracle(small, seed=0, sessions=2, kappas=(0.1, 0.3)).kappa == 0.3


@pytest.fixture(scope="module")
def observed(small: Config) -> Policy:
    return observed_oracle(small, seed=1, sessions=80, steps=(150, 350), kappas=(0.2,))


def test_who_knows_more_earns_more(small: Config, observed: Policy) -> None:
    control = Policy.static(small.spec.build())
    instant, full = create_oracle("oracle-instant", small, seed=1), full_oracle(small, seed=1, sessions=80, kappas=(0.0, 0.2))
    assert full.kappa > 0
    results = evaluate_frozen([control, instant, observed, full], small, seed=1, sessions=300)
    means = [result.reward.mean or 0.0 for result in results]
    assert means[0] < means[1] < means[2] < means[3]
    gained = results[2].difference
    assert gained.ci_low is not None and gained.ci_low > 0
    assert results[2].pages > 1.3 * results[1].pages  # instant reward does not keep users


def test_the_observed_oracle_is_a_policy_that_can_be_kept(small: Config, observed: Policy, tmp_path: Path) -> None:
    observed.save(tmp_path / "oracle")
    loaded = Policy.load(tmp_path / "oracle")
    for before, after in zip(play(observed, small, seed=9, sessions=50), play(loaded, small, seed=9, sessions=50), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_same_seed_gives_the_same_oracle(small: Config) -> None:
    one, two, other = (observed_oracle(small, seed=seed, sessions=3, steps=(10, 10), kappas=(0.2,)) for seed in (1, 1, 2))
    assert one.manifest.digest == two.manifest.digest != other.manifest.digest


def test_an_unknown_oracle_is_refused(small: Config) -> None:
    with pytest.raises(KeyError, match="oracle-instant, oracle-observed, oracle-full"):
        create_oracle("delphi", small, seed=0)
