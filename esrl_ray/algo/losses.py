"""The learning equations, one pure function each. Rows of docs/paper.md name them; "ours" marks what the papers leave open.

Shapes: B lists, P padded pairs of a list (mask 0 in padding), A action dimensions, q reward groups, m critics a group. A pair whose
mask is 0 contributes exactly 0 to every sum and mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

STD_FLOOR = 1e-6
"""Smallest standard deviation: its gradient is 0 below, where the square root has none."""


class Bounds(NamedTuple):
    """Exploration is uniform in [mu_bp + low, mu_bp + high] per dimension; low < 0 < high."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """upper - lower."""
        return self.high - self.low


def action_input(actions: torch.Tensor, anchors: torch.Tensor, bounds: Bounds, *, relative: bool) -> torch.Tensor:
    """Action input of the critics (ours), in widths of the bounds: `a / (upper - lower)`, or `(a - mu_bp(s)) / (upper - lower)`.

    An actor that follows dQ/da needs a itself. The anchor moves from round to round: a slope learnt relative to old ones, followed from the
    newest, leads past the best action and on. Where values are only compared, relative input: a itself tells which anchor, hence which
    round, a list is of.

    Args:
        actions: (..., A) a.
        anchors: (..., A) mu_bp(s), the centre of exploration when the action was taken.
        bounds: Of exploration.
        relative: Which of the two.

    Returns:
        (..., A); relative, in [low, high] / width for an explored action.
    """
    return (actions - anchors if relative else actions) / bounds.width


def excess(actions: torch.Tensor, anchors: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Distance past the nearer bound per dimension, 0 inside: `max(mu_bp + lower - a, a - mu_bp - upper, 0)`, (..., A)."""
    offset = actions - anchors
    return torch.maximum(bounds.low - offset, offset - bounds.high).clamp_min(0.0)


def bound_penalty(over: torch.Tensor, bounds: Bounds, *, beta: float, continuous: bool) -> torch.Tensor:
    """Eq. (5) of UnifiedRL (v6): per dimension 0 inside the bounds, `exp(excess / (beta (upper - lower)))` outside.

    Args:
        over: (..., A) `excess`.
        bounds: Of exploration.
        beta: Steepness.
        continuous: Subtract 1 outside (ours), so that the penalty does not jump at the bound.

    Returns:
        (...) d(mu(s)), the mean over dimensions (ours).
    """
    outside = torch.exp(over / (beta * bounds.width))
    if continuous:
        outside = outside - 1
    return torch.where(over > 0, outside, torch.zeros_like(outside)).mean(-1)


def phi(over: torch.Tensor, bounds: Bounds, *, beta: float) -> torch.Tensor:
    """Discount of next values outside the bounds (UnifiedRL v6, in words; the form is ours): `exp(-mean excess / (beta (upper - lower)))`.

    Args:
        over: (..., A) `excess`.
        bounds: Of exploration.
        beta: Steepness.

    Returns:
        (...) in (0, 1], 1 inside.
    """
    return torch.exp(-over.mean(-1) / (beta * bounds.width))


def list_sum_td(
    values: torch.Tensor,
    shown: torch.Tensor,
    rewards: torch.Tensor,
    *,
    next_values: torch.Tensor,
    next_shown: torch.Tensor,
    bootstrap: torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """TD loss on sums over the list (EnhancedRL v4, in words; the form is ours).

    `y_{i,n} = sum_j r_i(s_j, a_j) + gamma (1 - terminated) sum_j' phi Q'_{i,n}(s'_j', mu'(s'_j'))`,
    `L_{i,n} = (sum_j Q_{i,n}(s_j, a_j) - y_{i,n})^2`, mean over the batch.

    Args:
        values: (q, m, B, P) Q of the pairs of the list.
        shown: (B, P) 1 = the user saw it.
        rewards: (B, P, q).
        next_values: (q, m, B, P') target values of the next list, times phi where that is used.
        next_shown: (B, P').
        bootstrap: (B,) 1 = a next list follows, 0 = the user left.
        gamma: Discount.

    Returns:
        (q, m) losses.
    """
    _check(values, shown, rewards, (next_values, next_shown, bootstrap))
    reward = (rewards * shown.unsqueeze(-1)).sum(1).T.unsqueeze(1)  # (q, 1, B)
    target = reward + gamma * bootstrap * (next_values * next_shown).sum(-1)  # (q, m, B)
    total = (values * shown).sum(-1)  # (q, m, B)
    assert total.shape == target.shape, (total.shape, target.shape)
    return (total - target.detach()).square().mean(-1)


def per_pair_td(
    values: torch.Tensor,
    shown: torch.Tensor,
    rewards: torch.Tensor,
    *,
    next_values: torch.Tensor,
    next_shown: torch.Tensor,
    bootstrap: torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """TD loss of each pair on its own (ours, the ablation of `list_sum_td`): item-level reward, next value = mean over the next list.

    `L_{i,n} = mean_j (Q_{i,n}(s_j, a_j) - r_i(s_j, a_j) - gamma (1 - terminated) mean_j' phi Q'_{i,n}(s'_j', mu'(s'_j')))^2`. Arguments and
    result as `list_sum_td`; the mean is over all shown pairs of the batch.
    """
    _check(values, shown, rewards, (next_values, next_shown, bootstrap))
    following = (next_values * next_shown).sum(-1) / next_shown.sum(-1).clamp_min(1.0)  # (q, m, B)
    target = rewards.permute(2, 0, 1).unsqueeze(1) + (gamma * bootstrap * following).unsqueeze(-1)  # (q, m, B, P)
    assert values.shape == target.shape, (values.shape, target.shape)
    return ((values - target.detach()).square() * shown).sum((-2, -1)) / shown.sum().clamp_min(1.0)


def pessimistic_values(values: torch.Tensor, group_weights: Sequence[float] | torch.Tensor, *, std_penalty: float) -> torch.Tensor:
    """Value terms of Eq. (4) of UnifiedRL (v6): `sum_i w_i (mean_n Q_{i,n} - lambda std_n Q_{i,n})`, population standard deviation (ours).

    Args:
        values: (q, m, ...) Q(s, mu(s)).
        group_weights: q weights w_i.
        std_penalty: lambda.

    Returns:
        (...).
    """
    weights = torch.as_tensor(group_weights, dtype=values.dtype, device=values.device).view(-1, *[1] * (values.dim() - 2))
    centred = values - values.mean(1, keepdim=True)
    std = centred.square().mean(1).clamp_min(STD_FLOOR**2).sqrt() if values.shape[1] > 1 else torch.zeros_like(values[:, 0])
    return (weights * (values.mean(1) - std_penalty * std)).sum(0)


def printed_actor_loss(pair_values: torch.Tensor, penalties: torch.Tensor, shown: torch.Tensor, *, eta: float) -> torch.Tensor:
    """Eq. (4) of UnifiedRL (v6) per pair: `-sum_i w_i Qbar_i + eta d(mu) + lambda sum_i w_i std_n Q_{i,n}`.

    Args:
        pair_values: (B, P) `pessimistic_values` of (s, mu(s)), with gradient to the actor.
        penalties: (B, P) d(mu(s)).
        shown: (B, P) the pairs of the list.
        eta: Weight of the penalty.

    Returns:
        Scalar: mean over the pairs of a list, then over lists.
    """
    assert pair_values.shape == penalties.shape == shown.shape, (pair_values.shape, penalties.shape, shown.shape)
    return masked_list_mean(eta * penalties - pair_values, shown)


def advantages(pair_values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_j of the listwise actor loss (ours): values centred per request, divided by the batch's standard deviation.

    Args:
        pair_values: (B, P) `pessimistic_values` of (s, mu(s)).
        valid: (B, P) shown and unshown pairs of a request.

    Returns:
        (B, P) without gradient, 0 in padding.
    """
    assert pair_values.shape == valid.shape, (pair_values.shape, valid.shape)
    values = pair_values.detach()
    mean = (values * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1.0)
    centred = (values - mean) * valid
    std = (centred.square().sum() / valid.sum().clamp_min(1.0)).sqrt()
    return centred / std.clamp_min(STD_FLOOR)


def listwise_actor_loss(
    fused: torch.Tensor, pair_advantages: torch.Tensor, penalties: torch.Tensor, valid: torch.Tensor, *, temperature: float, eta: float
) -> torch.Tensor:
    """The listwise actor loss (ours, docs/paper.md): `-sum_j softmax_j(score_j(mu) / temperature) A_j + eta d(mu)`, mean over requests.

    The gradient goes through the fused scores, Eq. (1), into the actor; the advantages are constants.

    Args:
        fused: (B, P) fused scores under mu(s).
        pair_advantages: (B, P) `advantages`.
        penalties: (B, P) d(mu(s)).
        valid: (B, P) shown and unshown pairs.
        temperature: Of the softmax.
        eta: Weight of the penalty.

    Returns:
        Scalar.
    """
    shapes = {fused.shape, pair_advantages.shape, penalties.shape, valid.shape}
    assert len(shapes) == 1, shapes
    shares = torch.softmax((fused / temperature).masked_fill(valid == 0, -1e9), dim=-1) * valid  # (B, P)
    return -(shares * pair_advantages).sum(-1).mean() + eta * masked_list_mean(penalties, valid)


def masked_list_mean(per_pair: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the pairs of a list, then over lists; a list without pairs counts as 0."""
    return ((per_pair * mask).sum(-1) / mask.sum(-1).clamp_min(1.0)).mean()


@torch.no_grad()
def soft_update(targets: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], *, tau: float) -> None:
    """Polyak step of the targets in place: `theta' <- theta' + tau (theta - theta')`."""
    torch._foreach_lerp_(list(targets), list(parameters), tau)


def _check(
    values: torch.Tensor, shown: torch.Tensor, rewards: torch.Tensor, following: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """A target of shape (B, 1) minus a prediction of shape (B,) would broadcast to (B, B) without a word."""
    q, m, b, p = values.shape
    next_values, next_shown, bootstrap = following
    assert shown.shape == (b, p) and rewards.shape == (b, p, q), (values.shape, shown.shape, rewards.shape)
    assert next_values.shape == (q, m, *next_shown.shape), (values.shape, next_values.shape, next_shown.shape)
    assert bootstrap.shape == (b,) == next_shown.shape[:1], (bootstrap.shape, next_shown.shape)
