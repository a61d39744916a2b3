"""The split critic: its equations against slow loops and hand numbers, and what each part may see."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from esrl_ray.algo.networks import SplitCritics
from esrl_ray.algo.split import lambda_return, split_losses
from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError
from esrl_ray.replay.chains import followers, future_columns
from tests.transitions import make_transitions


def _row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_the_lambda_return_of_three_lists_by_hand() -> None:
    # gamma .5, lambda .5; the user leaves after the third list: G3 = r3 = 8
    # G2 = 4 + .5 (.5 V3 + .5 G3) = 4 + .5 (.5 * 6 + .5 * 8) = 7.5;  G1 = 2 + .5 (.5 V2 + .5 G2) = 2 + .5 (.5 * 10 + .5 * 7.5) = 6.375
    result = lambda_return(_row(2, 4, 8), _row(1, 10, 6), _row(1, 1, 1), _row(0, 0, 1), gamma=0.5, trace=0.5)
    assert result.tolist() == [6.375]


def test_the_lambda_return_stops_at_the_value_where_the_session_is_not_known_further() -> None:
    # two lists are known; what follows the second is not: G2 = V2 = 10, G1 = 2 + .5 * 10
    assert lambda_return(_row(2, 4, 0), _row(1, 10, 99), _row(1, 1, 0), _row(0, 0, 0), gamma=0.5, trace=1.0).tolist() == [7.0]
    assert lambda_return(_row(2, 0, 0), _row(1, 99, 99), _row(1, 0, 0), _row(0, 0, 0), gamma=0.5, trace=1.0).tolist() == [1.0]
    assert lambda_return(_row(2, 0, 0), _row(1, 99, 99), _row(1, 0, 0), _row(1, 0, 0), gamma=0.5, trace=1.0).tolist() == [2.0]
    assert lambda_return(_row(5, 5, 5), _row(9, 9, 9), _row(0, 0, 0), _row(0, 0, 0), gamma=0.5, trace=1.0).tolist() == [0.0]


def test_with_trace_0_it_is_the_one_step_target_and_with_trace_1_the_discounted_sum() -> None:
    rng = np.random.default_rng(0)
    rewards, values = (torch.from_numpy(rng.normal(size=(16, 5))) for _ in range(2))
    known, terminated = torch.ones(16, 5), torch.zeros(16, 5)
    terminated[:, -1] = 1
    one = lambda_return(rewards, values, known, terminated, gamma=0.9, trace=0.0)
    assert torch.allclose(one, rewards[:, 0] + 0.9 * values[:, 1])
    whole = lambda_return(rewards, values, known, terminated, gamma=0.9, trace=1.0)
    assert torch.allclose(whole, (rewards * 0.9 ** torch.arange(5)).sum(1))


def test_split_losses_equal_the_slow_loop() -> None:
    rng = np.random.default_rng(1)
    m, b, lists = 3, 6, 4
    pairs, users = rng.normal(size=(2, m, b, lists)), rng.normal(size=(2, m, b))
    rewards, after = rng.normal(size=(b, lists)), rng.normal(size=b)
    shown = (np.arange(lists) < rng.integers(1, lists + 1, b)[:, None]).astype(float)
    tensors = [torch.from_numpy(x) for x in (pairs, users, rewards, shown)]
    losses = split_losses(tensors[0], tensors[1], tensors[2], tensors[3], after=torch.from_numpy(after))
    for n in range(m):
        reward = [(pairs[0, n, i, j] - rewards[i, j]) ** 2 for i in range(b) for j in range(lists) if shown[i, j]]
        long_term, value = [], []
        for i in range(b):
            here = [j for j in range(lists) if shown[i, j]]
            long_term.append((sum(pairs[1, n, i, j] for j in here) + users[0, n, i] - after[i]) ** 2)
            value.append((users[1, n, i] - sum(rewards[i, j] for j in here) - after[i]) ** 2)
        np.testing.assert_allclose(
            [losses.reward[n], losses.long_term[n], losses.value[n]], [np.mean(x) for x in (reward, long_term, value)]
        )


def test_followers_and_their_columns_follow_the_session() -> None:
    following = np.array([2, -2, 3, -1, 1])  # 0 → 2 → 3 → not known; 4 → 1 → the user left
    chain = followers(following, np.array([0, 4, 3]), 3)
    assert chain.tolist() == [[2, 3, -1], [1, -1, -1], [-1, -1, -1]]
    columns = {
        "states": np.arange(5, dtype=np.float32)[:, None, None].repeat(2, 1),
        "categorical": np.zeros((5, 2, 0), np.int32),
        "rewards": np.arange(10, dtype=np.float32).reshape(5, 2, 1),
        "shown": np.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1]], np.float32),
    }
    future = future_columns(columns, following == -2, chain)
    assert future["future_known"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert future["future_terminated"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert future["future_states"][..., 0].tolist() == [[2, 3, 0], [1, 0, 0], [0, 0, 0]]
    assert future["future_rewards"][..., 0].tolist() == [[9, 13, 0], [2, 0, 0], [0, 0, 0]]


def _split(config: Config, **learner: Any) -> Config:
    settings = {"critic": "split", "hidden_sizes": (16,), "batch_size": 8, **learner}
    return config.model_copy(update={"learner": config.learner.model_copy(update=settings)})


def test_the_users_critics_see_nothing_of_the_item(config: Config) -> None:
    state = LearnState.create(_split(config), device="cpu")
    transitions = make_transitions(config, 8, horizon=3)
    item = slice(len(config.spec.user_features), len(config.spec.user_features) + len(config.spec.item_features))
    before = prepare(state, transitions).future
    transitions["states"][..., item] += 5
    transitions["scores"] *= 3
    transitions["future_states"][..., item] += 5
    after = prepare(state, transitions).future
    assert before is not None and after is not None and torch.equal(before.numeric, after.numeric)


def test_folding_changes_no_function_of_the_split_critic(config: Config) -> None:
    deployment = _split(config)
    state = LearnState.create(deployment, device="cpu")
    critics, n = state.networks.critics, state.networks
    assert isinstance(critics, SplitCritics)
    transitions = make_transitions(config, 8, horizon=3)

    def values() -> list[torch.Tensor]:
        batch = prepare(state, transitions)
        scale = n.value_scale.norm()
        assert batch.future is not None
        flat = batch.future.numeric.flatten(0, 1), batch.future.categorical.flatten(0, 1)
        return [critics.pairs(batch.numeric.flatten(0, 1), batch.categorical.flatten(0, 1)) * scale, critics.users(*flat) * scale]

    with torch.no_grad():
        before = values()
        width = len(n.mean)
        rng = np.random.default_rng(0)
        normaliser = type(n.normaliser)(rng.normal(size=width).astype(np.float32), rng.uniform(0.5, 2, width).astype(np.float32))
        n.set_scales(normaliser, np.array([2.0, 0.5], np.float32), fold=True)
        pairs, _ = values()
    assert torch.allclose(before[0], pairs, atol=1e-4)


def test_the_split_critic_finds_the_pair_that_keeps_the_user(config: Config) -> None:
    """Rewards say nothing; the user stays exactly when the first feature of the shown pairs sums to more than 0: f must rank by it."""
    deployment = _split(config, batch_size=64, critic_lr=3e-3, hidden_sizes=(32,))
    state = LearnState.create(deployment, device="cpu")
    for step in range(150):
        t = make_transitions(config, 64, seed=step, list_size=5, horizon=2)
        t["rewards"][:] = 0
        stays = ((t["states"][..., 0] * t["shown"]).sum(1) > 0).astype(np.float32)
        t["has_next"][:], t["terminated"][:] = stays, 1 - stays
        t["future_known"][:] = stays[:, None]
        t["future_terminated"][:] = np.array([0, 1]) * stays[:, None]
        t["future_rewards"][:] = 1.0
        update(state, prepare(state, t))
    test = make_transitions(config, 64, seed=999, list_size=5, horizon=2)
    batch = prepare(state, test)
    critics = state.networks.critics
    assert isinstance(critics, SplitCritics)
    with torch.no_grad():
        f = critics.pairs(batch.numeric.flatten(0, 1), batch.categorical.flatten(0, 1))[1].mean(0)
    assert np.corrcoef(f.numpy(), test["states"][..., 0].ravel())[0, 1] > 0.8


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
    expected = [(t["actions"][i] - t["anchor_actions"][i])[shown[i]].mean(0) / state.bounds.width for i in range(8)]
    np.testing.assert_allclose(batch.list_relative[:, 0], expected, rtol=1e-4, atol=1e-5)
    item = slice(len(config.spec.user_features), len(config.spec.user_features) + len(config.spec.item_features))
    assert not batch.numeric[..., item].any() and not batch.numeric[..., config.spec.build().num_features :].any()
    cast(Any, t)["states"][..., item] += 3
    assert torch.equal(prepare(state, t).numeric, batch.numeric)
