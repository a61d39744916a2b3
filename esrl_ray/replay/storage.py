"""The replay's columns: a preallocated ring of steps, padded to G pairs, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Bools

Slots = npt.NDArray[np.int64]


def widths(spec: Spec, num_groups: int) -> dict[str, tuple[int, type[np.float32] | type[np.int32]]]:
    """{column: (values per pair, type)} of the padded columns."""
    return {
        "states": (spec.num_features, np.float32),
        "categorical": (spec.num_categorical, np.int32),
        "scores": (spec.num_scores, np.float32),
        "actions": (spec.num_actions, np.float32),
        "anchor_actions": (spec.num_actions, np.float32),
        "rewards": (num_groups, np.float32),
        "shown": (1, np.float32),
    }


class Storage:
    """Columns of `capacity` steps. Padding pairs hold 0, their scores 1, their `valid` 0.

    Args:
        spec: Widths.
        num_groups: q.
        capacity: Steps.
        max_pairs: G; a step with more keeps its shown pairs first.
    """

    def __init__(self, spec: Spec, *, num_groups: int, capacity: int, max_pairs: int) -> None:
        self._widths, self._max_pairs = widths(spec, num_groups), max_pairs
        self.columns = {name: np.zeros((capacity, max_pairs, width), kind) for name, (width, kind) in self._widths.items()}
        self.columns["shown"] = self.columns["shown"][..., 0]
        self.columns["valid"] = np.zeros((capacity, max_pairs), np.float32)
        self.num_pairs = np.zeros(capacity, np.int64)  # pairs of the step as logged, also those cut off
        self.kept = np.zeros((capacity, max_pairs), np.int16)  # which logged pair stands in each place
        self.num_cut_pairs = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns."""
        return sum(c.nbytes for c in self.columns.values()) + self.num_pairs.nbytes + self.kept.nbytes

    def write(self, slots: Slots, rows: pa.Table) -> None:
        """Write whole steps.

        Args:
            slots: (n,) where to.
            rows: n rows of the step log with their bulky columns.
        """
        pairs = pc.list_value_length(rows["shown"]).to_numpy().astype(np.int64)
        shown = _flat(rows, "shown").astype(bool)
        step, order = self._places(pairs, shown)
        self.num_cut_pairs += int(np.maximum(pairs - self._max_pairs, 0).sum())
        taken = order < self._max_pairs
        target = (slots[step[taken]], order[taken])
        self.num_pairs[slots] = pairs
        within = np.arange(len(step)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        self.kept[target] = within[taken]
        for name, column in self.columns.items():
            column[slots] = 1 if name == "scores" else 0
            if name == "valid":
                column[target] = 1
            elif name == "shown":
                column[target] = shown[taken]
            else:
                column[target] = _flat(rows, name).reshape(len(step), -1)[taken]

    def amend(self, slots: Slots, rows: pa.Table) -> None:
        """Set the absolute rewards and shown masks of later revisions; `slots` (n,) are different steps."""
        pairs = self.num_pairs[slots]
        starts = np.cumsum(pairs) - pairs
        valid = self.columns["valid"][slots] > 0
        source = np.where(valid, starts[:, None] + self.kept[slots], 0)
        rewards = _flat(rows, "rewards").reshape(int(pairs.sum()), -1)[source]
        self.columns["rewards"][slots] = np.where(valid[..., None], rewards, 0)
        self.columns["shown"][slots] = np.where(valid, _flat(rows, "shown").astype(np.float32)[source], 0)

    def _places(self, pairs: Slots, shown: Bools) -> tuple[Slots, Slots]:
        """For each logged pair its step, and its place: as logged, but shown pairs first where the step is too long."""
        step = np.repeat(np.arange(len(pairs)), pairs)
        place = np.arange(len(step)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        for long in np.flatnonzero(pairs > self._max_pairs):
            mine = step == long
            place[mine] = np.argsort(np.argsort(~shown[mine], kind="stable"), kind="stable")
        return step, place

    def take(self, slots: Slots, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Columns of the steps in `slots` (n,): {name: (n, G, ...)}, all of them by default."""
        return {name: self.columns[name][slots] for name in names or self.columns}


def _flat(rows: pa.Table, name: str) -> npt.NDArray[np.generic]:
    """All values of a list column, one after the other."""
    values: npt.NDArray[np.generic] = pc.list_flatten(rows[name]).to_numpy()
    return values
