"""The split critic (ours): what a pair pays now is learnt from its own reward, what it does to the rest of the session from who stays.

A list-sum critic must find a pair's share in one noisy number per list. Here the reward heads rho are supervised on every shown pair, and
the long-term effect f of a pair is how many more lists of the session it brings, times what a list pays on average.

Not the rewards of later lists: they say more about who the user is than about what the list did to them. A user of high scores is
shown high scores and pays well on the next list too, and nothing in the state tells the one from the other; a return of rewards, from a
value network or not, credits the list with it, and more data does not help. Whether the user comes back for another list tells the effect
much better (docs/paper.md has the numbers).

Not by gradient steps: f is a small difference in a noisy number. A network fits the noise, and even a linear f by Adam loses a fifth of
the correlation with the truth that least squares in closed form has (`python -m benchmarks.credit`). So f is linear in the item's features
and the predicted rewards, and its normal equations are summed up over batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

MEMORY = 2000
"""Batches that the sums remember: each batch makes those before it count `1 - 1 / MEMORY` times as much."""
RIDGE = 1e-4
"""Of the solution, on inputs of standard deviation 1; with few lists it is their number of inputs over the number of lists."""


def reward_losses(values: torch.Tensor, rewards: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """`(rho_{i,n}(s_j) - r_{i,j})^2`, mean over the shown pairs of the batch.

    Args:
        values: (q, m, B, L) rho.
        rewards: (B, L, q) of pairs.
        shown: (B, L).

    Returns:
        (q, m), one loss for each critic.
    """
    assert values.shape[2:] == shown.shape == rewards.shape[:2] and values.shape[0] == rewards.shape[2]
    errors = values - rewards.permute(2, 0, 1).unsqueeze(1)
    return (errors.square() * shown).sum((-2, -1)) / shown.sum().clamp_min(1.0)


def lists_ahead(known: torch.Tensor, terminated: torch.Tensor, ended: torch.Tensor, leaving: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Discounted number of lists after this one: `y = sum_{h=1..K} gamma^h + (1 - left) gamma^K rest`.

    K of the next H lists are known. Where the user has not left by then, the rest is what is expected when a share p of users leaves after
    each list: `e = gamma (1 - p) / (1 - gamma (1 - p))` where it is not known whether another list comes (K < H), and `gamma (1 + e)` where
    one does (K = H).

    Args:
        known: (B, H) 1 = that list is there; 1s come first.
        terminated: (B, H) 1 = the user left after it.
        ended: (B,) 1 = the user left after this one.
        leaving: () p.
        gamma: Discount, below 1.

    Returns:
        (B,).
    """
    assert known.shape == terminated.shape and ended.shape == known.shape[:1], (known.shape, terminated.shape, ended.shape)
    num_known = known.sum(-1)
    left = torch.maximum(ended, (known * terminated).amax(-1))
    stays = gamma * (1 - leaving)
    rest = torch.where(num_known < known.shape[1], stays, gamma) / (1 - stays)
    faded = torch.full_like(num_known, gamma).pow(num_known)
    return gamma * (1 - faded) / (1 - gamma) + (1 - left) * faded * rest


class Sums(NamedTuple):
    """What least squares and the averages need, summed over lists."""

    gram: torch.Tensor  # (D + U + 1, D + U + 1) of inputs: effects of the shown pairs, the request, 1
    moment: torch.Tensor  # (D + U + 1, 2) inputs times lists ahead, near and far
    ends: torch.Tensor  # () sessions that ended
    reward: torch.Tensor  # ()


class LongTerm(nn.Module):
    """f of a pair from the sums over all batches: `sum_j w psi(s_j) + v u + c ~ lists_ahead`, times the mean reward of a list.

    The direction of w is fitted to the lists ahead with the discount `learner.effect_gamma`, about as fast as the effect of a list fades:
    what comes after says nothing about this list. Its length is then fitted to the lists ahead with the discount `learner.gamma`.

    Everything is in units of the log, not of the normaliser, so that neither a new one nor new value scales change anything.

    Args:
        num_effects: D, width of psi.
        num_request: U, numeric inputs of user and context.
    """

    gram: torch.Tensor
    moment: torch.Tensor
    ends: torch.Tensor
    reward: torch.Tensor
    weights: torch.Tensor

    def __init__(self, num_effects: int, num_request: int) -> None:
        super().__init__()
        width = num_effects + num_request + 1
        for name, shape in (("gram", (width, width)), ("moment", (width, 2)), ("ends", ()), ("reward", ())):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(num_effects))

    @property
    def leaving(self) -> torch.Tensor:
        """() share of lists after which the user leaves; 0 before there was a list."""
        return (self.ends / self.gram[-1, -1].clamp_min(1.0)).float()

    def forward(self, effects: torch.Tensor) -> torch.Tensor:
        """f of pairs, in units of reward: psi (..., D) -> (...)."""
        return effects @ self.weights * (self.reward / self.gram[-1, -1].clamp_min(1.0)).float()

    def sums(self, effects: torch.Tensor, request: torch.Tensor, ahead: torch.Tensor, ended: torch.Tensor, reward: torch.Tensor) -> Sums:
        """The sums of a batch.

        Args:
            effects: (B, D) psi summed over the shown pairs.
            request: (B, U).
            ahead: (B, 2) `lists_ahead` with the discount `effect_gamma`, and with `gamma`.
            ended: (B,) 1 = the user left after the list.
            reward: (B,) of the list.
        """
        inputs = torch.cat([effects, request, torch.ones_like(effects[:, :1])], -1).double()
        return Sums(inputs.T @ inputs, inputs.T @ ahead.double(), ended.sum().double(), reward.sum().double())

    def add(self, sums: Sums) -> None:
        """Take the sums of another batch."""
        for total, more in zip((self.gram, self.moment, self.ends, self.reward), sums, strict=True):
            total.mul_(1 - 1 / MEMORY).add_(more)

    def solve(self) -> None:
        """Set w. Inputs are standardised first; one that never varies gets 0."""
        count, num_effects = self.gram[-1, -1].clamp_min(1.0), len(self.weights)
        mean, mean_ahead = self.gram[-1, :-1] / count, self.moment[-1] / count
        covariance = self.gram[:-1, :-1] / count - torch.outer(mean, mean)
        variance = covariance.diagonal()
        std = torch.where((variance > 1e-10 * mean.square()) & (variance > 0), variance.clamp_min(0.0).sqrt(), torch.inf)
        cross = (self.moment[:-1] / count - torch.outer(mean, mean_ahead)) / std.unsqueeze(-1)  # (D + U, 2)
        eye = torch.eye(len(std), dtype=std.dtype, device=std.device)
        ridge = eye * (len(std) / count).clamp_min(RIDGE)
        standard = covariance / torch.outer(std, std) + ridge
        direction = torch.linalg.solve_ex(standard, cross[:, 0])[0][:num_effects]  # `_ex` does not wait for the device
        direction = direction / direction.norm().clamp_min(1e-12)
        along = torch.cat([torch.nn.functional.pad(direction, (0, len(std) - num_effects)).unsqueeze(0), eye[num_effects:]])
        length = torch.linalg.solve_ex(along @ standard @ along.T + ridge[num_effects - 1 :, num_effects - 1 :], along @ cross[:, 1])[0][0]
        self.weights.copy_(length.clamp_min(0.0) * direction / std[:num_effects])
