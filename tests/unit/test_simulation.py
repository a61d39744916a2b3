"""The simulator: its calibration, its common random numbers, and the truths that methods are told apart by."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError
from esrl_ray.fusion import fused_scores
from esrl_ray.methods.method import Exploration
from esrl_ray.policy.policy import Policy
from esrl_ray.reward import rewards_of
from esrl_ray.simulation.rounds import SimulatedTraffic
from esrl_ray.simulation.users import BEHAVIOURS, Page, Sessions, World
from esrl_ray.vocabulary import Floats

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
N_SESSIONS = 1500


@pytest.fixture(scope="module")
def world(config: Config) -> World:
    return World(config, seed=1)


@pytest.fixture(scope="module")
def under_control(world: World, config: Config) -> dict[str, float]:
    """Every session to its end under the hand-made policy."""
    spec = config.spec.build()
    running, alive = world.start(np.arange(N_SESSIONS), np.arange(N_SESSIONS) % world.num_users), np.arange(N_SESSIONS)
    seen, reward, pages = [], 0.0, 0
    while len(alive):
        part = running.take(alive)
        page = world.candidates(part)
        fused = fused_scores(torch.from_numpy(page.scores), torch.zeros((*page.items.shape, spec.num_actions)), spec).numpy()
        top = np.argsort(-fused, axis=1)[:, : config.serve.list_size]
        behaviours, left = world.respond(part, np.take_along_axis(page.items, top, axis=1))
        running.put(alive, part)
        seen.append(behaviours)
        reward += float(rewards_of(behaviours, config.reward).sum())
        pages += len(alive)
        alive = alive[~left]
    shown = np.concatenate(seen)
    means = dict(zip(BEHAVIOURS, shown.mean((0, 1)).tolist(), strict=True))
    positions = shown[..., 0].mean(0)
    return {
        **means,
        "valid": float((shown[..., 1] > 10).mean()),
        "reward": reward / N_SESSIONS,
        "pages": pages / N_SESSIONS,
        "click_first": float(positions[0]),
        "click_last": float(positions[-1]),
    }


@pytest.mark.parametrize(
    ("what", "expected", "tolerance"),
    [
        ("click", 0.449, 0.05),
        ("valid", 0.427, 0.03),
        ("watch_s", 26.0, 2.0),
        ("like", 0.017, 0.003),
        ("comment", 0.050, 0.007),
        ("forward", 0.0012, 0.0006),
        ("dislike", 0.0012, 0.0006),
        ("pages", 14.7, 1.0),
        ("reward", 17.2, 1.6),
    ],
)
def test_under_control_users_behave_as_in_the_experiments(
    under_control: dict[str, float], what: str, expected: float, tolerance: float
) -> None:
    assert under_control[what] == pytest.approx(expected, abs=tolerance)


def test_lower_positions_are_clicked_less(under_control: dict[str, float]) -> None:
    assert under_control["click_last"] < 0.85 * under_control["click_first"]


def begin(world: World, count: int, *, first: int = 0) -> tuple[Sessions, Page]:
    """Sessions `first` to `first + count - 1`, each of the user of its number, and their first requests."""
    ids = np.arange(first, first + count)
    sessions = world.start(ids, ids % world.num_users)
    return sessions, world.candidates(sessions)


def test_a_session_does_not_depend_on_which_others_run_beside_it(world: World) -> None:
    sessions, page = begin(world, 40)
    behaviours, left = world.respond(sessions, page.items[:, :5])
    again = world.candidates(sessions)
    for i in (0, 7, 39):
        alone, alone_page = begin(world, 1, first=i)
        np.testing.assert_array_equal(alone_page.items[0], page.items[i])
        np.testing.assert_allclose(alone_page.scores[0], page.scores[i], rtol=1e-5)
        alone_behaviours, alone_left = world.respond(alone, alone_page.items[:, :5])
        np.testing.assert_allclose(alone_behaviours[0], behaviours[i], rtol=1e-5)
        assert alone_left[0] == left[i]
        np.testing.assert_array_equal(world.candidates(alone).items[0], again.items[i])


def test_two_policies_meet_the_same_candidates_and_moods(world: World) -> None:
    one, page = begin(world, 200)
    other, same = begin(world, 200)
    np.testing.assert_array_equal(page.items, same.items)
    first, _ = world.respond(one, page.items[:, :5])
    shown = page.items[:, :5].copy()
    shown[:, 3:] = page.items[:, 10:12]  # the other policy shows two other items
    second, _ = world.respond(other, shown)
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    assert (first[:, 3:] != second[:, 3:]).any()
    np.testing.assert_array_equal(world.candidates(one).items, world.candidates(other).items)


def test_another_seed_gives_other_sessions_in_the_same_world(world: World, config: Config) -> None:
    _, page = begin(world, 20)
    _, other = begin(World(config, seed=2), 20)
    assert (page.items != other.items).any()
    np.testing.assert_array_equal(page.user_features, other.user_features)
    for features, items in zip(page.item_features.reshape(-1, 6)[:50], page.items.ravel()[:50], strict=True):
        where = np.argwhere(other.items == items)
        if len(where):
            np.testing.assert_array_equal(other.item_features[tuple(where[0])][:5], features[:5])


def test_another_world_seed_gives_other_users(world: World) -> None:
    other = World(load_config(DEMO, ["simulation.world_seed=1"]), seed=1)
    assert (begin(other, 20)[1].user_features != begin(world, 20)[1].user_features).any()


def test_upstream_scores_know_the_truth_only_in_part(world: World) -> None:
    sessions, page = begin(world, 400)
    assert page.scores.min() > 0
    np.testing.assert_allclose(page.scores.mean((0, 1)), 1.0, atol=0.15)
    users, pref = sessions.users[:, None], world._pref(sessions.users[:, None], page.items)
    truth = world._truth(pref, users, page.items, page.item_features[..., 5].astype(float), sessions.satisfaction[:, None])  # (n, N, 5)
    for h in range(truth.shape[-1]):
        known = np.corrcoef(np.log(page.scores[..., h]).ravel(), truth[..., h].ravel())[0, 1]
        assert 0.3 < known < 0.9, f"score {h} knows {known:.2f} of the truth"


def columns(page: Page, name: str, config: Config) -> Floats:
    """One item feature (n, N)."""
    values: Floats = page.item_features[..., config.spec.item_features.index(name)]
    return values


def lists_by(page: Page, values: Floats) -> np.ndarray:
    """The five items with the largest values."""
    return np.take_along_axis(page.items, np.argsort(-values, axis=1)[:, :5], axis=1)


def test_bait_is_clicked_and_regretted(world: World, config: Config) -> None:
    baited, page = begin(world, 500)
    spared, _ = begin(world, 500)
    bait = columns(page, "bait_proxy", config)
    clicked, _ = world.respond(baited, lists_by(page, bait))
    fewer, _ = world.respond(spared, lists_by(page, -bait))
    assert clicked[..., 0].mean() > fewer[..., 0].mean() + 0.05
    assert baited.satisfaction.mean() < spared.satisfaction.mean() - 0.3


def test_users_who_are_not_satisfied_leave_earlier(world: World) -> None:
    glad, page = begin(world, 3000)
    sad, _ = begin(world, 3000)
    glad.satisfaction[:], sad.satisfaction[:] = 2.0, -2.0
    shown = page.items[:, :5]
    assert world.respond(sad, shown)[1].mean() > 2 * world.respond(glad, shown)[1].mean()


def test_a_category_that_was_shown_tires_and_recovers(world: World, config: Config) -> None:
    sessions, page = begin(world, 50)
    assert not columns(page, "fatigue", config).any()
    world.respond(sessions, page.items[:, :5])
    tired = sessions.fatigue.copy()
    np.testing.assert_allclose(tired.sum(1), 0.3 * 5)
    world.respond(sessions, world.candidates(sessions).items[:, :5])
    idle = sessions.fatigue - 0.7 * tired < 1e-9  # categories that were not shown again
    assert idle.any()
    np.testing.assert_allclose(sessions.fatigue[idle], 0.7 * tired[idle])


def test_states_are_in_the_order_of_the_spec(world: World, config: Config) -> None:
    _, page = begin(world, 3)
    states, spec = page.states(), config.spec.build()
    assert states.shape == (3, config.simulation.num_candidates, spec.num_features)
    np.testing.assert_array_equal(states[1, 4], np.concatenate([page.user_features[1], page.item_features[1, 4], page.context_features[1]]))
    assert states[..., -1].all()  # `first`


def test_other_features_than_the_simulators_are_refused() -> None:
    config = load_config(DEMO, ["spec.context_features=[first, step]"])
    with pytest.raises(ConfigError, match=r"\['step', 'first'\].*spec\.context_features"):
        World(config, seed=0)


@pytest.mark.parametrize("scope", ["session", "request", "pair"])
def test_only_a_session_that_keeps_its_noise_keeps_the_centre_it_began_with(scope: Literal["session", "request", "pair"]) -> None:
    explore = load_config(DEMO, ["exploration.explore_share=1", "exploration.exploit_share=0"])
    spec, traffic = explore.spec.build(), SimulatedTraffic(explore, seed=0, capacity=2_000)
    low, high = np.full(spec.num_actions, -0.1, np.float32), np.full(spec.num_actions, 0.1, np.float32)
    for number, place in enumerate((0.3, -0.3)):
        centre = Policy.static(spec, np.full(spec.num_actions, place, np.float32))
        for _ in traffic.serve(Exploration(centre, low, high, scope=scope), centre, until=1_000 * (number + 1), number=number):
            pass
    steps = traffic.steps
    actions, anchors, rounds = steps.columns["actions"], steps.columns["anchor_actions"], steps.rounds
    outlasting = [rows for number in np.unique(steps.sessions) if np.ptp(rounds[rows := np.flatnonzero(steps.sessions == number)])]
    begun_later = np.setdiff1d(np.flatnonzero(rounds == 1), np.concatenate(outlasting))
    assert len(outlasting) > 50 and len(begun_later) > 50 and np.allclose(anchors[begun_later], -0.3)
    for rows in outlasting:
        if scope == "session":
            assert np.allclose(anchors[rows], 0.3) and np.ptp(actions[rows].reshape(-1, spec.num_actions), axis=0).max() < 1e-6
        else:
            assert np.allclose(anchors[rows], np.where(rounds[rows] == 0, 0.3, -0.3)[:, None, None])
