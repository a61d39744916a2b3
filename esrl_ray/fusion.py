"""Eq. (1) of EnhancedRL (v4), in logarithms: the action of a pair becomes powers and biases that combine its upstream scores."""

from __future__ import annotations

import torch

from esrl_ray.spec import Spec

EPS = 1e-6
"""Smallest value that a score plus its bias may have before the logarithm."""


def fusion_weights(actions: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Powers and biases of actions.

    Args:
        actions: (..., A) in [-1, 1]; k powers, then k biases.
        spec: Ranges.

    Returns:
        powers (..., k), biases (..., k).
    """
    base = torch.stack([actions.new_full((), power) for power in spec.power_base])  # filled on the device: a copy would wait for it
    powers, biases = actions[..., : spec.num_scores], actions[..., spec.num_scores :]
    return base + spec.power_span * powers, spec.bias_base + spec.bias_span * biases


def fused_scores(scores: torch.Tensor, actions: torch.Tensor, spec: Spec) -> torch.Tensor:
    """`score_j = sum_i power_i log(max(pred_{j,i} + bias_i, eps))`: the log of Eq. (1), which orders alike and cannot overflow.

    Args:
        scores: (..., k) upstream scores.
        actions: (..., A).
        spec: Ranges.

    Returns:
        (...) fused scores.
    """
    powers, biases = fusion_weights(actions, spec)
    return (powers * (scores + biases).clamp_min(EPS).log()).sum(-1)
