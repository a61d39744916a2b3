"""BatchRL-MTF: each equation by hand or by a slow loop, what a step may change, distillation, and the satisfaction reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esrl_ray.algo import bcq
from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.expression import summands
from esrl_ray.methods.batchrl import BatchRL, BatchRLSettings
from esrl_ray.methods.satisfaction import behaviour_terms, later_dwell, satisfaction_weights
from esrl_ray.policy.policy import PolicyKind
from esrl_ray.replay.steps import LEFT, UNKNOWN, Steps
from esrl_ray.reward import RewardConfig, RewardGroup, rewards_of
from esrl_ray.vocabulary import Floats
from tests.unit.test_td3 import batch_of, make_steps, same, small, snapshot

QUICK = BatchRLSettings(distil_steps=30)
WATCH = 1
"""Column of `watch_s` in the demo's behaviours."""


def test_the_generator_loss_by_hand() -> None:
    # KL of N(1, e^0) to N(0, 1) = 1/2; of N(0, 2) = -log 2 + (4 - 1) / 2
    mean, log_std = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, float(np.log(2))]])
    kl = (0.5 + (1.5 - np.log(2))) / 2
    loss = bcq.generator_loss(torch.tensor([[0.5]]), torch.tensor([[0.1]]), mean=mean, log_std=log_std, kl_weight=0.5)
    assert float(loss) == pytest.approx(0.16 + 0.5 * kl, rel=1e-6)


def test_perturbations_are_bounded_by_rho_and_actions_by_one() -> None:
    outputs = torch.tensor([[100.0, -100.0, 100.0, 0.0]])
    moved = bcq.perturbed_actions(torch.tensor([[0.2, 0.2, 0.9, 0.3]]), outputs, rho=0.15)
    torch.testing.assert_close(moved, torch.tensor([[0.35, 0.05, 1.0, 0.3]]))


def test_the_target_is_that_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    rewards, values, has_next = rng.normal(size=20), rng.normal(size=(2, 20, 3)), (np.arange(20) % 3 > 0).astype(float)
    slow = []
    for b in range(20):
        best = max(min(values[n, b, i] for n in range(2)) for i in range(3))  # the larger of the smaller twins, not the reverse
        slow.append(rewards[b] + 0.95 * has_next[b] * best)
    fast = bcq.bcq_target(torch.tensor(rewards), torch.tensor(values), torch.tensor(has_next), gamma=0.95)
    np.testing.assert_allclose(fast, slow)
    assert not np.allclose(slow, rewards + 0.95 * has_next * values.max(2).min(0))


def test_the_chosen_action_has_the_largest_value() -> None:
    candidates = torch.arange(12.0).view(2, 3, 2)
    chosen = bcq.chosen_actions(torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 1.0]]), candidates)
    torch.testing.assert_close(chosen, torch.tensor([[2.0, 3.0], [6.0, 7.0]]))


def test_the_distillation_loss_by_hand_teaches_the_actor_only() -> None:
    actions, chosen = torch.tensor([[0.1, 0.4]], requires_grad=True), torch.tensor([[0.0, 0.2]], requires_grad=True)
    loss = bcq.distillation_loss(actions, chosen)
    taught, fixed = torch.autograd.grad(loss, (actions, chosen), allow_unused=True)
    assert loss.item() == pytest.approx(0.025) and fixed is None
    torch.testing.assert_close(taught, torch.tensor([[0.1, 0.2]]))


def test_a_step_trains_generator_critics_and_perturbation_and_leaves_the_rest(config: Config) -> None:
    method = BatchRL("batchrl-mtf", small(config), seed=0)
    trained = [(m, snapshot(m)) for m in (method.generator, method.critics, method.perturbation)]
    frozen = (method.target_generator, method.target_critics, method.target_perturbation, method.actor)
    before = [(m, snapshot(m)) for m in frozen]
    result = method.update(batch_of(config))
    assert not any(same(m, b) for m, b in trained) and all(same(m, b) for m, b in before)
    assert all(p.grad is None for m, _ in [*trained, *before] for p in m.parameters())
    assert all(value.shape == () and bool(value.isfinite()) for value in result)


@pytest.mark.parametrize("part", ["generator", "critics", "perturbation"])
def test_each_network_learns_from_its_own_loss_only(config: Config, part: str) -> None:
    rates = {"generator": "generator_lr", "critics": "critic_lr", "perturbation": "perturbation_lr"}
    still = {rate: 0.0 for name, rate in rates.items() if name != part}
    method = BatchRL("batchrl-mtf", small(config), seed=0, settings=BatchRLSettings(**still))  # type: ignore[arg-type]
    before = {name: snapshot(getattr(method, name)) for name in rates}
    method.update(batch_of(config))
    assert {name for name in rates if not same(getattr(method, name), before[name])} == {part}


def test_targets_move_every_tenth_step(config: Config) -> None:
    method, batch = BatchRL("batchrl-mtf", small(config), seed=0), batch_of(config)
    targets = (method.target_generator, method.target_critics, method.target_perturbation)
    moved = []
    for _ in range(11):
        before = [snapshot(m) for m in targets]
        method.update(batch)
        moved.append([not same(m, b) for m, b in zip(targets, before, strict=True)])
    assert moved == [[False] * 3] * 9 + [[True] * 3] + [[False] * 3]


def test_the_generator_learns_where_the_logged_actions_are(config: Config) -> None:
    method = BatchRL("batchrl-mtf", small(config), seed=0, settings=BatchRLSettings(rho=0.0, distil_steps=30))
    method.fit(make_steps(config))  # actions are .1 +- .15, means of some of them
    batch = batch_of(config)
    for _ in range(150):
        method.update(batch)
    actions = method.act(batch.numeric, batch.categorical)
    assert float((actions - batch.actions).square().mean().sqrt()) < 0.1
    assert float(actions.min()) > -0.05 and float(actions.max()) < 0.25  # nothing outside the log


def test_acting_stays_within_rho_of_the_generators_candidates(config: Config) -> None:
    wild = BatchRL("batchrl-mtf", small(config), seed=3, settings=BatchRLSettings(num_candidates=1))
    tame = BatchRL("batchrl-mtf", small(config), seed=3, settings=BatchRLSettings(num_candidates=1, rho=0.0))
    for method in (wild, tame):
        with torch.no_grad():
            for parameter in method.perturbation.parameters():
                parameter.mul_(100)
    batch = batch_of(config)
    moved = wild.act(batch.numeric, batch.categorical) - tame.act(batch.numeric, batch.categorical)
    assert 0.1 < float(moved.abs().max()) <= 0.15 + 1e-6


def test_more_candidates_have_a_larger_value(config: Config) -> None:
    batch, means = batch_of(config), []
    for n in (1, 50):
        method = BatchRL("batchrl-mtf", small(config), seed=0, settings=BatchRLSettings(num_candidates=n))
        actions = method.act(batch.numeric, batch.categorical)
        means.append(method.values(method.critics, batch.numeric, batch.categorical, actions.unsqueeze(1))[0].mean().item())
    assert means[1] > means[0]


def test_the_served_actor_is_distilled_and_says_how_well(config: Config) -> None:
    method = BatchRL("batchrl-mtf", small(config), seed=0, settings=BatchRLSettings(distil_steps=150))
    policy = method.fit(make_steps(config, 80))
    assert policy.manifest.kind is PolicyKind.REQUEST and policy.manifest.gradient_steps == 20  # 80 x 2 / 8
    assert 0 < method.distillation_error < 0.1
    assert f"{method.distillation_error:.4f}" in policy.manifest.note
    assert method.exploration().centre is policy


def test_only_the_newest_rounds_are_learnt_from(config: Config) -> None:
    steps = make_steps(config, 80)
    steps.rounds[:] = np.arange(80) // 20
    policies = []
    for reward in (0.0, 50.0):
        steps.columns["rewards"][:20] = reward  # round 0, three rounds before the newest
        policies.append(BatchRL("batchrl-mtf", small(config), seed=0, settings=QUICK).fit(steps).manifest.digest)
    assert policies[0] == policies[1]


def test_a_seed_fixes_the_policy(config: Config) -> None:
    first, again, other = (
        BatchRL("batchrl-mtf", small(config), seed=s, settings=QUICK).fit(make_steps(config)).manifest.digest for s in (1, 1, 2)
    )
    assert first == again != other


def list_rewards(steps: Steps, reward: RewardConfig) -> Floats:
    """(n,) rewards of shown pairs by the configured expressions, groups summed."""
    total: Floats = (rewards_of(steps.columns["behaviours"], reward) * steps.columns["shown"][..., None]).sum((1, 2))
    return total


def test_terms_are_the_rewards_summands_without_coefficients(config: Config) -> None:
    steps = make_steps(config)
    terms, c = behaviour_terms(steps, config.reward), steps.columns
    weights = np.array([w for g in range(2) for w, _ in summands(config.reward.parsed(g))])
    assert terms.shape == (40, 6)
    for t in range(40):
        watch = [c["behaviours"][t, j, WATCH] for j in range(c["shown"].shape[1]) if c["shown"][t, j] > 0]
        assert terms[t, 0] == pytest.approx(sum(min(w, 120) for w in watch), rel=1e-5)
        assert terms[t, 1] == sum(w > 10 for w in watch)
    np.testing.assert_allclose(terms @ weights / config.reward.scale, list_rewards(steps, config.reward), rtol=1e-4, atol=1e-4)


def test_later_dwell_is_what_the_session_still_had(config: Config) -> None:
    steps = make_steps(config)
    dwell = (steps.columns["behaviours"][..., WATCH] * steps.columns["shown"]).sum(1)
    later, ended = later_dwell(steps, config.reward, "watch_s")
    assert later[0] == pytest.approx(dwell[1] + dwell[2] + dwell[3]) and later[3] == 0
    assert ended[:36].all() and not ended[36:].any()  # the last session is open


def test_satisfaction_weights_find_what_dwell_time_goes_with(config: Config) -> None:
    steps = make_steps(config, 400)
    c = steps.columns
    for t in range(0, 400, 4):  # the next list's watch time is 30 s for each like
        likes = float((c["behaviours"][t, :, 2] * c["shown"][t]).sum())
        c["behaviours"][t + 1 : t + 4, :, [WATCH, 2]] = 0
        c["behaviours"][t + 1, int(c["shown"][t + 1].argmax()), WATCH] = 30 * likes
    steps.follow(np.arange(1, 400), UNKNOWN)
    steps.follow(np.arange(1, 400, 4), LEFT)  # sessions of two lists
    weights = satisfaction_weights(steps, config, dwell="watch_s")
    values = behaviour_terms(steps, config.reward)
    contribution = np.abs(weights) * values.std(0)
    assert weights[2] > 0 and contribution[2] > 0.5 * contribution.sum()
    assert float((values @ weights).std()) == pytest.approx(float(steps.list_rewards.sum(1).std()), rel=1e-3)


def test_the_satisfaction_reward_can_be_written_as_an_expression(config: Config) -> None:
    # BatchRL-MTF's reward is linear in what users did; here of the demo's six summands, by the weights that the log gave
    steps = make_steps(config)
    weights = satisfaction_weights(steps, config, dwell="watch_s")
    parts = ("min(watch_s, 120)", "(watch_s > 10)", "like", "comment", "forward", "dislike")
    expression = " + ".join(f"{float(w)!r} * {part}" for w, part in zip(weights, parts, strict=True))
    written = RewardConfig(behaviours=config.reward.behaviours, groups=(RewardGroup(name="satisfaction", expression=expression),))
    np.testing.assert_allclose(list_rewards(steps, written), behaviour_terms(steps, config.reward) @ weights, rtol=1e-4, atol=1e-4)


def test_the_satisfaction_reward_is_fitted_once_and_learnt_from(config: Config) -> None:
    method = BatchRL("batchrl-mtf", small(config), seed=0, settings=BatchRLSettings(reward="satisfaction", distil_steps=30))
    first = method.fit(make_steps(config))
    weights = method.satisfaction
    method.fit(make_steps(config, 80, seed=1))
    assert weights is not None and method.satisfaction is weights
    assert first.manifest.digest != BatchRL("batchrl-mtf", small(config), seed=0, settings=QUICK).fit(make_steps(config)).manifest.digest


def test_the_satisfaction_reward_refuses_what_it_cannot_be_fitted_on(config: Config) -> None:
    steps = make_steps(config)
    with pytest.raises(MethodError, match="no behaviour 'stay'"):
        satisfaction_weights(steps, config, dwell="stay")
    steps.follow(np.flatnonzero(steps.following == LEFT), UNKNOWN)
    with pytest.raises(MethodError, match="ended session"):
        satisfaction_weights(steps, config, dwell="watch_s")
