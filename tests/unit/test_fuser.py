"""One decision: arms, noise, ranking, the unshown draw, the record."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.config import CategoricalConfig, Config, ServeConfig, SpecConfig
from esrl_ray.exploration import arm_of, exploration_noise
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.policy.store import PolicySnapshot
from esrl_ray.vocabulary import Arm, Round
from serve.fuser import Served, decide, is_control
from serve.schemas import FuseReply, Parsed, parse
from streaming.wire import MSGPACK, DecodedDecision, decode_decision, encode

CONFIG = Config(
    spec=SpecConfig(
        user_features=("act",),
        item_features=("duration",),
        context_features=("hour",),
        categorical_features=(CategoricalConfig(name="tab", cardinality=3, side="context"),),
        scores=("click", "watch"),
        power_base=(0.7, 1.3),
    ),
    serve=ServeConfig(list_size=3, num_unshown=4),
)
SPEC = CONFIG.spec.build()
TURN = Round(2, 2, 11, -0.15, 0.15, 0)
USERS = {arm: next(f"u{n}" for n in range(1000) if arm_of(f"u{n}", CONFIG.exploration) is arm) for arm in Arm}


def learnt(version: int) -> Policy:
    torch.manual_seed(version)
    actor = Actor(SPEC, (16,), 4)
    with torch.no_grad():
        actor.layers[-1].weight.mul_(100)  # type: ignore[operator] # far from a = 0
    parameters = {name: value.detach().numpy() for name, value in actor.state_dict().items()}
    manifest = Manifest(version=version, digest="", kind=PolicyKind.PAIR, spec=SPEC, hidden_sizes=(16,), embedding_size=4)
    return Policy.of(manifest, parameters, Normaliser.identity(SPEC))


CURRENT, ANCHOR, CONTROL = learnt(7), learnt(2), Policy.static(SPEC).numbered(9)


def served(current: Policy = CURRENT, *, pinned: bool = False) -> Served:
    return Served.decode(PolicySnapshot(1, current.to_bytes(), ANCHOR.to_bytes(), TURN, pinned, 1_000))


def parsed(user_id: str, num_candidates: int = 20, **more: Any) -> Parsed:
    rng = np.random.default_rng(3)
    candidates = [
        {"item_id": f"i{n}", "features": [float(rng.normal())], "scores": rng.uniform(0.05, 0.95, 2).tolist()}
        for n in range(num_candidates)
    ]
    tree = {
        "request_id": "r",
        "session_id": "s",
        "user_id": user_id,
        "user_features": [0.3],
        "context_features": [0.1],
        "context_categorical": [1],
    }
    return parse(json.dumps({**tree, "candidates": candidates, **more}).encode(), SPEC, CONFIG)


def made(request: Parsed, policies: Served, decision_id: str = "d") -> tuple[FuseReply, DecodedDecision]:
    reply, decision = decide(request, policies, CONFIG, decision_id=decision_id, now_ms=5)
    return reply, decode_decision(encode(decision), SPEC, MSGPACK)


def eq1(scores: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Eq. (1) in float64, as a plain loop."""
    fused = []
    for score, action in zip(scores.astype(np.float64), actions.astype(np.float64), strict=True):
        powers = np.array(SPEC.power_base) + SPEC.power_span * action[:2]
        biases = SPEC.bias_base + SPEC.bias_span * action[2:]
        fused.append(float(np.prod((score + biases) ** powers)))
    return np.array(fused)


@pytest.mark.parametrize("arm", list(Arm))
def test_the_ranking_is_that_of_equation_1_with_the_logged_actions(arm: Arm) -> None:
    request = parsed(USERS[arm], 7)  # 3 shown + 4 unshown: everything is logged
    reply, decision = made(request, served())
    assert reply.arm == decision.event.arm == arm
    by_item = dict(zip(decision.event.item_ids, eq1(decision.scores, decision.actions), strict=True))
    assert reply.item_ids == sorted(by_item, key=lambda item: -by_item[item])
    np.testing.assert_allclose(reply.fused_scores, [np.log(by_item[item]) for item in reply.item_ids], rtol=1e-4, atol=1e-5)
    assert decision.event.item_ids[:3] == reply.item_ids[:3] and decision.event.positions == [0, 1, 2, -1, -1, -1, -1]


def test_explore_is_the_anchor_plus_recomputable_noise_within_the_bounds() -> None:
    _, decision = made(parsed(USERS[Arm.EXPLORE]), served())
    noise = exploration_noise("d", decision.event.item_ids, SPEC.num_actions, TURN, scope="pair")
    np.testing.assert_array_equal(decision.actions, np.clip(decision.anchor_actions + noise, -1, 1))
    np.testing.assert_allclose(decision.anchor_actions, ANCHOR.act(decision.states, decision.categorical, decision.scores), atol=1e-6)
    assert np.abs(decision.actions - decision.anchor_actions).max() <= 0.15 + 1e-6
    assert np.abs(decision.actions).max() <= 1


def test_exploit_is_the_current_policy_and_logs_the_anchors_actions_too() -> None:
    _, decision = made(parsed(USERS[Arm.EXPLOIT]), served())
    np.testing.assert_allclose(decision.actions, CURRENT.act(decision.states, decision.categorical, decision.scores), atol=1e-6)
    np.testing.assert_allclose(decision.anchor_actions, ANCHOR.act(decision.states, decision.categorical, decision.scores), atol=1e-6)


def test_control_users_always_get_a_equal_0_under_the_served_version() -> None:
    reply, decision = made(parsed(USERS[Arm.CONTROL]), served())
    assert not decision.actions.any() and decision.anchor_actions.any()
    assert reply.policy_version == decision.event.policy_version == 7


def test_while_pinned_explorers_get_the_pinned_policy_without_noise() -> None:
    _, decision = made(parsed(USERS[Arm.EXPLORE]), served(pinned=True))
    np.testing.assert_allclose(decision.actions, CURRENT.act(decision.states, decision.categorical, decision.scores), atol=1e-6)
    assert decision.event.arm == Arm.EXPLORE


def test_a_current_control_policy_serves_nothing_that_was_learnt() -> None:
    policies = served(CONTROL)
    assert is_control(CONTROL) and not is_control(CURRENT)
    for arm in Arm:
        _, decision = made(parsed(USERS[arm]), policies)
        assert not decision.anchor_actions.any()
        assert np.abs(decision.actions).max() <= (0.15 if arm is Arm.EXPLORE else 0)
    _, pinned = made(parsed(USERS[Arm.EXPLORE]), served(CONTROL, pinned=True))
    assert not pinned.actions.any()


def test_the_unshown_are_drawn_uniformly_from_all_that_are_not_shown() -> None:
    request, policies = parsed(USERS[Arm.CONTROL]), served()
    shown = set(made(request, policies)[0].item_ids[:3])
    drawn: Counter[str] = Counter()
    num = 2_000
    for n in range(num):
        _, decision = decide(request, policies, CONFIG, decision_id=f"d{n}", now_ms=5)
        unshown = decision.item_ids[3:]
        assert len(set(unshown)) == 4 and not shown & set(unshown)
        drawn.update(unshown)
    expected = num * 4 / 17
    chi2 = sum((drawn[f"i{n}"] - expected) ** 2 / expected for n in range(20) if f"i{n}" not in shown)
    assert chi2 < 39.3  # 0.1 % quantile of 16 degrees of freedom; draws without replacement vary less


def test_a_decision_tells_the_means_over_all_its_candidates() -> None:
    request = parsed(USERS[Arm.EXPLOIT])
    _, decoded = made(request, served())
    expected = np.concatenate([request.states, np.log(request.scores)], 1).mean(0)
    assert len(decoded.states) < len(request.states) and decoded.candidate_means is not None
    np.testing.assert_allclose(decoded.candidate_means, expected, rtol=1e-5)
    for value in (1e37, 1.7e9, 0.1):  # of many candidates alike; the sum of the first exceeds float32
        _, decoded = made(parsed(USERS[Arm.EXPLOIT], 200, context_features=[value], user_features=[-value]), served())
        assert decoded.candidate_means is not None
        assert decoded.candidate_means[[0, 2]].tolist() == [-np.float32(value), np.float32(value)]


def test_a_decision_depends_on_its_arguments_only() -> None:
    for arm in Arm:
        request, policies = parsed(USERS[arm]), served()
        assert decide(request, policies, CONFIG, decision_id="x", now_ms=5) == decide(request, policies, CONFIG, decision_id="x", now_ms=5)


def test_a_long_list_leaves_fewer_unshown_so_that_a_step_keeps_its_size() -> None:
    _, decision = decide(parsed(USERS[Arm.EXPLOIT], list_size=6), served(), CONFIG, decision_id="d", now_ms=5)
    assert decision.positions == [0, 1, 2, 3, 4, 5, -1]
    _, few = decide(parsed(USERS[Arm.EXPLOIT], 2), served(), CONFIG, decision_id="d", now_ms=5)
    assert few.positions == [0, 1] and few.num_candidates == 2
