"""One gradient step: what it changes, what it must not change, and that it learns."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from esrl_ray.algo.device import pick_device
from esrl_ray.algo.networks import SplitCritics
from esrl_ray.algo.update import Batch, LearnState, UpdateResult, prepare, update
from esrl_ray.config import Config
from esrl_ray.fusion import fused_scores
from esrl_ray.vocabulary import TransitionBatch
from tests.transitions import make_transitions, with_learner


def _snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _same(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def _state(config: Config, **learner: Any) -> tuple[LearnState, Batch]:
    state = LearnState.create(with_learner(config, **learner), device="cpu")
    return state, prepare(state, make_transitions(config, 8, horizon=state.learner.num_future))


KINDS: list[dict[str, Any]] = [
    {"critic": "list_sum"},
    {"critic": "split"},
    {"critic": "list_sum", "level": "request", "actor_loss": "printed"},
]


@pytest.mark.parametrize("learner", KINDS)
def test_a_step_trains_actor_and_critics_and_leaves_the_rest(config: Config, learner: dict[str, Any]) -> None:
    state, batch = _state(config, **learner)
    n = state.networks
    trained = [(m, _snapshot(m)) for m in (n.actor, n.critics)]
    frozen = [(m, _snapshot(m)) for m in filter(None, (n.target_actor, n.target_critics, n.anchor))]
    assert len(frozen) == (1 if learner["critic"] == "split" else 3)
    result = update(state, batch)
    assert not any(_same(m, before) for m, before in trained)
    assert all(_same(m, before) for m, before in frozen)
    assert all(p.grad is None for p in n.parameters())
    assert state.gradient_steps == 1
    assert all(value.shape == () and bool(value.isfinite()) for value in result)


@pytest.mark.parametrize("learner", [*KINDS, {"critic": "list_sum", "actor_loss": "printed"}])
def test_the_actor_step_gives_critics_no_gradient(config: Config, learner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    state, batch = _state(config, **learner)
    steps: list[list[torch.Tensor]] = []
    real = torch.autograd.grad

    def watched(loss: torch.Tensor, parameters: list[torch.Tensor], **kwargs: Any) -> Any:
        steps.append(list(parameters))
        assert all(p.grad is None for p in state.networks.critics.parameters())
        return real(loss, parameters, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    update(state, batch)
    critics, actor = steps
    assert {id(p) for p in critics} == {id(p) for p in state.networks.critics.parameters()}
    assert {id(p) for p in actor} == {id(p) for p in state.networks.actor.parameters()}


def test_targets_move_every_so_many_steps_by_tau(config: Config) -> None:
    state, batch = _state(config, critic="list_sum", soft_update_every=3, soft_update=0.5)
    n = state.networks
    assert n.target_actor is not None and n.target_critics is not None
    pairs = [(target, _snapshot(target), network) for target, network in ((n.target_critics, n.critics), (n.target_actor, n.actor))]
    for _ in range(2):
        update(state, batch)
    assert all(_same(target, before) for target, before, _ in pairs)
    update(state, batch)
    for moved, before, network in pairs:
        for target, old, new in zip(moved.parameters(), before, network.parameters(), strict=True):
            assert torch.allclose(target, (old + new) / 2, atol=1e-6)


@pytest.mark.parametrize("critic", ["list_sum", "per_pair", "split"])
def test_value_scales_do_not_change_what_the_actor_wants(config: Config, critic: str) -> None:
    """The same critics in other units give the same advantages: value scales are multiplied back, of each group its own."""
    state, _ = _state(config, critic=critic)
    transitions = make_transitions(config, 8, horizon=state.learner.num_future)
    n = state.networks
    for _ in range(5):
        update(state, prepare(state, transitions))
    if isinstance(n.critics, SplitCritics):  # a long-term effect as large as a reward
        n.critics.long_term.weights.fill_(0.5)
        n.critics.long_term.reward.copy_(n.critics.long_term.gram[-1, -1])
    before = state.losses.actor(state, prepare(state, transitions))[0].item()
    n.set_scales(n.normaliser, np.array([1.0, 4.0], np.float32), fold=True)
    assert state.losses.actor(state, prepare(state, transitions))[0].item() == pytest.approx(before, abs=1e-5)


def test_splitting_a_batch_gives_the_same_steps_as_preparing_its_parts(config: Config) -> None:
    transitions = make_transitions(config, 24)
    whole, parts = LearnState.create(with_learner(config), device="cpu"), LearnState.create(with_learner(config), device="cpu")
    for batch in prepare(whole, transitions).split(3):
        update(whole, batch)
    for start in range(0, 24, 8):
        part = cast(TransitionBatch, {name: cast(Any, column)[start : start + 8] for name, column in transitions.items()})
        update(parts, prepare(parts, part))
    for a, b in zip(whole.networks.parameters(), parts.networks.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_same_seed_gives_the_same_learner_and_touches_no_global_state(config: Config) -> None:
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    a, b = LearnState.create(config, device="cpu"), LearnState.create(config, device="cpu")
    assert torch.equal(first, torch.rand(1))
    assert all(torch.equal(x, y) for x, y in zip(a.networks.parameters(), b.networks.parameters(), strict=True))
    other = LearnState.create(with_learner(config, seed=1, hidden_sizes=config.learner.hidden_sizes), device="cpu")
    assert not all(torch.equal(x, y) for x, y in zip(a.networks.critics.parameters(), other.networks.critics.parameters(), strict=True))


def test_gradients_are_clipped_to_the_configured_norm(config: Config) -> None:
    seen: list[float] = []
    state, batch = _state(config, grad_clip=0.5)

    def loud(tensors: list[torch.Tensor], *, total: bool = False) -> None:
        torch._foreach_mul_(tensors, 1e4)

    real = state.critic_optimiser.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in state.networks.critics.parameters() if p.grad is not None])))
        return real(*args, **kwargs)

    state.critic_optimiser.step = watched  # type: ignore[method-assign]
    result = update(state, batch, average=loud)
    assert seen == [pytest.approx(0.5, rel=1e-3)]
    assert float(result.critic_grad_norm) > 0.5


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_step_on_the_gpu_equals_one_on_the_cpu(config: Config) -> None:
    results: list[UpdateResult] = []
    for device in ("cpu", "cuda"):
        state = LearnState.create(with_learner(config), device=device)
        results.append(update(state, prepare(state, make_transitions(config, 8))))
    for a, b in zip(*results, strict=True):
        assert float(a) == pytest.approx(float(b.cpu()), rel=1e-3, abs=1e-4)


def test_the_listwise_actor_learns_which_pairs_pay(config: Config) -> None:
    """A bandit: the first state feature is the pair's reward. After learning, the fused scores follow it far better than control's."""
    config = with_learner(config, gamma=0.0, hidden_sizes=(32,), batch_size=64, actor_lr=3e-3, critic_lr=3e-3)
    state = LearnState.create(config, device="cpu")
    for step in range(150):
        transitions = make_transitions(config, 64, seed=step, list_size=5)
        transitions["rewards"][:] = transitions["states"][..., :1]
        update(state, prepare(state, transitions))
    test = make_transitions(config, 256, seed=10_000, list_size=5)
    batch = prepare(state, test)
    with torch.no_grad():
        learnt = fused_scores(batch.scores, state.networks.actor(batch.numeric, batch.categorical), state.networks.spec)
        control = fused_scores(batch.scores, torch.zeros_like(batch.anchors), state.networks.spec)
    pays = torch.from_numpy(test["states"][..., 0])

    def gain(scores: torch.Tensor) -> float:  # reward of the list that the scores would show
        return float(pays.gather(1, scores.topk(5, dim=-1).indices).sum(-1).mean())

    assert abs(gain(control)) < 0.5
    assert gain(learnt) > 1.0
