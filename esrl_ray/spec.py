"""What a deployment's states, scores and actions are: names, widths, ranges. Everything that is logged carries its digest."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

import msgspec

Side = Literal["user", "item", "context"]


class CategoricalFeature(msgspec.Struct, frozen=True):
    """One categorical feature: integer codes 0..cardinality-1, embedded by the networks."""

    name: str
    cardinality: int
    side: Side


class Spec(msgspec.Struct, frozen=True, dict=True):
    """Names and widths of the enhanced state, the upstream scores and the fusion formula's ranges.

    The numeric state of a pair is the concatenation user | item | context, F wide; categorical codes keep the order of
    `categorical_features`, C wide; scores are k wide. An action has A = 2k dimensions in [-1, 1]: k powers, then k biases;
    `power_i = power_base[i] + power_span * a_i`, `bias_i = bias_base + bias_span * a_{k+i}`, so a = 0 is the control policy.
    """

    user_features: tuple[str, ...]
    item_features: tuple[str, ...]
    context_features: tuple[str, ...]
    categorical_features: tuple[CategoricalFeature, ...]
    scores: tuple[str, ...]
    power_base: tuple[float, ...]
    power_span: float
    bias_base: float
    bias_span: float

    @cached_property
    def num_features(self) -> int:
        """F, the width of the numeric state."""
        return len(self.user_features) + len(self.item_features) + len(self.context_features)

    @cached_property
    def num_categorical(self) -> int:
        """C, the number of categorical features."""
        return len(self.categorical_features)

    @cached_property
    def num_scores(self) -> int:
        """k, the number of upstream scores."""
        return len(self.scores)

    @cached_property
    def num_actions(self) -> int:
        """A = 2k: powers, then biases."""
        return 2 * len(self.scores)

    @property
    def request_inputs(self) -> tuple[int, ...]:
        """Columns of the F + k numeric inputs that all pairs of a request share: those of user and context."""
        return tuple(i for i in range(self.num_features) if i not in self.item_inputs)

    @property
    def item_inputs(self) -> tuple[int, ...]:
        """Columns of the F + k numeric inputs that are the item's features."""
        return tuple(range(len(self.user_features), len(self.user_features) + len(self.item_features)))

    @property
    def request_codes(self) -> tuple[int, ...]:
        """Columns of the C categorical codes that all pairs of a request share."""
        return tuple(i for i, f in enumerate(self.categorical_features) if f.side != "item")

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON of this spec."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]
