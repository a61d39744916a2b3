"""The split critic: its equations against slow loops and hand numbers, and what each part may see."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from esrl_ray.algo.networks import SplitCritics
from esrl_ray.algo.split import lists_ahead, reward_losses
from esrl_ray.algo.update import LearnState, _effects, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError
from esrl_ray.normaliser import Normaliser
from esrl_ray.replay.chains import cohorts, followers, long_term_columns
from tests.transitions import make_transitions


def test_lists_ahead_by_hand() -> None:
    # gamma .5, a quarter leaves after each list: e = .375 / .625 = .6
    def ahead(known: list[float], terminated: list[float], ended: float) -> float:
        a, b, c = (torch.tensor([column], dtype=torch.float32) for column in (known, terminated, ended))
        return lists_ahead(a, b, c, torch.tensor(0.25), gamma=0.5).item()

    assert ahead([0, 0, 0], [0, 0, 0], 1) == 0  # the user left after this list
    assert ahead([1, 1, 0], [0, 1, 0], 0) == pytest.approx(0.5 + 0.25)  # two more, then left
    assert ahead([1, 1, 0], [0, 0, 0], 0) == pytest.approx(0.5 + 0.25 + 0.25 * 0.6)  # two more, what follows is not known
    assert ahead([1, 1, 1], [0, 0, 0], 0) == pytest.approx(0.5 + 0.25 + 0.125 + 0.125 * 0.5 * 1.6)  # longer than we look
    assert ahead([0, 0, 0], [0, 0, 0], 0) == pytest.approx(0.6)


def test_lists_ahead_are_right_on_average_whatever_the_horizon() -> None:
    leaving, gamma, rng = 0.2, 0.9, np.random.default_rng(0)
    more = rng.geometric(leaving, 100_000) - 1  # lists after this one
    expected = gamma * (1 - leaving) / (1 - gamma * (1 - leaving))
    for horizon in (1, 4):
        number = np.arange(1, horizon + 1)
        known, last = (number <= more[:, None]).astype(np.float32), (number == more[:, None]).astype(np.float32)
        ended = torch.from_numpy((more == 0).astype(np.float32))
        result = lists_ahead(torch.from_numpy(known), torch.from_numpy(last), ended, torch.tensor(leaving), gamma=gamma)
        assert float(result.mean()) == pytest.approx(expected, rel=0.02)


def test_reward_losses_equal_the_slow_loop() -> None:
    rng = np.random.default_rng(1)
    q, m, b, lists = 2, 3, 6, 4
    values, rewards = rng.normal(size=(q, m, b, lists)), rng.normal(size=(b, lists, q))
    shown = (np.arange(lists) < rng.integers(1, lists + 1, b)[:, None]).astype(float)
    found = reward_losses(*(torch.from_numpy(x) for x in (values, rewards, shown)))
    for i in range(q):
        for n in range(m):
            errors = [(values[i, n, x, j] - rewards[x, j, i]) ** 2 for x in range(b) for j in range(lists) if shown[x, j]]
            assert float(found[i, n]) == pytest.approx(np.mean(errors))


def test_followers_and_their_columns_follow_the_session() -> None:
    following = np.array([2, -2, 3, -1, 1])  # 0 → 2 → 3 → not known; 4 → 1 → the user left
    chain = followers(following, np.array([0, 4, 3]), 3)
    assert chain.tolist() == [[2, 3, -1], [1, -1, -1], [-1, -1, -1]]
    rng = np.random.default_rng(4)
    means, steps = rng.normal(size=(5, 3)).astype(np.float32), np.array([0, 4, 3])
    cohort = cohorts(np.array([7, 7, 7, 8, 7]), np.array([0, 0, 0, 0, 2]))
    assert cohort[0] == cohort[1] == cohort[2] and len(set(cohort.tolist())) == 3  # another round, another arm
    told = np.ones(5, np.float32)
    future = long_term_columns(following == -2, steps, chain, means=means, told=told, cohorts=cohort)
    assert future["future_known"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert future["future_terminated"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(future["candidate_means"], means[steps])
    assert future["cohort"][0] != future["cohort"][1] and future["cohort"][0] != future["cohort"][2]
    assert future["future_change_known"].tolist() == [1, 0, 0]
    np.testing.assert_array_equal(future["future_change"][0], means[3] - means[0])  # the second next of 0; the others have none
    assert not future["future_change"][1:].any()
    one = long_term_columns(following == -2, steps, chain[:, :1], means=means, told=told, cohorts=cohort)
    assert one["future_change"].shape == (3, 3) and not one["future_change"].any() and not one["future_change_known"].any()
    told[3] = 0  # means of the logged pairs are not compared with means of all
    mixed = long_term_columns(following == -2, steps, chain, means=means, told=told, cohorts=cohort)
    assert not mixed["future_change"].any() and not mixed["future_change_known"].any()
    same = long_term_columns(
        following == -2, np.array([1, 3]), followers(following, np.array([1, 3]), 3), means=means, told=told, cohorts=0 * cohort
    )
    assert same["cohort"][0] != same["cohort"][1]


def _split(config: Config, **learner: Any) -> Config:
    settings = {"critic": "split", "hidden_sizes": (16,), "batch_size": 8, **learner}
    return config.model_copy(update={"learner": config.learner.model_copy(update=settings)})


def test_a_new_normaliser_and_new_value_scales_change_nothing_of_the_split_critic(config: Config) -> None:
    state = LearnState.create(_split(config), device="cpu")
    transitions = make_transitions(config, 64)
    for _ in range(15):
        update(state, prepare(state, transitions))
    critics, n = state.networks.critics, state.networks
    assert isinstance(critics, SplitCritics)

    def values() -> tuple[torch.Tensor, torch.Tensor]:
        batch = prepare(state, transitions)
        with torch.no_grad():
            predicted = critics.rewards(batch.numeric.flatten(0, 1), batch.categorical.flatten(0, 1)).unflatten(-1, batch.valid.shape)
            return predicted * n.value_scale.view(-1, 1, 1, 1), critics.long_term(_effects(n, batch.numeric, predicted))

    before, width, rng = values(), len(n.mean), np.random.default_rng(0)
    assert before[1].std() > 0
    normaliser = Normaliser(rng.normal(size=width).astype(np.float32), rng.uniform(0.5, 2, width).astype(np.float32))
    n.set_scales(normaliser, np.array([2.0, 0.5], np.float32), fold=True)
    for old, new in zip(before, values(), strict=True):
        assert torch.allclose(old, new, atol=1e-4)


def test_the_split_critic_finds_the_pair_that_keeps_the_user(config: Config) -> None:
    """Rewards are the same for all; whether the user stays depends on the first feature of the item: f must rank by it."""
    deployment = _split(config, batch_size=64, hidden_sizes=(32,))
    state = LearnState.create(deployment, device="cpu")
    column = state.networks.spec.item_inputs[0]
    for step in range(60):
        t = make_transitions(config, 64, seed=step, list_size=5, horizon=2)
        t["rewards"][:] = 1
        stays = ((t["states"][..., column] * t["shown"]).sum(1) > 0).astype(np.float32)
        t["has_next"][:], t["terminated"][:] = stays, 1 - stays
        t["future_known"][:] = stays[:, None]
        t["future_terminated"][:] = np.array([0, 1]) * stays[:, None]
        update(state, prepare(state, t))
    test = make_transitions(config, 64, seed=999, list_size=5, horizon=2)
    batch, critics = prepare(state, test), state.networks.critics
    assert isinstance(critics, SplitCritics)
    with torch.no_grad():
        predicted = critics.rewards(batch.numeric.flatten(0, 1), batch.categorical.flatten(0, 1)).unflatten(-1, batch.valid.shape)
        f = critics.long_term(_effects(state.networks, batch.numeric, predicted))
    assert np.corrcoef(f.numpy().ravel(), test["states"][..., column].ravel())[0, 1] > 0.9


def test_the_change_of_scores_is_that_of_the_means_over_candidates_around_the_next_list(config: Config) -> None:
    state = LearnState.create(_split(config), device="cpu")
    n, t = state.networks, make_transitions(config, 16)
    width, rng = len(n.mean), np.random.default_rng(5)
    normaliser = Normaliser(rng.normal(size=width).astype(np.float32), rng.uniform(0.5, 2, width).astype(np.float32))
    n.set_scales(normaliser, np.ones(config.reward.num_groups, np.float32), fold=True)
    future, spec = prepare(state, t).future, n.spec
    assert future is not None and 0 < future.change_known.sum() < 16
    for row in range(16):
        change = t["future_change"][row]
        means = t["candidate_means"][row]
        user = ((means - normaliser.mean) / normaliser.std)[list(spec.request_inputs)]
        np.testing.assert_array_equal(future.given[row, :width], means)
        np.testing.assert_allclose(future.given[row, width:], np.outer(user, user)[np.triu_indices(len(user))], atol=1e-4)
        assert future.cohort[row] == t["cohort"][row]
        np.testing.assert_allclose(future.held[row, : len(spec.item_inputs)], change[list(spec.item_inputs)], atol=1e-4)
        np.testing.assert_allclose(future.score_change[row], change[spec.num_features :], atol=1e-4)
        if t["has_next"][row]:
            request, columns = t["next_states"][row, t["next_shown"][row].argmax()], list(spec.request_inputs)
            np.testing.assert_array_equal(future.next_request[row], request[columns])
            standard = ((request - normaliser.mean[: len(request)]) / normaliser.std[: len(request)])[columns]
            products = np.outer(change[list(spec.item_inputs)], standard).ravel()
            np.testing.assert_allclose(future.held[row, len(spec.item_inputs) :], products, atol=1e-3)
    for without in ({"score_changes": False}, {"horizon": 1}):
        deployment = _split(config, **without)
        other = prepare(LearnState.create(deployment, device="cpu"), make_transitions(deployment, 16)).future
        assert other is not None and not other.change_known.any() and not other.score_change.any()


def test_split_with_the_printed_actor_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not see actions"):
        load_config(None, ["learner.critic=split", "learner.actor_loss=printed"])
    with pytest.raises(ConfigError, match="one action for a whole list"):
        load_config(None, ["learner.level=request"])


def test_request_level_sums_rewards_and_averages_actions(config: Config) -> None:
    settings = {"critic": "list_sum", "level": "request", "actor_loss": "printed", "hidden_sizes": (16,)}
    deployment = config.model_copy(update={"learner": config.learner.model_copy(update=settings)})
    state = LearnState.create(deployment, device="cpu")
    t = make_transitions(config, 8)
    batch = prepare(state, t)
    shown = t["shown"] > 0
    assert batch.numeric.shape[1] == 1
    np.testing.assert_allclose(batch.list_rewards[:, 0], (t["rewards"] * shown[..., None]).sum(1), rtol=1e-5, atol=1e-5)
    expected = [t["actions"][i][shown[i]].mean(0) / state.bounds.width for i in range(8)]
    np.testing.assert_allclose(batch.list_actions[:, 0], expected, rtol=1e-4, atol=1e-5)
    item = slice(len(config.spec.user_features), len(config.spec.user_features) + len(config.spec.item_features))
    assert not batch.numeric[..., item].any() and not batch.numeric[..., config.spec.build().num_features :].any()
    cast(Any, t)["states"][..., item] += 3
    assert torch.equal(prepare(state, t).numeric, batch.numeric)
