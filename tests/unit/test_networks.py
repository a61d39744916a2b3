"""Actor, critics, and the exact folding of normaliser and value scales."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor, PleActor
from esrl_ray.algo.networks import Critics, Networks
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.spec import CategoricalFeature, Spec

SPEC = Spec(
    user_features=("u",),
    item_features=("i", "j"),
    context_features=(),
    categorical_features=(CategoricalFeature("tab", 4, "context"), CategoricalFeature("tag", 7, "item")),
    scores=("click", "watch"),
    power_base=(1.0, 1.0),
    power_span=1.2,
    bias_base=0.55,
    bias_span=0.5,
)
N = 11


def _inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    states = rng.normal(3, 20, (N, 3)).astype(np.float32)
    scores = rng.uniform(1e-4, 5, (N, 2)).astype(np.float32)
    codes = np.stack([rng.integers(0, 4, N), rng.integers(0, 7, N)], -1)
    relative = rng.uniform(-0.5, 0.5, (N, 4)).astype(np.float32)
    return torch.from_numpy(states), torch.from_numpy(scores), torch.from_numpy(codes), torch.from_numpy(relative)


def _loud(actor: Actor | PleActor) -> None:
    """Large last layer, so that differences show."""
    assert isinstance(actor, Actor)
    last = actor.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.normal_(last.weight, 0, 0.3)


def _networks(*, split: bool = False) -> Networks:
    torch.manual_seed(0)
    return Networks(SPEC, 2, 3, hidden_sizes=(16, 8), embedding_size=5, split=split)


def _normaliser(seed: int) -> Normaliser:
    rng = np.random.default_rng(seed)
    return Normaliser(rng.normal(2, 3, 5).astype(np.float32), rng.uniform(0.2, 25, 5).astype(np.float32))


@pytest.mark.parametrize("kind", [Actor, PleActor])
def test_an_actor_starts_at_the_control_policy(kind: type[Actor] | type[PleActor]) -> None:
    torch.manual_seed(0)
    numeric, codes = torch.randn(50, 5), torch.zeros(50, 2, dtype=torch.int64)
    actions = kind(SPEC, (64, 64), 5)(numeric, codes).detach()
    assert actions.shape == (50, 4)
    assert float(actions.abs().max()) < 0.02


@pytest.mark.parametrize("level", ["pair", "request"])
def test_folding_keeps_the_function_of_a_ple_actor(level: Literal["pair", "request"]) -> None:
    torch.manual_seed(0)
    actor, (states, scores, codes, _) = PleActor(SPEC, (16, 8), 5, level=level), _inputs()
    torch.nn.init.normal_(actor.ends, 0, 0.3)
    old, new = _normaliser(1), _normaliser(2)
    raw = torch.from_numpy(numeric_input(states.numpy(), scores.numpy()))
    before, after = (actor((raw - torch.from_numpy(n.mean)) / torch.from_numpy(n.std), codes) for n in (old, old))
    assert torch.equal(before, after)
    actor.fold(old, new)
    folded = actor((raw - torch.from_numpy(new.mean)) / torch.from_numpy(new.std), codes)
    assert torch.allclose(before, folded, atol=1e-4)
    assert float(before.detach().std(0).max()) > 1e-3


def test_each_score_of_a_ple_actor_has_its_own_tower_and_expert() -> None:
    """Tasks differ by gate, expert and tower: the gradient of score 0's power and bias reaches nothing that belongs to score 1 alone."""
    torch.manual_seed(0)
    actor = PleActor(SPEC, (6, 4), 5)
    actor(torch.randn(9, 5), torch.zeros(9, 2, dtype=torch.int64))[:, [0, 2]].sum().backward()
    assert actor.tower.grad is not None and actor.experts.weight.grad is not None
    assert actor.tower.grad[0].any() and not actor.tower.grad[1].any()
    per_expert = actor.experts.weight.grad.view(PleActor.SHARED + 2, 6, -1).abs().amax((1, 2))
    assert bool((per_expert[: PleActor.SHARED + 1] > 0).all()) and float(per_expert[-1]) == 0


@pytest.mark.parametrize("own", [1, 2])
def test_a_ple_actor_is_gates_over_experts_then_a_tower_for_each_score(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over pairs, scores and experts, with every parameter drawn at random."""
    monkeypatch.setattr(PleActor, "OWN", own)
    torch.manual_seed(0)
    actor, shared, h = PleActor(SPEC, (6, 4), 5), PleActor.SHARED, 6
    for parameter in actor.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    p = {name: value.detach().double() for name, value in actor.named_parameters()}
    numeric, codes = torch.randn(N, 5), _inputs()[2]
    for pair, found in enumerate(actor(numeric, codes).detach().double()):
        x = torch.cat([numeric[pair].double(), *(p[f"embeddings.{c}.weight"][codes[pair, c]] for c in range(2))])
        experts = [
            torch.relu(p["experts.weight"][e * h : e * h + h] @ x + p["experts.bias"][e * h : e * h + h]) for e in range(shared + 2 * own)
        ]
        for score in range(2):
            mine = [*experts[:shared], *experts[shared + score * own : shared + (score + 1) * own]]
            logits = [p["gates.weight"][i] @ x + p["gates.bias"][i] for i in range(score * len(mine), (score + 1) * len(mine))]
            total = sum(logit.exp() for logit in logits)
            mixed = torch.stack([logit.exp() / total * expert for logit, expert in zip(logits, mine, strict=True)]).sum(0)
            hidden = torch.relu(mixed @ p["tower"][score] + p["tower_bias"][score])
            power, bias = torch.tanh(hidden @ p["ends"][score] + p["end_bias"][score])
            assert found[[score, 2 + score]].tolist() == pytest.approx([float(power), float(bias)], abs=1e-5)


def test_an_actor_of_requests_gives_all_pairs_of_a_request_the_same_action() -> None:
    torch.manual_seed(0)
    for kind in (Actor, PleActor):
        actor = kind(SPEC, (16, 8), 5, level="request")
        numeric, codes = torch.randn(7, 5), torch.randint(0, 4, (7, 2))
        numeric[:, 0], codes[:, 0] = 0.3, 2  # the user's feature and the context's code
        actions = actor(numeric, codes)
        assert torch.allclose(actions, actions[:1].expand_as(actions), rtol=1e-5)


@pytest.mark.parametrize("kind", [Actor, PleActor])
def test_an_actor_reads_any_leading_shape(kind: type[Actor] | type[PleActor]) -> None:
    actor, numeric, codes = kind(SPEC, (8,), 5), torch.randn(2, 3, 5), torch.ones(2, 3, 2, dtype=torch.int64)
    assert torch.allclose(actor(numeric, codes)[1, 2], actor(numeric[1, 2], codes[1, 2]), atol=1e-6)
    assert actor(numeric[:, :0], codes[:, :0]).shape == (2, 0, SPEC.num_actions), "a batch without next lists has none of their pairs"


def test_the_ensemble_equals_separate_critics() -> None:
    critics = Critics(SPEC, 2, 3, hidden_sizes=(16, 8), embedding_size=5)
    states, scores, codes, relative = _inputs()
    numeric = torch.cat([states, scores], -1)
    got = critics(numeric, codes, relative)
    assert got.shape == (2, 3, N)
    for e in range(6):
        x = torch.cat([numeric, relative, critics.embeddings[0][e][codes[:, 0]], critics.embeddings[1][e][codes[:, 1]]], -1)
        x = torch.relu(x @ critics.weights[0][e] + critics.biases[0][e])
        x = torch.relu(x @ critics.weights[1][e] + critics.biases[1][e])
        x = x @ critics.weights[2][e] + critics.biases[2][e]
        assert torch.allclose(got[e // 3, e % 3], x[:, 0], rtol=1e-4, atol=1e-4)


def test_a_critic_is_independent_of_the_others() -> None:
    critics = Critics(SPEC, 2, 3, hidden_sizes=(16, 8), embedding_size=5)
    states, scores, codes, relative = _inputs()
    value = critics(torch.cat([states, scores], -1), codes, relative)[1, 0].sum()  # critic number 3
    for gradient in torch.autograd.grad(value, list(critics.parameters())):
        assert bool((gradient[[0, 1, 2, 4, 5]] == 0).all())
    assert not torch.equal(critics.weights[0][0], critics.weights[0][1])


def test_numeric_input_on_the_device_equals_numpy() -> None:
    networks, normaliser = _networks(), _normaliser(1)
    networks.set_scales(normaliser, np.ones(2, np.float32), fold=False)
    states, scores, _, _ = _inputs()
    scores[0, 0] = 0.0
    want = (numeric_input(states.numpy(), scores.numpy()) - normaliser.mean) / normaliser.std
    np.testing.assert_allclose(networks.numeric(states, scores).numpy(), want, rtol=1e-5, atol=1e-5)


def test_folding_changes_no_function() -> None:
    networks = _networks()
    networks.set_scales(_normaliser(1), np.array([0.5, 2.0], np.float32), fold=False)
    assert networks.target_actor is not None and networks.target_critics is not None
    actors, ensembles = (networks.actor, networks.target_actor, networks.anchor), (networks.critics, networks.target_critics)
    for actor in actors:
        _loud(actor)
    states, scores, codes, relative = _inputs()

    def outputs() -> list[torch.Tensor]:
        numeric = networks.numeric(states, scores)
        scale = networks.value_scale[:, None, None]
        return [actor(numeric, codes) for actor in actors] + [scale * critics(numeric, codes, relative) for critics in ensembles]

    before = outputs()
    networks.set_scales(_normaliser(2), np.array([1.5, 0.7], np.float32), fold=True)
    for old, new in zip(before, outputs(), strict=True):
        assert torch.allclose(old, new, rtol=1e-5, atol=1e-5)
    assert networks.normaliser.mean.tolist() == _normaliser(2).mean.tolist()


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_an_input_that_first_moves_after_the_fit_does_not_saturate_the_policy(unit: float) -> None:
    networks, rng = _networks(), np.random.default_rng(0)
    states, scores = rng.normal(size=(64, 4, 3)).astype(np.float32), np.exp(rng.normal(size=(64, 4, 2))).astype(np.float32)
    codes, everything = torch.zeros(64, 4, 2, dtype=torch.int64), np.ones((64, 4), bool)
    states[..., 0] = 0
    networks.set_scales(Normaliser.fit(states, scores, everything), np.ones(2, np.float32), fold=False)
    _loud(networks.actor)

    def acts() -> torch.Tensor:
        actions: torch.Tensor = networks.actor(networks.numeric(torch.from_numpy(states), torch.from_numpy(scores)), codes)
        return actions

    assert isinstance(networks.actor, Actor)
    before, layer = acts(), networks.actor.layers[0]
    assert isinstance(layer, torch.nn.Linear)
    states[..., 0] = unit * (rng.random((64, 1)) < 0.3)
    assert torch.allclose(acts(), before, atol=1e-4)
    networks.set_scales(Normaliser.fit(states, scores, everything), np.ones(2, np.float32), fold=True)
    assert torch.allclose(acts(), before, atol=1e-4) and layer.weight[:, 0].abs().max() < 1e-4
    own = networks.normaliser
    with torch.no_grad():
        layer.weight[:, 0] = 0.2
    learnt = acts()
    still = states.copy()
    still[..., 0] = unit
    networks.set_scales(Normaliser.fit(still, scores, everything), np.ones(2, np.float32), fold=True)  # it stands still for a round
    assert torch.allclose(acts(), learnt, atol=1e-4) and networks.std[0] == own.std[0]


def test_the_anchor_is_the_policy_it_was_made_of() -> None:
    networks, own = _networks(), _normaliser(3)
    networks.set_scales(_normaliser(1), np.ones(2, np.float32), fold=False)
    torch.manual_seed(5)
    policy = Actor(SPEC, (16, 8), 5)
    _loud(policy)
    networks.set_anchor({k: v.numpy() for k, v in policy.state_dict().items()}, own)
    states, scores, codes, _ = _inputs()
    raw = torch.from_numpy((numeric_input(states.numpy(), scores.numpy()) - own.mean) / own.std)
    want = policy(raw, codes)
    assert torch.allclose(networks.anchor(networks.numeric(states, scores), codes), want, rtol=1e-5, atol=1e-5)
    networks.start_from_anchor()
    for actor in (networks.actor, networks.target_actor):
        assert actor is not None
        assert torch.allclose(actor(networks.numeric(states, scores), codes), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_a_static_anchor_gives_its_action_to_every_pair(value: float) -> None:
    networks = _networks()
    networks.set_static_anchor(np.full(4, value, np.float32))
    states, scores, codes, _ = _inputs()
    assert torch.allclose(networks.anchor(networks.numeric(states, scores), codes), torch.full((N, 4), value), atol=1e-6)


def test_targets_and_anchor_are_not_trained() -> None:
    networks = _networks()
    for frozen in (networks.target_actor, networks.target_critics, networks.anchor):
        assert frozen is not None
        assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in [*networks.actor.parameters(), *networks.critics.parameters()])


def test_with_the_split_critic_there_are_no_targets() -> None:
    split = _networks(split=True)
    assert split.target_actor is None and split.target_critics is None
    assert not any(name.startswith("target") for name in split.state_dict())
    split.set_scales(_normaliser(1), np.array([0.5, 2.0], np.float32), fold=True)
    split.start_from_anchor()
    assert all(torch.equal(p, q) for p, q in zip(split.actor.parameters(), split.anchor.parameters(), strict=True))


def test_a_state_with_targets_of_the_split_critic_can_still_be_loaded() -> None:
    networks = _networks(split=True)
    state = {name: tensor + 1 for name, tensor in networks.state_dict().items()}
    targets = {f"target_{name}": tensor for name, tensor in state.items() if name.startswith(("actor", "critics"))}
    assert not networks.load_state_dict({**state, **targets}, strict=False).missing_keys  # as RLlib loads it
    assert all(torch.equal(tensor, state[name]) for name, tensor in networks.state_dict().items())
