"""TD3 and TD3+BC: each equation by hand or by a slow loop, what a step may change, and the request-level view of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from esrl_ray.algo import td3
from esrl_ray.config import CategoricalConfig, Config
from esrl_ray.errors import MethodError
from esrl_ray.methods.request_level import RequestBatch, Requests
from esrl_ray.methods.td3 import TD3_BC, Td3, Td3Settings
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import PolicyKind
from esrl_ray.replay.steps import CUT, LEFT, UNKNOWN, Steps
from tests.transitions import make_transitions


def small(config: Config) -> Config:
    """A small learner: 16 hidden units, batches of 8, as many samples as steps."""
    learner = config.learner.model_copy(update={"hidden_sizes": (16,), "batch_size": 8})
    return config.model_copy(update={"learner": learner, "replay": config.replay.model_copy(update={"samples_per_insert": 2.0})})


def make_steps(config: Config, num_steps: int = 40, *, seed: int = 0) -> Steps:
    """Sessions of four steps in shuffled pairs with garbage in padding; the last session is still open."""
    batch = make_transitions(config, num_steps, seed=seed)
    steps = Steps(config, num_steps)
    names = ("states", "categorical", "scores", "actions", "anchor_actions", "rewards", "shown", "valid")
    behaviours = np.abs(np.random.default_rng(seed).normal(size=(*batch["shown"].shape, len(config.reward.behaviours)))).astype(np.float32)
    numbers = np.arange(num_steps)
    steps.add(
        {"sessions": numbers // 4, "users": numbers // 4, "rounds": 0, "arms": 0},
        {**{name: batch[name] for name in names}, "behaviours": behaviours},  # type: ignore[literal-required]
    )
    steps.follow(numbers, np.where(numbers % 4 == 3, LEFT, numbers + 1))
    steps.follow(numbers[-1:], UNKNOWN)
    return steps


def view(config: Config, steps: Steps) -> Requests:
    """The request-level view with a normaliser that does nothing."""
    spec = config.spec.build()
    return Requests.of(steps, spec, Normaliser.identity(spec))


def batch_of(config: Config, size: int = 8) -> RequestBatch:
    """The first transitions of made-up steps."""
    requests = view(config, make_steps(config))
    return requests.batch(requests.samplable[:size])


def snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of a network's parameters."""
    return [p.detach().clone() for p in module.parameters()]


def same(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    """Whether no parameter has changed."""
    return all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_smoothing_noise_and_actions_are_clipped() -> None:
    actions, noise = torch.tensor([[0.0, 0.95, -0.5]]), torch.tensor([[0.3, 0.08, -0.04]])
    # noise: .3 -> .1; .95 + .08 = 1.03 -> 1; -.5 - .04
    expected = torch.tensor([[0.1, 1.0, -0.54]])
    torch.testing.assert_close(td3.smoothed_actions(actions, noise, noise_clip=0.1), expected)


def test_the_target_takes_the_smaller_twin_and_nothing_after_the_end() -> None:
    target = td3.clipped_double_target(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0, 9.0, 5.0], [6.0, 1.0, 7.0]]), torch.tensor([1.0, 1.0, 0.0]), gamma=0.5
    )
    torch.testing.assert_close(target, torch.tensor([3.0, 2.5, 3.0]))  # 1 + .5 * 4, 2 + .5 * 1, 3


def test_the_td_loss_is_that_of_a_slow_loop() -> None:
    values, target = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)), torch.arange(7.0)
    slow = sum((float(values[n, b]) - float(target[b])) ** 2 / 7 for n in range(2) for b in range(7))
    assert float(td3.td_loss(values, target)) == pytest.approx(slow, rel=1e-5)
    with pytest.raises(AssertionError):
        td3.td_loss(values, target[:, None])  # would broadcast to (7, 7)


def test_the_actor_loss_reads_the_first_twin_only() -> None:
    values = torch.tensor([[1.0, 3.0], [100.0, -100.0]], requires_grad=True)
    loss = td3.actor_loss(values)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == -2.0
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, -0.5], [0.0, 0.0]]))


def test_the_cloning_loss_by_hand() -> None:
    values = torch.tensor([[1.0, -3.0], [0.0, 0.0]])  # mean |Q_1| = 2, mean Q_1 = -1
    actions, logged = torch.tensor([[0.1, 0.0], [0.0, 0.2]]), torch.zeros(2, 2)  # mean square = .05 / 4
    # lambda = 2.5 / 2; 1.25 * 1 + .0125
    assert float(td3.behaviour_cloning_actor_loss(values, actions, logged, alpha=2.5)) == pytest.approx(1.2625)


def test_the_weight_of_the_cloning_loss_has_no_gradient() -> None:
    values = torch.tensor([[2.0, 2.0], [0.0, 0.0]], requires_grad=True)
    loss = td3.behaviour_cloning_actor_loss(values, torch.zeros(2, 1), torch.zeros(2, 1), alpha=3.0)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient[0], torch.tensor([-0.75, -0.75]))  # -(3 / 2) / 2 each; 0 if the weight had a gradient


def test_a_critic_step_leaves_the_actor_and_the_targets(config: Config) -> None:
    method = Td3("td3", small(config), seed=0)
    frozen = [(m, snapshot(m)) for m in (method.actor, method.target_actor, method.target_critics)]
    critics = snapshot(method.critics)
    result = method.update(batch_of(config))
    assert result.actor_loss is None  # delayed
    assert all(same(m, before) for m, before in frozen) and not same(method.critics, critics)
    assert all(p.grad is None for m in (method.actor, method.critics, method.target_critics) for p in m.parameters())


def test_an_actor_step_leaves_the_critics(config: Config) -> None:
    method = Td3("td3", small(config), seed=0, settings=Td3Settings(critic_lr=0.0, policy_delay=1))
    critics, actor = snapshot(method.critics), snapshot(method.actor)
    assert method.update(batch_of(config)).actor_loss is not None
    assert same(method.critics, critics) and not same(method.actor, actor)


def test_the_actor_and_the_targets_move_every_second_step(config: Config) -> None:
    method, batch = Td3("td3", small(config), seed=0), batch_of(config)
    moved = []
    for _ in range(4):
        before = [snapshot(m) for m in (method.actor, method.target_actor, method.target_critics)]
        method.update(batch)
        now = (method.actor, method.target_actor, method.target_critics)
        moved.append([not same(m, b) for m, b in zip(now, before, strict=True)])
    assert moved == [[False] * 3, [True] * 3] * 2


def test_the_value_is_of_the_taken_action_and_of_user_and_context_alone(config: Config) -> None:
    method, batch = Td3("td3", small(config), seed=0), batch_of(config)
    values = method.values(method.critics, batch.numeric, batch.categorical, batch.actions)
    assert values.shape == (2, 8)
    assert not torch.allclose(values[0], values[1])
    other = method.values(method.critics, batch.numeric, batch.categorical, batch.actions + 0.1)
    assert not torch.allclose(values, other)


def test_the_view_is_that_of_a_slow_loop(config: Config) -> None:
    steps, spec = make_steps(config), config.spec.build()
    c, requests = steps.columns, view(config, steps)
    for t in range(len(steps)):
        shown = [j for j in range(c["shown"].shape[1]) if c["shown"][t, j] > 0]
        np.testing.assert_allclose(requests.actions[t], np.mean([c["actions"][t, j] for j in shown], 0), atol=1e-6)
        assert float(requests.rewards[t]) == pytest.approx(sum(float(c["rewards"][t, j].sum()) for j in shown), abs=1e-5)
        first = next(j for j in range(c["valid"].shape[1]) if c["valid"][t, j] > 0)
        raw = numeric_input(c["states"][t, first], c["scores"][t, first])
        for i in range(len(raw)):
            assert float(requests.numeric[t, i]) == (raw[i] if i in spec.request_inputs else 0)


def test_padding_contributes_nothing(config: Config) -> None:
    steps = make_steps(config)
    before = view(config, steps)
    empty = steps.columns["valid"] == 0
    for name in ("states", "scores", "actions", "rewards", "categorical"):
        steps.columns[name][empty] = 7 if name == "categorical" else 1e6
    after = view(config, steps)
    assert all(torch.equal(getattr(before, n), getattr(after, n)) for n in ("numeric", "categorical", "actions", "rewards"))


def test_a_batch_tells_the_end_of_a_session_from_an_unknown_next_list(config: Config) -> None:
    steps = make_steps(config)
    steps.follow(np.array([5]), CUT)
    requests = view(config, steps)
    assert 5 not in requests.samplable and len(steps) - 1 not in requests.samplable
    batch = requests.batch(np.array([2, 3, 5]))
    assert batch.has_next.tolist() == [1, 0, 0] and batch.terminated.tolist() == [0, 1, 0]
    assert torch.equal(batch.next_numeric[0], requests.numeric[3])
    assert batch.next_numeric[1:].abs().sum() == 0


@pytest.mark.parametrize("settings", [Td3Settings(), TD3_BC])
def test_a_seed_fixes_the_policy(config: Config, settings: Td3Settings) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (Td3("td3", small(config), seed=s, settings=settings).fit(make_steps(config)) for s in (1, 1, 2))
    assert first.manifest.digest == again.manifest.digest != other.manifest.digest
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fit_takes_the_steps_that_new_samples_allow_and_serves_one_action_per_request(config: Config) -> None:
    method = Td3("td3", small(config), seed=0)
    steps = make_steps(config)
    policy = method.fit(steps)
    assert policy.manifest.gradient_steps == 10 and policy.manifest.kind is PolicyKind.REQUEST  # 40 new steps x 2 samples / 8
    assert method.fit(steps).manifest.gradient_steps == 10  # nothing new
    assert method.exploration().scope == "request" and method.exploration().centre.manifest.round == 1
    c = steps.columns
    actions = policy.act(np.repeat(c["states"][:, :1], 3, 1), np.zeros((40, 3, 0), np.int32), c["scores"][:, :3])
    np.testing.assert_array_equal(actions[:, 0], actions[:, 2])
    numeric = Requests.of(steps, policy.spec, policy.normaliser).numeric
    with torch.no_grad():
        np.testing.assert_allclose(method.actor(numeric, torch.zeros(40, 0).long())[0], policy.act(*_pair(steps, 0)), atol=1e-6)


def test_categorical_codes_of_the_user_reach_actor_and_critics(config: Config) -> None:
    features = (CategoricalConfig(name="kind", cardinality=3, side="item"), CategoricalConfig(name="city", cardinality=4, side="user"))
    coded = config.model_copy(update={"spec": config.spec.model_copy(update={"categorical_features": features})})
    method = Td3("td3", small(coded), seed=0)
    batch = batch_of(coded)
    assert int(batch.categorical[:, 0].abs().sum()) == 0 and int(batch.categorical[:, 1].abs().sum()) > 0  # the item's code is hidden
    changed = replace(batch, categorical=(batch.categorical + torch.tensor([0, 1])) % 4)
    assert not torch.allclose(method.actor(batch.numeric, batch.categorical), method.actor(batch.numeric, changed.categorical))
    before, after = (method.values(method.critics, b.numeric, b.categorical, b.actions) for b in (batch, changed))
    assert not torch.allclose(before, after)


def test_exploration_is_the_deployments_or_gaussian(config: Config) -> None:
    uniform, gaussian = (Td3("td3", config, seed=0, settings=Td3Settings(explore_std=std)).exploration() for std in (None, 0.2))
    assert uniform.std is None and uniform.low[0] == np.float32(config.exploration.low)
    assert gaussian.std is not None and gaussian.std.tolist() == pytest.approx([0.2] * 10)


def test_steps_without_a_known_end_are_refused(config: Config) -> None:
    steps = make_steps(config)
    steps.follow(np.arange(len(steps)), UNKNOWN)
    with pytest.raises(MethodError, match="none of 40 steps"):
        Td3("td3", small(config), seed=0).fit(steps)


def _pair(steps: Steps, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first = int(steps.columns["valid"][number].argmax())
    return steps.columns["states"][number, first], np.zeros(0, np.int32), steps.columns["scores"][number, first]
