"""Every equation against a slow loop and against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from esrl_ray.algo import losses
from esrl_ray.algo.losses import Bounds

BOUNDS = Bounds(-0.15, 0.15)
Q, M, B, P = 2, 3, 4, 5


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _mask(*counts: int, width: int = P) -> torch.Tensor:
    return (torch.arange(width)[None] < torch.tensor(counts)[:, None]).float()


def test_list_sum_td_by_hand() -> None:
    # One critic, one list of two shown pairs: Q = 1 + 2 = 3; r = .5 + .25; next list 4 + 1 (third is padding), gamma .9:
    # y = .75 + .9 * 5 = 5.25; loss = (3 - 5.25)^2 = 5.0625.
    loss = losses.list_sum_td(
        torch.tensor([[[[1.0, 2.0, 100.0]]]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
        torch.tensor([[[0.5], [0.25], [100.0]]]),
        next_values=torch.tensor([[[[4.0, 1.0, 100.0]]]]),
        next_shown=torch.tensor([[1.0, 1.0, 0.0]]),
        bootstrap=torch.tensor([1.0]),
        gamma=0.9,
    )
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(5.0625)


def test_per_pair_td_by_hand() -> None:
    # Next value = mean of (4, 1) = 2.5; targets .5 + 2.25 = 2.75 and .25 + 2.25 = 2.5; errors 1 - 2.75 and 2 - 2.5: mean of 3.0625, .25.
    loss = losses.per_pair_td(
        torch.tensor([[[[1.0, 2.0, 100.0]]]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
        torch.tensor([[[0.5], [0.25], [100.0]]]),
        next_values=torch.tensor([[[[4.0, 1.0, 100.0]]]]),
        next_shown=torch.tensor([[1.0, 1.0, 0.0]]),
        bootstrap=torch.tensor([1.0]),
        gamma=0.9,
    )
    assert loss.item() == pytest.approx((3.0625 + 0.25) / 2)


@pytest.mark.parametrize("td", [losses.list_sum_td, losses.per_pair_td])
def test_td_equals_the_slow_loop(td: object) -> None:
    values, next_values, rewards = _draw(Q, M, B, P), _draw(Q, M, B, 3, seed=1), _draw(B, P, Q, seed=2)
    shown, next_shown, bootstrap = _mask(5, 3, 1, 0), _mask(3, 0, 2, 1, width=3), torch.tensor([1.0, 1.0, 0.0, 1.0])
    arguments = {"next_values": next_values, "next_shown": next_shown, "bootstrap": bootstrap, "gamma": 0.8}
    got = td(values, shown, rewards, **arguments)  # type: ignore[operator]
    for i in range(Q):
        for n in range(M):
            errors = []
            for t in range(B):
                following = [float(next_values[i, n, t, j]) for j in range(3) if next_shown[t, j]]
                pairs = [j for j in range(P) if shown[t, j]]
                if td is losses.list_sum_td:
                    y = sum(float(rewards[t, j, i]) for j in pairs) + 0.8 * float(bootstrap[t]) * sum(following)
                    errors.append((sum(float(values[i, n, t, j]) for j in pairs) - y) ** 2)
                else:
                    mean = sum(following) / len(following) if following else 0.0
                    errors += [(float(values[i, n, t, j]) - float(rewards[t, j, i]) - 0.8 * float(bootstrap[t]) * mean) ** 2 for j in pairs]
            assert float(got[i, n]) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_td_gives_no_gradient_to_targets_and_padding() -> None:
    values, next_values = _draw(Q, M, B, P).requires_grad_(), _draw(Q, M, B, P, seed=1).requires_grad_()
    shown = _mask(5, 3, 1, 2)
    loss = losses.list_sum_td(values, shown, _draw(B, P, Q), next_values=next_values, next_shown=shown, bootstrap=torch.ones(B), gamma=0.9)
    gradient, missing = torch.autograd.grad(loss.sum(), [values, next_values], allow_unused=True)
    assert missing is None
    assert bool((gradient[..., shown == 0] == 0).all())
    assert bool((gradient[..., shown == 1] != 0).all())


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(AssertionError):
        losses.list_sum_td(
            _draw(Q, M, B, P),
            torch.ones(B, P),
            _draw(B, P, Q),
            next_values=_draw(Q, M, B, P),
            next_shown=torch.ones(B, P),
            bootstrap=torch.ones(B, 1),
            gamma=0.9,
        )


def test_bound_penalty_by_hand_and_at_the_bound() -> None:
    # width .3, beta .3: scale .09. Offsets: inside, on the bound, .09 above, .18 below -> 0, 0, e, e^2; mean over 4 dimensions.
    anchor = torch.tensor([0.1, 0.0, 0.2, -0.1], dtype=torch.float64)
    action = anchor + torch.tensor([0.1, 0.15, 0.24, -0.33], dtype=torch.float64)
    over = losses.excess(action, anchor, BOUNDS)
    assert over.tolist() == pytest.approx([0.0, 0.0, 0.09, 0.18])
    printed = losses.bound_penalty(over, BOUNDS, beta=0.3, continuous=False)
    assert float(printed) == pytest.approx((math.e + math.e**2) / 4)
    continuous = losses.bound_penalty(over, BOUNDS, beta=0.3, continuous=True)
    assert float(continuous) == pytest.approx((math.e + math.e**2 - 2) / 4)
    just_outside = torch.tensor([1e-9], dtype=torch.float64)
    assert float(losses.bound_penalty(just_outside, BOUNDS, beta=0.3, continuous=False)) == pytest.approx(1.0)
    assert float(losses.bound_penalty(just_outside, BOUNDS, beta=0.3, continuous=True)) == pytest.approx(0.0, abs=1e-7)


def test_bounds_need_not_be_symmetric() -> None:
    over = losses.excess(torch.tensor([-0.15, 0.35]), torch.zeros(2), Bounds(-0.1, 0.3))
    assert over.tolist() == pytest.approx([0.05, 0.05])


def test_penalty_pulls_back_from_outside_only() -> None:
    action = torch.tensor([0.3, 0.1, -0.3], requires_grad=True)
    penalty = losses.bound_penalty(losses.excess(action, torch.zeros(3), BOUNDS), BOUNDS, beta=0.3, continuous=False)
    (gradient,) = torch.autograd.grad(penalty, action)
    assert gradient[0] > 0
    assert gradient[1] == 0
    assert gradient[2] < 0


def test_phi_is_one_inside_and_decays_by_the_mean_excess() -> None:
    # Mean excess (.18 + 0) / 2 = .09 = beta width: e^-1.
    assert float(losses.phi(torch.tensor([0.0, 0.0]), BOUNDS, beta=0.3)) == 1.0
    assert float(losses.phi(torch.tensor([0.18, 0.0]), BOUNDS, beta=0.3)) == pytest.approx(math.exp(-1), rel=1e-5)


def test_action_input_is_in_widths_of_the_bounds() -> None:
    actions, anchors = torch.tensor([0.25]), torch.tensor([0.1])
    assert losses.action_input(actions, anchors, BOUNDS, relative=True).item() == pytest.approx(0.5)
    assert losses.action_input(actions, anchors, BOUNDS, relative=False).item() == pytest.approx(0.25 / 0.3)


def test_pessimistic_values_by_hand() -> None:
    # Groups (1, 3) and (5, 5): means 2 and 5, population stds 1 and 0; weights 1 and .5, lambda .2: 1 (2 - .2) + .5 (5) = 4.3.
    values = torch.tensor([[[1.0], [3.0]], [[5.0], [5.0]]])  # (2, 2, 1)
    assert float(losses.pessimistic_values(values, [1.0, 0.5], std_penalty=0.2)) == pytest.approx(4.3)


def test_std_penalty_has_a_finite_gradient_where_critics_agree_and_none_with_one_critic() -> None:
    for m in (1, 2):
        values = torch.full((1, m, 3), 2.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(losses.pessimistic_values(values, [1.0], std_penalty=0.2).sum(), values)
        assert torch.equal(gradient, torch.full_like(gradient, 1 / m))


def test_std_penalty_lowers_the_value_where_critics_disagree() -> None:
    values = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])  # same mean, second pair in dispute
    got = losses.pessimistic_values(values, [1.0], std_penalty=0.2)
    assert got.tolist() == pytest.approx([1.0, 0.8])


def test_printed_actor_loss_is_the_mean_over_pairs_then_lists() -> None:
    # List 1: pairs -(1) + .1 2 and -(3) + 0: mean (-.8 - 3) / 2 = -1.9; list 2: one pair -(2): -2. Mean -1.95.
    loss = losses.printed_actor_loss(
        torch.tensor([[1.0, 3.0], [2.0, 99.0]]), torch.tensor([[2.0, 0.0], [0.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]), eta=0.1
    )
    assert float(loss) == pytest.approx(-1.95)


def test_advantages_are_centred_per_request_and_scaled_by_the_batch() -> None:
    values, valid = _draw(B, P), _mask(5, 3, 1, 2)
    got = losses.advantages(values, valid)
    assert not got.requires_grad
    assert torch.equal(got[valid == 0], torch.zeros(int((valid == 0).sum())))
    assert torch.allclose((got * valid).sum(-1), torch.zeros(B), atol=1e-5)
    assert float((got.square().sum() / valid.sum()).sqrt()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(losses.advantages(torch.ones(2, 3), torch.ones(2, 3)), torch.zeros(2, 3))  # equal values: nothing to learn


def test_listwise_actor_loss_by_hand() -> None:
    # Scores / temperature: (ln 3, 0), softmax (.75, .25), A = (2, -2): -(1.5 - .5) = -1; penalty .1 mean(1, 3) = .2. The third is padding.
    loss = losses.listwise_actor_loss(
        torch.tensor([[0.3 * math.log(3), 0.0, 50.0]]),
        torch.tensor([[2.0, -2.0, 0.0]]),
        torch.tensor([[1.0, 3.0, 77.0]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
        temperature=0.3,
        eta=0.1,
    )
    assert float(loss) == pytest.approx(-0.8)


def test_listwise_gradient_raises_the_scores_of_better_pairs_and_ignores_padding() -> None:
    fused = torch.zeros(1, 4, requires_grad=True)
    gains, valid = torch.tensor([[1.0, -1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss = losses.listwise_actor_loss(fused, gains, torch.zeros(1, 4), valid, temperature=0.3, eta=0.1)
    (gradient,) = torch.autograd.grad(loss, fused)
    assert gradient[0, 0] < 0 < gradient[0, 1]  # descent raises the first score and lowers the second
    assert gradient[0, 3] == 0


def test_a_request_without_valid_pairs_is_finite() -> None:
    loss = losses.listwise_actor_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.3, eta=0.1)
    assert float(loss) == 0.0


@pytest.mark.parametrize("tau", [0.08, 1.0])
def test_soft_update_moves_targets_by_tau(tau: float) -> None:
    targets, parameters = [torch.zeros(3), torch.ones(2)], [torch.ones(3), torch.full((2,), 3.0)]
    losses.soft_update(targets, parameters, tau=tau)
    assert targets[0].tolist() == pytest.approx([tau] * 3)
    assert targets[1].tolist() == pytest.approx([1 + 2 * tau] * 2)
    assert parameters[0].tolist() == [1.0] * 3
