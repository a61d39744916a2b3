"""Actors: networks on one pair's enhanced state, shared over the candidates, and what their first layers have in common with critics'.

All read the normalised numeric input first (F + k columns), so that a new normaliser can be folded exactly into their first layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from esrl_ray.normaliser import Normaliser
from esrl_ray.spec import Spec

START_SCALE = 0.01
"""The actor's last layer starts this small, so that learning starts at the control policy a = 0."""


Level = Literal["pair", "request"]
"""What an actor sees: the enhanced state of a pair, or only what all pairs of a request share (user and context)."""

ActorShape = Literal["mlp", "ple"]


def request_inputs(numeric: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Columns `spec.request_inputs` (..., U) of (..., F or more): slices, where a list of columns would wait for the device."""
    user, item = len(spec.user_features), len(spec.item_features)
    return torch.cat([numeric[..., :user], numeric[..., user + item : spec.num_features]], -1)


class _Inputs(nn.Module):
    """The input of a network on pairs: numeric columns and embedded codes.

    Args:
        spec: Widths F, k and C.
        embedding_size: Width of each categorical feature's embedding.
        level: `request` takes those of user and context only, so that all pairs of a request get the same result.
    """

    def __init__(self, spec: Spec, embedding_size: int, level: Level) -> None:
        super().__init__()
        whole = level == "pair"
        self._spec, self._columns = spec, None if whole else list(spec.request_inputs)
        self._codes = list(range(spec.num_categorical)) if whole else list(spec.request_codes)
        self.embeddings = nn.ModuleList(nn.Embedding(spec.categorical_features[c].cardinality, embedding_size) for c in self._codes)
        num_inputs = spec.num_features + spec.num_scores if whole else len(spec.request_inputs)
        self.width = num_inputs + embedding_size * len(self._codes)

    def gather(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """(..., width) of numeric (..., F + k) and categorical (..., C)."""
        x = numeric if self._columns is None else request_inputs(numeric, self._spec)
        return torch.cat([x, *(table(categorical[..., c]) for c, table in zip(self._codes, self.embeddings, strict=True))], dim=-1)

    def _fold(self, layer: nn.Module, old: Normaliser, new: Normaliser) -> None:
        """Change a first layer so that its function of the raw input stays the same under the new normaliser."""
        assert isinstance(layer, nn.Linear)
        if self._columns is not None:
            old, new = old.take(self._columns), new.take(self._columns)
        layer.weight.T[:], layer.bias[:] = folded(layer.weight.T, layer.bias, old, new)


class PairNetwork(_Inputs):
    """An MLP on one pair's enhanced state, shared over the candidates.

    Args:
        spec: Widths F, k and C.
        hidden_sizes: Widths of the hidden layers.
        embedding_size: Width of each categorical feature's embedding.
        num_outputs: Width of the result.
        level: What it sees.
    """

    def __init__(self, spec: Spec, hidden_sizes: Sequence[int], embedding_size: int, *, num_outputs: int, level: Level = "pair") -> None:
        super().__init__(spec, embedding_size, level)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([self.width, *hidden_sizes, num_outputs]))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """Results of pairs.

        Args:
            numeric: (..., F + k) float32, normalised.
            categorical: (..., C) int64 codes.

        Returns:
            (..., num_outputs).
        """
        x = self.gather(numeric, categorical)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        result: torch.Tensor = self.layers[-1](x)
        return result

    @torch.no_grad()
    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """Change the first layer so that the function of the raw input stays the same under the new normaliser."""
        self._fold(self.layers[0], old, new)


class Actor(PairNetwork):
    """mu(s): a `PairNetwork` with a tanh end; actions (..., A) in (-1, 1). Starts at the control policy a = 0."""

    def __init__(self, spec: Spec, hidden_sizes: Sequence[int], embedding_size: int, *, level: Level = "pair") -> None:
        super().__init__(spec, hidden_sizes, embedding_size, num_outputs=spec.num_actions, level=level)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(START_SCALE)
            last.bias.zero_()

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """Actions of pairs (..., A); arguments as `PairNetwork.forward`."""
        return torch.tanh(super().forward(numeric, categorical))

    @torch.no_grad()
    def make_constant(self, action: torch.Tensor) -> None:
        """Give every pair the action (A,): the last layer forgets its input."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.copy_(_logits(action))


class PleActor(_Inputs):
    """mu(s) with the experts of PLE (Tang et al. 2020; one extraction level, our reading of "PLE-like"): a task per upstream score.

    Task i mixes shared experts and its own by a gate on the input, and its tower gives the power and the bias of score i. Starts at the
    control policy a = 0.

    Args:
        spec: Widths F, k and C.
        hidden_sizes: Width of an expert, then those of a tower's hidden layer (one more number; the same when there is none).
        embedding_size: Width of each categorical feature's embedding.
        level: What it sees.
    """

    SHARED, OWN = 4, 1
    """Experts that all tasks share, and experts of each task."""

    def __init__(self, spec: Spec, hidden_sizes: Sequence[int], embedding_size: int, *, level: Level = "pair") -> None:
        super().__init__(spec, embedding_size, level)
        self._k, self._h = spec.num_scores, hidden_sizes[0]
        self.experts = nn.Linear(self.width, (self.SHARED + self._k * self.OWN) * self._h)
        self.gates = nn.Linear(self.width, self._k * (self.SHARED + self.OWN))
        self.tower = nn.Parameter(uniform_(self._k, self._h, hidden_sizes[-1], fan_in=self._h))
        self.tower_bias = nn.Parameter(torch.zeros(self._k, hidden_sizes[-1]))
        self.ends = nn.Parameter(START_SCALE * uniform_(self._k, hidden_sizes[-1], 2, fan_in=hidden_sizes[-1]))
        self.end_bias = nn.Parameter(torch.zeros(self._k, 2))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """Actions of pairs (..., A); arguments as `PairNetwork.forward`."""
        x = self.gather(numeric, categorical)
        lead = x.shape[:-1]  # sizes are named: a batch without next lists has none of their pairs, and -1 could be anything
        experts = torch.relu(self.experts(x)).view(*lead, self.SHARED + self._k * self.OWN, self._h)
        shared, own = experts[..., : self.SHARED, :], experts[..., self.SHARED :, :].reshape(*lead, self._k, self.OWN, self._h)
        gates = torch.softmax(self.gates(x).view(*lead, self._k, self.SHARED + self.OWN), dim=-1)  # (..., k, SHARED + OWN)
        mixed = torch.matmul(gates[..., : self.SHARED], shared) + (gates[..., self.SHARED :].unsqueeze(-1) * own).sum(-2)  # (..., k, h)
        hidden = torch.relu(torch.einsum("...kh,khw->...kw", mixed, self.tower) + self.tower_bias)
        ends = torch.einsum("...kw,kwo->...ko", hidden, self.ends) + self.end_bias  # (..., k, 2): power, bias
        return torch.tanh(torch.cat([ends[..., 0], ends[..., 1]], dim=-1))

    @torch.no_grad()
    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """As `PairNetwork.fold`."""
        self._fold(self.experts, old, new)
        self._fold(self.gates, old, new)

    @torch.no_grad()
    def make_constant(self, action: torch.Tensor) -> None:
        """As `Actor.make_constant`."""
        self.ends.zero_()
        self.end_bias.copy_(_logits(action).view(2, self._k).T)


def make_actor(
    spec: Spec, hidden_sizes: Sequence[int], embedding_size: int, *, level: Level = "pair", shape: ActorShape = "mlp"
) -> Actor | PleActor:
    """The actor that the configuration or a manifest names; arguments as `Actor` and `PleActor`."""
    kind = PleActor if shape == "ple" else Actor
    return kind(spec, hidden_sizes, embedding_size, level=level)


def _logits(action: torch.Tensor) -> torch.Tensor:
    return torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))


def uniform_(*shape: int, fan_in: int) -> torch.Tensor:
    """Start of a layer's parameters: U(-1, 1) / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


def folded(weight: torch.Tensor, bias: torch.Tensor, old: Normaliser, new: Normaliser) -> tuple[torch.Tensor, torch.Tensor]:
    """W (in, out), b (out,) with `W' x_new + b' = W x_old + b`: `x_old = (x_new std_new + mean_new - mean_old) / std_old`, in float64."""
    n = len(old.mean)
    old_mean, old_std, new_mean, new_std = (
        torch.as_tensor(v, dtype=torch.float64, device=weight.device) for v in (old.mean, old.std, new.mean, new.std)
    )
    wide = weight.double().clone()
    shifted = bias.double() + ((new_mean - old_mean) / old_std) @ wide[:n]
    wide[:n] *= (new_std / old_std)[:, None]
    return wide.to(weight.dtype), shifted.to(bias.dtype)
