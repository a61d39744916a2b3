"""The split critic (ours): what a pair pays now is learnt from its own reward, what it does to the rest of the session from the session.

A list-sum critic must find a pair's share in one noisy number per list. Here the reward head rho is supervised on every shown pair, and
only what is left, the long-term effect, is credited through sums over lists: `sum_j f(s_j) + b(u)` is fitted to the value of the session
after this list, which a lambda-return along the logged session estimates with V(u), the value of the user's state alone. All three are
action-free: the listwise actor needs to know which pairs are good, not which weights put them there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SplitLosses(NamedTuple):
    """One loss per critic, (m,) each."""

    reward: torch.Tensor
    long_term: torch.Tensor
    value: torch.Tensor


def lambda_return(
    rewards: torch.Tensor, values: torch.Tensor, known: torch.Tensor, terminated: torch.Tensor, *, gamma: float, trace: float
) -> torch.Tensor:
    """`G_h = r_h + gamma (1 - terminated_h) [(1 - lambda) V(u_{h+1}) + lambda G_{h+1}]`:
    the lambda-return of a list (Sutton, Barto 2018, §12.1).

    Args:
        rewards: (B, H) of the next H lists.
        values: (B, H) V of their user states.
        known: (B, H) 1 = that list is there; 1s come first.
        terminated: (B, H) 1 = the user left after it.
        gamma: Discount.
        trace: lambda.

    Returns:
        (B,) G of the first of the lists: V itself where what follows a list is not known; 0 without a list.
    """
    assert rewards.shape == values.shape == known.shape == terminated.shape, (rewards.shape, values.shape, known.shape, terminated.shape)
    result = values[:, -1] * (1 - terminated[:, -1]) + rewards[:, -1] * terminated[:, -1]  # the last one: nothing behind it
    for h in range(rewards.shape[1] - 2, -1, -1):
        following = (1 - trace) * values[:, h + 1] + trace * result
        complete = torch.maximum(known[:, h + 1], terminated[:, h])
        returned = rewards[:, h] + gamma * (1 - terminated[:, h]) * following
        result = complete * returned + (1 - complete) * values[:, h]
    return result * known[:, 0]


def split_losses(
    pair_values: torch.Tensor, user_values: torch.Tensor, rewards: torch.Tensor, shown: torch.Tensor, *, after: torch.Tensor
) -> SplitLosses:
    """`(rho(s_j) - r_j)^2` over shown pairs; `(sum_j f(s_j) + b(u) - y)^2` and `(V(u) - sum_j r_j - y)^2` over lists, y = `after`.

    Args:
        pair_values: (2, m, B, L) rho and f.
        user_values: (2, m, B) b and V.
        rewards: (B, L) of pairs, groups summed.
        shown: (B, L).
        after: (B,) discounted value of the session after the list; no gradient.

    Returns:
        Mean squared errors of each critic.
    """
    _, m, b, lists = pair_values.shape
    assert user_values.shape == (2, m, b) and rewards.shape == shown.shape == (b, lists) and after.shape == (b,)
    (rho, f), (offset, value), y = pair_values, user_values, after.detach()
    reward = ((rho - rewards).square() * shown).sum((-2, -1)) / shown.sum().clamp_min(1.0)  # (m,)
    long_term = ((f * shown).sum(-1) + offset - y).square().mean(-1)
    return SplitLosses(reward, long_term, (value - (rewards * shown).sum(-1) - y).square().mean(-1))
