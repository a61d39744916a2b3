"""The equations of TD3 (Fujimoto et al., 2018) and TD3+BC (Fujimoto & Gu, 2021), one pure function each.

Shapes: B transitions, A action dimensions, m = 2 twin critics.
"""

from __future__ import annotations

import torch


def smoothed_actions(actions: torch.Tensor, noise: torch.Tensor, *, noise_clip: float) -> torch.Tensor:
    """Target policy smoothing: `a' = clip(mu'(s') + clip(noise, -c, c), -1, 1)`.

    Args:
        actions: (B, A) mu'(s').
        noise: (B, A) Gaussian.
        noise_clip: c.

    Returns:
        (B, A).
    """
    return (actions + noise.clamp(-noise_clip, noise_clip)).clamp(-1.0, 1.0)


def clipped_double_target(rewards: torch.Tensor, next_values: torch.Tensor, has_next: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Clipped double Q-learning: `y = r + gamma has_next min_n Q'_n(s', a')`.

    Args:
        rewards: (B,).
        next_values: (m, B) target values.
        has_next: (B,) 1 = a next list follows, 0 = the user left.
        gamma: Discount.

    Returns:
        (B,) without gradient.
    """
    assert rewards.shape == has_next.shape == next_values.shape[1:], (rewards.shape, has_next.shape, next_values.shape)
    return (rewards + gamma * has_next * next_values.amin(0)).detach()


def td_loss(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`sum_n mean_b (Q_n(s, a) - y)^2` of values (m, B) and their common target (B,)."""
    assert values.shape[1:] == target.shape, (values.shape, target.shape)
    return (values - target).square().mean(1).sum()


def actor_loss(values: torch.Tensor) -> torch.Tensor:
    """Deterministic policy gradient of TD3: `-mean_b Q_1(s, mu(s))` of values (m, B); only the first critic counts."""
    return -values[0].mean()


def behaviour_cloning_actor_loss(values: torch.Tensor, actions: torch.Tensor, logged: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """TD3+BC: `-lambda mean_b Q_1(s, mu(s)) + mean (mu(s) - a)^2`, `lambda = alpha / mean_b |Q_1|` without gradient.

    Args:
        values: (m, B) of (s, mu(s)).
        actions: (B, A) mu(s), in any unit.
        logged: (B, A) a, in the same unit.
        alpha: Weight of the value against imitation; 2.5 in the paper.
    """
    assert actions.shape == logged.shape, (actions.shape, logged.shape)
    scale = alpha / values[0].detach().abs().mean().clamp_min(1e-6)
    return scale * actor_loss(values) + (actions - logged).square().mean()
