"""The critics, as an ensemble, and all of a learner's networks.

Critics read the normalised numeric input first, as actors do (`algo.actor`): a new normaliser is folded exactly into their first layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from esrl_ray.algo.actor import ActorShape, Level, folded, make_actor, request_inputs, uniform_
from esrl_ray.algo.ensemble import ensemble
from esrl_ray.algo.split import LongTerm, num_held, num_products
from esrl_ray.normaliser import MIN_SCORE, Normaliser
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Floats


class Critics(nn.Module):
    """Q_{i,n}(s, a): q groups x m independent MLPs, evaluated together (`algo.ensemble`).

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
        self.weights = nn.ParameterList(uniform_(e, a, b, fan_in=a) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(uniform_(e, 1, b, fan_in=a) for a, b in pairwise(widths))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, actions: torch.Tensor | None = None) -> torch.Tensor:
        """Values of pairs.

        Args:
            numeric: (N, F + k) float32, normalised.
            categorical: (N, C) int64 codes.
            actions: (N, A) from `losses.action_input`; None for critics that do not see actions.

        Returns:
            (q, m, N).
        """
        q, m = self.shape
        x = numeric if actions is None else torch.cat([numeric, actions], dim=-1)  # (N, in), the same for all critics
        if len(self.embeddings) > 0:
            looked_up = [table[:, categorical[:, c]] for c, table in enumerate(self.embeddings)]  # each (q m, N, embedding)
            x = torch.cat([x.expand(q * m, -1, -1), *looked_up], dim=-1)
        return ensemble(x.transpose(-2, -1), list(self.weights), list(self.biases)).view(q, m, -1)

    @torch.no_grad()
    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """Change the first layers so that the functions of the raw input stay the same under the new normaliser."""
        for weight, bias in zip(self.weights[0], self.biases[0], strict=True):
            weight[:], bias[0] = folded(weight, bias[0], old, new)

    @torch.no_grad()
    def rescale(self, ratio: torch.Tensor) -> None:
        """Multiply the values of group i by ratio (q,)."""
        wide = ratio.repeat_interleave(self.shape[1])[:, None, None]  # (q m, 1, 1)
        self.weights[-1].mul_(wide)
        self.biases[-1].mul_(wide)


class SplitCritics(nn.Module):
    """Action-free critics, split by what they explain (`algo.split`): a pair's reward, and what it does to the rest of the session.

    Args:
        spec: Widths F, k and C.
        num_groups: q.
        critics_per_group: m.
        hidden_sizes: Widths of the hidden layers.
        embedding_size: Width of each categorical feature's embedding.
    """

    def __init__(self, spec: Spec, num_groups: int, critics_per_group: int, *, hidden_sizes: Sequence[int], embedding_size: int) -> None:
        super().__init__()
        self.rewards = Critics(  # rho
            spec, num_groups, critics_per_group, hidden_sizes=hidden_sizes, embedding_size=embedding_size, actions=False
        )
        items, request = len(spec.item_inputs), len(spec.request_inputs)
        given = spec.num_features + spec.num_scores + num_products(request)
        self.long_term = LongTerm(items + num_groups, given, request, num_held(items, request), spec.num_scores)  # f

    def fold(self, old: Normaliser, new: Normaliser) -> None:
        """As `Critics.fold`."""
        self.rewards.fold(old, new)

    def rescale(self, ratio: torch.Tensor) -> None:
        """As `Critics.rescale`."""
        self.rewards.rescale(ratio)


class Networks(nn.Module):
    """All that a learner's parameters are: actor, critics, their targets, the frozen anchor, and the scales that they share.

    All networks read the same normalised input: another policy becomes the anchor by folding its normaliser into this one. Critics give
    values in units of `value_scale`, the standard deviation of a list's reward in each group.

    Args:
        spec: Widths and ranges.
        num_groups: q.
        critics_per_group: m.
        hidden_sizes: Widths of actor and critics.
        embedding_size: Width of a categorical feature's embedding.
        level: What the actor sees.
        split: Critics are `SplitCritics`. They read no targets, so there are none: `target_actor` and `target_critics` are None.
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
            self.critics = SplitCritics(spec, num_groups, critics_per_group, hidden_sizes=hidden_sizes, embedding_size=embedding_size)
        else:
            self.critics = Critics(spec, num_groups, critics_per_group, hidden_sizes=hidden_sizes, embedding_size=embedding_size)
        self.target_actor = None if split else copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = None if split else copy.deepcopy(self.critics).requires_grad_(False)
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

    def item_features(self, numeric: torch.Tensor) -> torch.Tensor:
        """The item's features in normalised input (..., F + k), as they were; a slice, which does not wait for the device."""
        start = len(self.spec.user_features)
        chosen = slice(start, start + len(self.spec.item_features))
        before: torch.Tensor = numeric[..., chosen] * self.std[chosen] + self.mean[chosen]
        return before

    def request_features(self, states: torch.Tensor) -> torch.Tensor:
        """Numeric features of user and context (..., U) of states (..., F or more)."""
        return request_inputs(states, self.spec)

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
            normaliser = normaliser.after(old)
            for network in (self.actor, self.critics, self.target_actor, self.target_critics, self.anchor):
                if network is not None:
                    network.fold(old, normaliser)
            for critics in (self.critics, self.target_critics):
                if critics is not None:
                    critics.rescale(self.value_scale / scale)
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
            if actor is not None:
                actor.load_state_dict(self.anchor.state_dict())

    @torch.no_grad()
    def set_static_anchor(self, action: Floats) -> None:
        """Make one action (A,) for all pairs the anchor."""
        self.anchor.make_constant(torch.as_tensor(action))
