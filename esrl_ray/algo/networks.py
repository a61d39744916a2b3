"""The networks: an actor on one pair's enhanced state, and an ensemble of independent critics as batched matmuls.

Both read the normalised numeric input first (F + k columns), so that a new normaliser can be folded exactly into their first layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from esrl_ray.normaliser import Normaliser
from esrl_ray.spec import Spec

START_SCALE = 0.01
"""The actor's last layer starts this small, so that learning starts at the control policy a = 0."""


class Actor(nn.Module):
    """mu(s): an MLP with a tanh end on one pair, shared over the candidates.

    Args:
        spec: Widths F, k, C and A.
        hidden_sizes: Widths of the hidden layers.
        embedding_size: Width of each categorical feature's embedding.
    """

    def __init__(self, spec: Spec, hidden_sizes: Sequence[int], embedding_size: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(f.cardinality, embedding_size) for f in spec.categorical_features)
        widths = [spec.num_features + spec.num_scores + embedding_size * spec.num_categorical, *hidden_sizes, spec.num_actions]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(START_SCALE)
            last.bias.zero_()

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """Actions of pairs.

        Args:
            numeric: (..., F + k) float32, normalised.
            categorical: (..., C) int64 codes.

        Returns:
            (..., A) in (-1, 1).
        """
        x = torch.cat([numeric, *(table(categorical[..., c]) for c, table in enumerate(self.embeddings))], dim=-1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return torch.tanh(self.layers[-1](x))  # (..., A)

    @torch.no_grad()
    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """Change the first layer so that the function of the raw input stays the same under the new normaliser."""
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        first.weight.T[:], first.bias[:] = _folded(first.weight.T, first.bias, old, new)


class Critics(nn.Module):
    """Q_{i,n}(s, a): q groups x m independent MLPs, evaluated together as one batched matmul per layer.

    Args:
        spec: Widths F, k, C and A.
        num_groups: q.
        critics_per_group: m.
        hidden_sizes: Widths of the hidden layers.
        embedding_size: Width of each categorical feature's embedding; each critic has its own tables.
    """

    def __init__(self, spec: Spec, num_groups: int, critics_per_group: int, *, hidden_sizes: Sequence[int], embedding_size: int) -> None:
        super().__init__()
        self.shape = (num_groups, critics_per_group)
        e = num_groups * critics_per_group
        self.embeddings = nn.ParameterList(torch.randn(e, f.cardinality, embedding_size) for f in spec.categorical_features)
        widths = [spec.num_features + spec.num_scores + spec.num_actions + embedding_size * spec.num_categorical, *hidden_sizes, 1]
        self.weights = nn.ParameterList(_uniform(e, a, b, fan_in=a) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(_uniform(e, 1, b, fan_in=a) for a, b in pairwise(widths))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, relative_actions: torch.Tensor) -> torch.Tensor:
        """Values of pairs.

        Args:
            numeric: (N, F + k) float32, normalised.
            categorical: (N, C) int64 codes.
            relative_actions: (N, A) `(a - anchor) / width of the bounds`.

        Returns:
            (q, m, N).
        """
        q, m = self.shape
        x = torch.cat([numeric, relative_actions], dim=-1)  # (N, in), broadcast over the q m critics
        if len(self.embeddings) > 0:
            looked_up = [table[:, categorical[:, c]] for c, table in enumerate(self.embeddings)]  # each (q m, N, embedding)
            x = torch.cat([x.expand(q * m, -1, -1), *looked_up], dim=-1)
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = torch.relu(torch.matmul(x, weight) + bias)  # (q m, N, hidden)
        return (torch.matmul(x, last[0]) + last[1]).view(q, m, -1)

    @torch.no_grad()
    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """Change the first layers so that the functions of the raw input stay the same under the new normaliser."""
        for weight, bias in zip(self.weights[0], self.biases[0], strict=True):
            weight[:], bias[0] = _folded(weight, bias[0], old, new)


def _uniform(*shape: int, fan_in: int) -> torch.Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


def _folded(weight: torch.Tensor, bias: torch.Tensor, old: Normaliser, new: Normaliser) -> tuple[torch.Tensor, torch.Tensor]:
    """W (in, out) and b (out,) with `W' x_new + b' = W x_old + b`, from `x_old = (x_new std_new + mean_new - mean_old) / std_old`; in float64."""
    n = len(old.mean)
    old_mean, old_std, new_mean, new_std = (
        torch.as_tensor(v, dtype=torch.float64, device=weight.device) for v in (old.mean, old.std, new.mean, new.std)
    )
    wide = weight.double().clone()
    shifted = bias.double() + ((new_mean - old_mean) / old_std) @ wide[:n]
    wide[:n] *= (new_std / old_std)[:, None]
    return wide.to(weight.dtype), shifted.to(bias.dtype)
