"""The networks: an actor on one pair's enhanced state, an ensemble of independent critics as batched matmuls, and all of a learner's.

Both read the normalised numeric input first (F + k columns), so that a new normaliser can be folded exactly into their first layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import nn

from esrl_ray.normaliser import MIN_SCORE, Normaliser
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Floats

START_SCALE = 0.01
"""The actor's last layer starts this small, so that learning starts at the control policy a = 0."""


Level = Literal["pair", "request"]
"""What an actor sees: the enhanced state of a pair, or only what all pairs of a request share (user and context)."""

ActorShape = Literal["mlp", "ple"]


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
        self._columns = None if whole else list(spec.request_inputs)
        self._codes = list(range(spec.num_categorical)) if whole else list(spec.request_codes)
        self.embeddings = nn.ModuleList(nn.Embedding(spec.categorical_features[c].cardinality, embedding_size) for c in self._codes)
        num_inputs = spec.num_features + spec.num_scores if whole else len(spec.request_inputs)
        self.width = num_inputs + embedding_size * len(self._codes)

    def gather(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """(..., width) of numeric (..., F + k) and categorical (..., C)."""
        x = numeric if self._columns is None else numeric[..., self._columns]
        return torch.cat([x, *(table(categorical[..., c]) for c, table in zip(self._codes, self.embeddings, strict=True))], dim=-1)

    def _fold(self, layer: nn.Module, old: Normaliser, new: Normaliser) -> None:
        """Change a first layer so that its function of the raw input stays the same under the new normaliser."""
        assert isinstance(layer, nn.Linear)
        if self._columns is not None:
            old, new = old.take(self._columns), new.take(self._columns)
        layer.weight.T[:], layer.bias[:] = _folded(layer.weight.T, layer.bias, old, new)


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
        self.tower = nn.Parameter(_uniform(self._k, self._h, hidden_sizes[-1], fan_in=self._h))
        self.tower_bias = nn.Parameter(torch.zeros(self._k, hidden_sizes[-1]))
        self.ends = nn.Parameter(START_SCALE * _uniform(self._k, hidden_sizes[-1], 2, fan_in=hidden_sizes[-1]))
        self.end_bias = nn.Parameter(torch.zeros(self._k, 2))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """Actions of pairs (..., A); arguments as `PairNetwork.forward`."""
        x = self.gather(numeric, categorical)
        lead = x.shape[:-1]
        experts = torch.relu(self.experts(x)).view(*lead, -1, self._h)  # (..., SHARED + k OWN, h)
        shared, own = experts[..., : self.SHARED, :], experts[..., self.SHARED :, :].reshape(*lead, self._k, self.OWN, self._h)
        gates = torch.softmax(self.gates(x).view(*lead, self._k, -1), dim=-1)  # (..., k, SHARED + OWN)
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


class Critics(nn.Module):
    """Q_{i,n}(s, a): q groups x m independent MLPs, evaluated together as one batched matmul per layer.

    Args:
        spec: Widths F, k, C and A.
        num_groups: q.
        critics_per_group: m.
        hidden_sizes: Widths of the hidden layers.
        embedding_size: Width of each categorical feature's embedding; each critic has its own tables.
        actions: Whether they see actions.
    """

    def __init__(
        self,
        spec: Spec,
        num_groups: int,
        critics_per_group: int,
        *,
        hidden_sizes: Sequence[int],
        embedding_size: int,
        actions: bool = True,
    ) -> None:
        super().__init__()
        self.shape = (num_groups, critics_per_group)
        e = num_groups * critics_per_group
        self.embeddings = nn.ParameterList(torch.randn(e, f.cardinality, embedding_size) for f in spec.categorical_features)
        num_inputs = spec.num_features + spec.num_scores + (spec.num_actions if actions else 0)
        widths = [num_inputs + embedding_size * spec.num_categorical, *hidden_sizes, 1]
        self.weights = nn.ParameterList(_uniform(e, a, b, fan_in=a) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(_uniform(e, 1, b, fan_in=a) for a, b in pairwise(widths))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, relative_actions: torch.Tensor | None = None) -> torch.Tensor:
        """Values of pairs.

        Args:
            numeric: (N, F + k) float32, normalised.
            categorical: (N, C) int64 codes.
            relative_actions: (N, A) `(a - anchor) / width of the bounds`; None for critics that do not see actions.

        Returns:
            (q, m, N).
        """
        q, m = self.shape
        x = numeric if relative_actions is None else torch.cat([numeric, relative_actions], dim=-1)  # (N, in), broadcast over critics
        if len(self.embeddings) > 0:
            looked_up = [table[:, categorical[:, c]] for c, table in enumerate(self.embeddings)]  # each (q m, N, embedding)
            x = torch.cat([x.expand(q * m, -1, -1), *looked_up], dim=-1)
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = torch.relu(torch.matmul(x, weight) + bias)  # (q m, N, hidden)
        values: torch.Tensor = torch.matmul(x, last[0]) + last[1]  # (q m, N, 1)
        return values.view(q, m, -1)

    @torch.no_grad()
    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """Change the first layers so that the functions of the raw input stay the same under the new normaliser."""
        for weight, bias in zip(self.weights[0], self.biases[0], strict=True):
            weight[:], bias[0] = _folded(weight, bias[0], old, new)

    @torch.no_grad()
    def rescale(self, ratio: torch.Tensor) -> None:
        """Multiply the values of group i by ratio (q,)."""
        wide = ratio.repeat_interleave(self.shape[1])[:, None, None]  # (q m, 1, 1)
        self.weights[-1].mul_(wide)
        self.biases[-1].mul_(wide)


class SplitCritics(nn.Module):
    """Action-free critics, split by what they explain: a pair's reward, what it does to the rest of the session, and the user's state.

    All reward groups are summed, so that there are m critics of each kind. `pairs` are (reward rho, long-term f) of a pair; `users`,
    which see user and context only, are (offset b, value V) of a request.

    Args:
        spec: Widths F, k and C.
        num_critics: m.
        hidden_sizes: Widths of the hidden layers of `pairs`; those of `users` are half as wide.
        embedding_size: Width of each categorical feature's embedding.
    """

    def __init__(self, spec: Spec, num_critics: int, *, hidden_sizes: Sequence[int], embedding_size: int) -> None:
        super().__init__()
        narrow = [max(1, size // 2) for size in hidden_sizes]
        self.pairs = Critics(spec, 2, num_critics, hidden_sizes=hidden_sizes, embedding_size=embedding_size, actions=False)
        self.users = Critics(spec, 2, num_critics, hidden_sizes=narrow, embedding_size=embedding_size, actions=False)

    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """As `Critics.fold`."""
        self.pairs.fold(old, new)
        self.users.fold(old, new)

    def rescale(self, ratio: torch.Tensor) -> None:
        """Multiply all values by the ratio of the norms of the value scales (q,), old over new."""
        self.pairs.rescale(ratio.expand(2))
        self.users.rescale(ratio.expand(2))


class Networks(nn.Module):
    """All that a learner's parameters are: actor, critics, their targets, the frozen anchor, and the scales that they share.

    The five networks read the same normalised input: another policy becomes the anchor by folding its normaliser into this one. Critics
    give values in units of `value_scale`, the standard deviation of a list's reward in each group.

    Args:
        spec: Widths and ranges.
        num_groups: q.
        critics_per_group: m.
        hidden_sizes: Widths of actor and critics.
        embedding_size: Width of a categorical feature's embedding.
        level: What the actor sees.
        split: Critics are `SplitCritics`.
        actor: Its shape.
    """

    mean: torch.Tensor
    std: torch.Tensor
    value_scale: torch.Tensor

    def __init__(
        self,
        spec: Spec,
        num_groups: int,
        critics_per_group: int,
        *,
        hidden_sizes: Sequence[int],
        embedding_size: int,
        level: Level = "pair",
        split: bool = False,
        actor: ActorShape = "mlp",
    ) -> None:
        super().__init__()
        self.spec, self.level = spec, level
        self.actor = make_actor(spec, hidden_sizes, embedding_size, level=level, shape=actor)
        self.critics: Critics | SplitCritics
        if split:
            self.critics = SplitCritics(spec, critics_per_group, hidden_sizes=hidden_sizes, embedding_size=embedding_size)
        else:
            self.critics = Critics(spec, num_groups, critics_per_group, hidden_sizes=hidden_sizes, embedding_size=embedding_size)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.anchor = copy.deepcopy(self.actor).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(spec.num_features + spec.num_scores))
        self.register_buffer("std", torch.ones(spec.num_features + spec.num_scores))
        self.register_buffer("value_scale", torch.ones(num_groups))
        self.set_static_anchor(np.zeros(spec.num_actions, np.float32))

    def numeric(self, states: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Normalised numeric input (..., F + k) of raw states (..., F) and scores (..., k): `normaliser.numeric_input` on the device."""
        raw = torch.cat([states, scores.clamp_min(MIN_SCORE).log()], dim=-1)
        normalised: torch.Tensor = (raw - self.mean) / self.std
        return normalised

    def visible(self, numeric: torch.Tensor, categorical: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (..., F + k) and codes (..., C) as all networks see them: at the level of requests without those of the item."""
        return (numeric, categorical) if self.level == "pair" else self.request_only(numeric, categorical)

    def request_only(self, numeric: torch.Tensor, categorical: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (..., F + k) and codes (..., C), 0 where they belong to an item."""
        kept, codes = torch.zeros_like(numeric), torch.zeros_like(categorical)
        for whole, part, columns in ((numeric, kept, self.spec.request_inputs), (categorical, codes, self.spec.request_codes)):
            part[..., list(columns)] = whole[..., list(columns)]
        return kept, codes

    @property
    def normaliser(self) -> Normaliser:
        """A copy of the frozen normaliser."""
        return Normaliser(self.mean.cpu().numpy().copy(), self.std.cpu().numpy().copy())

    @torch.no_grad()
    def set_scales(self, normaliser: Normaliser, value_scale: Floats, *, fold: bool) -> None:
        """Take a new normaliser and new value scales.

        Args:
            normaliser: Of the numeric input.
            value_scale: (q,) standard deviations of a list's reward.
            fold: Change first and last layers so that no function changes; without it the networks keep their parameters, which is
                right only before they have learnt anything. Adam's moments are kept as they are: they adapt in some hundred steps.
        """
        old, scale = self.normaliser, torch.as_tensor(value_scale, device=self.value_scale.device)
        if fold:
            for network in (self.actor, self.critics, self.target_actor, self.target_critics, self.anchor):
                network.fold(old, normaliser)
            before, after = self.value_scale, scale
            if isinstance(self.critics, SplitCritics):
                before, after = before.norm(), after.norm()
            for critics in (self.critics, self.target_critics):
                critics.rescale(before / after)
        self.mean.copy_(torch.as_tensor(normaliser.mean))
        self.std.copy_(torch.as_tensor(normaliser.std))
        self.value_scale.copy_(scale)

    @torch.no_grad()
    def set_anchor(self, parameters: Mapping[str, Floats], normaliser: Normaliser) -> None:
        """Make a `pair` policy the anchor mu_bp.

        Args:
            parameters: An actor's parameters by name.
            normaliser: That they were trained with; folded into this one, so that the anchor's function is the policy's.
        """
        self.anchor.load_state_dict({k: torch.as_tensor(np.array(v)) for k, v in parameters.items()})
        self.anchor.fold(normaliser, self.normaliser)

    @torch.no_grad()
    def start_from_anchor(self) -> None:
        """Let actor and target actor begin as copies of the anchor: for a learner that comes after the policies of another."""
        for actor in (self.actor, self.target_actor):
            actor.load_state_dict(self.anchor.state_dict())

    @torch.no_grad()
    def set_static_anchor(self, action: Floats) -> None:
        """Make one action (A,) for all pairs the anchor."""
        self.anchor.make_constant(torch.as_tensor(action))


def _logits(action: torch.Tensor) -> torch.Tensor:
    return torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))


def _uniform(*shape: int, fan_in: int) -> torch.Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


def _folded(weight: torch.Tensor, bias: torch.Tensor, old: Normaliser, new: Normaliser) -> tuple[torch.Tensor, torch.Tensor]:
    """W (in, out), b (out,) with `W' x_new + b' = W x_old + b`: `x_old = (x_new std_new + mean_new - mean_old) / std_old`, in float64."""
    n = len(old.mean)
    old_mean, old_std, new_mean, new_std = (
        torch.as_tensor(v, dtype=torch.float64, device=weight.device) for v in (old.mean, old.std, new.mean, new.std)
    )
    wide = weight.double().clone()
    shifted = bias.double() + ((new_mean - old_mean) / old_std) @ wide[:n]
    wide[:n] *= (new_std / old_std)[:, None]
    return wide.to(weight.dtype), shifted.to(bias.dtype)
