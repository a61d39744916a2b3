"""What a gradient step reads of its transitions: no padding, shown pairs for the critics, the next list where one follows, phi."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.algo.networks import Critics, SplitCritics
from esrl_ray.algo.update import Batch, LearnState, prepare, update
from esrl_ray.config import Config
from esrl_ray.vocabulary import TransitionBatch
from tests.transitions import make_transitions, with_codes, with_learner

KINDS: list[dict[str, Any]] = [
    {"critic": "split"},
    {"critic": "list_sum"},
    {"critic": "per_pair"},
    {"critic": "list_sum", "level": "request", "actor_loss": "printed"},
]


def _copy(transitions: TransitionBatch) -> TransitionBatch:
    return cast(TransitionBatch, {name: np.array(column) for name, column in transitions.items()})


def _garble(transitions: TransitionBatch, config: Config, pairs: np.ndarray, *, following: bool = False) -> None:
    """Other numbers in some pairs (B, G) of the lists, or of the next ones."""
    columns, prefix = cast(dict[str, np.ndarray], transitions), "next_" if following else ""
    for name in ("states",) if following else ("states", "actions", "anchor_actions", "rewards"):
        columns[prefix + name][pairs] += 1000
    columns[f"{prefix}scores"][pairs] = 7
    cardinalities = np.array([c.cardinality for c in config.spec.categorical_features], np.int32)
    columns[f"{prefix}categorical"][pairs] = (columns[f"{prefix}categorical"][pairs] + 1) % cardinalities


@pytest.mark.parametrize(
    "learner",
    [
        *KINDS,
        {"critic": "list_sum", "actor_loss": "printed"},
        {"critic": "list_sum", "phi": True, "continuous_penalty": True},
        {"critic": "split", "actor": "ple"},
    ],
)
def test_padding_changes_nothing(config: Config, learner: dict[str, Any]) -> None:
    config = with_learner(with_codes(config), **learner)
    transitions = make_transitions(config, 8)
    garbage = _copy(transitions)
    assert (transitions["valid"] == 0).any()
    _garble(garbage, config, transitions["valid"] == 0)
    _garble(garbage, config, transitions["next_shown"] == 0, following=True)
    results, states = [], []
    for batch in (transitions, garbage):
        state = LearnState.create(config, device="cpu")
        results.append(torch.stack([torch.stack(update(state, prepare(state, batch))) for _ in range(3)]))
        states.append(state)
    assert torch.equal(results[0], results[1])
    for a, b in zip(states[0].networks.parameters(), states[1].networks.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("learner", KINDS)
def test_critics_learn_from_shown_pairs_only(config: Config, learner: dict[str, Any]) -> None:
    """Of the unshown pairs the long-term value of the split critic reads the means that a step carries, and nothing else reads any."""
    config = with_learner(with_codes(config), soft_update_every=1, **learner)
    transitions = make_transitions(config, 8)
    unshown = (transitions["valid"] > 0) & (transitions["shown"] == 0)
    assert unshown.any()
    if learner.get("level") == "request":  # user and context are the same in all pairs, and read from the first
        unshown[np.arange(8), transitions["valid"].argmax(1)] = False
    other = _copy(transitions)
    _garble(other, config, unshown)
    critics, actors = [], []
    for batch in (transitions, other):
        state = LearnState.create(config, device="cpu")
        update(state, prepare(state, batch))
        critics.append(state.networks.critics.state_dict())
        actors.append(state.networks.actor.state_dict())
    for name, value in critics[0].items():
        assert torch.equal(value, critics[1][name]), name
    if learner.get("level") != "request":
        assert any(not torch.equal(value, actors[1][name]) for name, value in actors[0].items()), "the actor chooses among all pairs"


def test_only_long_term_value_reads_the_means_over_all_candidates(config: Config) -> None:
    config = with_learner(config, critic="split")
    transitions = make_transitions(config, 8)
    other = _copy(transitions)
    other["candidate_means"] += np.linspace(0, 1, other["candidate_means"].size, dtype=np.float32).reshape(8, -1)
    critics = []
    for batch in (transitions, other):
        state = LearnState.create(config, device="cpu")
        update(state, prepare(state, batch))
        assert isinstance(state.networks.critics, SplitCritics)
        critics.append(state.networks.critics)
    for a, b in zip(critics[0].rewards.parameters(), critics[1].rewards.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(critics[0].long_term.gram, critics[1].long_term.gram)


def test_the_lists_that_critics_read_are_the_shown_pairs_up_to_the_longest_list(config: Config) -> None:
    config = with_learner(config)
    transitions, state = make_transitions(config, 8), LearnState.create(config, device="cpu")
    batch = prepare(state, transitions)
    longest = int(transitions["shown"].sum(-1).max())
    assert batch.list_numeric.shape[1] == batch.list_shown.shape[1] == longest < config.max_pairs
    shown = transitions["shown"] > 0
    total = (transitions["rewards"] * shown[..., None]).sum(1)
    picked = (batch.list_rewards * batch.list_shown[..., None]).sum(1)
    np.testing.assert_allclose(picked.numpy(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("critic", ["list_sum", "per_pair"])
def test_terminated_stops_the_bootstrap_and_a_next_list_feeds_it(config: Config, critic: str) -> None:
    """A list that the user left, one cut off before the next is known, and one that both follow: only a known next list is read."""
    config = with_learner(config, critic=critic)
    transitions, state = make_transitions(config, 8), LearnState.create(config, device="cpu")
    transitions["has_next"][:4], transitions["terminated"][:4] = (1, 0, 0, 1), (0, 1, 0, 1)
    transitions["next_shown"][:, :2] = 1  # also where none follows, so that nothing else keeps it out
    follows = (transitions["has_next"] == 1) & (transitions["terminated"] == 0)
    assert follows[:4].tolist() == [True, False, False, False] and follows[4:].any()
    before, _ = state.losses.critics(state, prepare(state, transitions))
    for row in range(8):
        other = _copy(transitions)
        other["next_states"][row] += 1
        losses, _ = state.losses.critics(state, prepare(state, other))
        moved = losses != before  # (q, m)
        assert bool(moved.all() if follows[row] else not moved.any()), row


# phi


def _far_from_the_anchor(config: Config, **learner: Any) -> tuple[LearnState, Batch]:
    """Next actions on both sides of the bounds; critics that say 0 now and 1 of the next list, and no rewards: targets are counts."""
    config = with_learner(config, gamma=0.9, **learner)
    state, transitions = LearnState.create(config, device="cpu"), make_transitions(config, 8)
    n = state.networks
    assert isinstance(n.target_actor, Actor) and isinstance(n.critics, Critics) and isinstance(n.target_critics, Critics)
    with torch.no_grad():
        cast(torch.nn.Linear, n.target_actor.layers[-1]).weight.mul_(100)
        for parameter in (*n.critics.parameters(), *n.target_critics.parameters()):
            parameter.zero_()
        n.target_critics.biases[-1].fill_(1)
    n.set_static_anchor(np.full(config.spec.build().num_actions, 0.2, np.float32))
    transitions["rewards"][:] = 0
    return state, prepare(state, transitions)


def _phi_of_pairs(state: LearnState, batch: Batch) -> list[list[float]]:
    """exp(-mean excess / (beta width)) of the shown pairs of each next list, pair by pair."""
    assert state.networks.target_actor is not None
    with torch.no_grad():
        actions = state.networks.target_actor(batch.next_numeric, batch.next_categorical)
    low, high = state.bounds
    found: list[list[float]] = []
    for row in range(len(actions)):
        found.append([])
        for pair in range(actions.shape[1]):
            if batch.next_shown[row, pair]:
                offsets = (actions[row, pair] - batch.next_anchors[row, pair]).tolist()
                over = [max(low - x, x - high, 0.0) for x in offsets]
                found[-1].append(math.exp(-sum(over) / len(over) / (state.learner.penalty_scale * (high - low))))
    return found


@pytest.mark.parametrize("critic", ["list_sum", "per_pair"])
def test_phi_lowers_the_targets_of_next_actions_outside_the_bounds(config: Config, critic: str) -> None:
    found, expected = [], []
    for with_phi in (False, True):
        state, batch = _far_from_the_anchor(config, critic=critic, phi=with_phi)
        phis = _phi_of_pairs(state, batch)
        of_all = [phi for row in phis for phi in row]
        assert min(of_all) < 0.7 and max(of_all) > min(of_all) + 0.1
        targets = [0.9 * float(b) * sum(row if with_phi else [1.0] * len(row)) for b, row in zip(batch.bootstrap, phis, strict=True)]
        if critic == "per_pair":  # the mean over the next list is the target of each pair of this one
            lengths = batch.list_shown.sum(1).tolist()
            targets = [target / max(len(row), 1) for target, row in zip(targets, phis, strict=True)]
            expected.append(sum(n * target**2 for n, target in zip(lengths, targets, strict=True)) / sum(lengths))
        else:
            expected.append(sum(target**2 for target in targets) / 8)
        result = update(state, batch)
        assert float(result.phi_mean) == pytest.approx(sum(of_all) / len(of_all), rel=1e-5)
        found.append(float(result.critic_loss))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1] < 0.9 * found[0]
