"""The replay's columns: a preallocated ring of steps, padded to G pairs, in numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.errors import LogError
from esrl_ray.normaliser import mean_input
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
    }


class Storage:
    """Columns of `capacity` steps. Padding pairs hold 0, their scores 1, their `valid` 0.

    Two are of steps, not of pairs: `candidate_means` (capacity, F + k), over all candidates where the log tells (`told` (capacity,) is 1),
    else over the pairs that are kept.

    Args:
        spec: Widths.
        num_groups: q.
        capacity: Steps.
        max_pairs: G; a step with more keeps its shown pairs first.
    """

    def __init__(self, spec: Spec, *, num_groups: int, capacity: int, max_pairs: int) -> None:
        self._max_pairs = max_pairs
        self.columns: dict[str, npt.NDArray[Any]] = {
            name: np.zeros((capacity, max_pairs, width), kind) for name, (width, kind) in widths(spec, num_groups).items()
        }
        self.columns |= {name: np.zeros((capacity, max_pairs), np.float32) for name in ("shown", "valid")}
        self.columns["candidate_means"] = np.zeros((capacity, spec.num_features + spec.num_scores), np.float32)
        self.columns["told"] = np.zeros(capacity, np.float32)
        self.num_pairs = np.zeros(capacity, np.int64)  # pairs of the step as logged, also those cut off
        self.kept = np.zeros((capacity, max_pairs), np.int16)  # which logged pair stands in each place
        self.num_cut_pairs = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns."""
        return sum(c.nbytes for c in self.columns.values()) + self.num_pairs.nbytes + self.kept.nbytes

    def write(self, slots: Slots, rows: pa.Table, chosen: Slots) -> None:
        """Write whole steps.

        Args:
            slots: (n,) where to.
            rows: Of the step log.
            chosen: (n,) which of the rows; they have their bulky columns.
        """
        lengths = _num_pairs(rows)
        pairs = lengths[chosen]
        source = _pairs_of(lengths, chosen)
        bulky = _pairs_of(np.where(rows["states"].is_valid().to_numpy(), lengths, 0), chosen)  # amendments have nothing there
        step, within = np.repeat(np.arange(len(chosen)), pairs), np.arange(len(source)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        shown = _flat(rows, "shown").astype(bool)[source]
        place = self._places(pairs, within, shown)
        taken = place < self._max_pairs
        target = (slots[step[taken]], place[taken])
        self.num_cut_pairs += len(place) - int(taken.sum())
        self.num_pairs[slots] = pairs
        self.kept[target] = within[taken]
        padded = slots[pairs < self._max_pairs]
        for name, column in self.columns.items():
            if name in ("candidate_means", "told"):
                continue
            column[padded] = 1 if name == "scores" else 0
            if name == "valid":
                column[target] = 1
            elif name == "shown":
                column[target] = shown[taken]
            elif width := column.shape[2]:
                column[target] = _chosen(_flat(rows, name).reshape(-1, width), (source if name == "rewards" else bulky)[taken])
        self._write_means(slots, rows, chosen)

    def _write_means(self, slots: Slots, rows: pa.Table, chosen: Slots) -> None:
        """Of the chosen rows, whose pairs are here by now."""
        means, there = self.columns["candidate_means"], rows["candidate_means"].is_valid().to_numpy()
        given = there[chosen]
        self.columns["told"][slots] = given
        means[slots[given]] = _flat(rows, "candidate_means").reshape(-1, means.shape[1])[(np.cumsum(there) - 1)[chosen[given]]]
        if not given.all():
            old = slots[~given]
            means[old] = mean_input(*(self.columns[name][old] for name in ("states", "scores", "valid")))

    def amend(self, slots: Slots, rows: pa.Table, chosen: Slots) -> None:
        """Set the absolute rewards and shown masks of later revisions.

        Args:
            slots: (n,) of different steps.
            rows: Of the step log.
            chosen: (n,) which of the rows.

        Raises:
            LogError: a row has another number of pairs than its step.
        """
        lengths = _num_pairs(rows)
        if (wrong := np.flatnonzero(lengths[chosen] != self.num_pairs[slots])).size:
            row, slot = chosen[wrong[0]], slots[wrong[0]]
            step_id = rows["step_id"][int(row)].as_py()
            raise LogError(f"a later revision of step {step_id} has {lengths[row]} pairs, expected {self.num_pairs[slot]}")
        starts = (np.cumsum(lengths) - lengths)[chosen]
        valid = self.columns["valid"][slots] > 0
        source = np.where(valid, starts[:, None] + self.kept[slots], 0)
        rewards = _flat(rows, "rewards").reshape(-1, self.columns["rewards"].shape[2])[source]
        self.columns["rewards"][slots] = np.where(valid[..., None], rewards, 0)
        self.columns["shown"][slots] = np.where(valid, _flat(rows, "shown").astype(np.float32)[source], 0)

    def _places(self, pairs: Slots, within: Slots, shown: Bools) -> Slots:
        """The place of each logged pair: as logged, but shown pairs first where the step is too long."""
        place = within.copy()
        starts = np.cumsum(pairs) - pairs
        for long in np.flatnonzero(pairs > self._max_pairs):
            mine = slice(starts[long], starts[long] + pairs[long])
            place[mine] = np.argsort(np.argsort(~shown[mine], kind="stable"), kind="stable")
        return place

    def take(self, wanted: Mapping[str, tuple[str, Slots]]) -> dict[str, npt.NDArray[Any]]:
        """Columns of steps.

        All of them stand in one allocation: with one each, a batch of some megabytes gives its pages back to the system every time, and
        taking them again costs two to four times the copy.

        Args:
            wanted: {name in the result: (column, slots (n,) to take)}.

        Returns:
            {name: (n, G, ...)}, each contiguous.
        """
        shapes = {name: (len(slots), *self.columns[column].shape[1:]) for name, (column, slots) in wanted.items()}
        arena, end = np.empty(sum(map(math.prod, shapes.values())), np.float32), 0
        taken: dict[str, npt.NDArray[Any]] = {}
        for name, (column, slots) in wanted.items():
            start, end = end, end + math.prod(shapes[name])
            taken[name] = arena[start:end].view(self.columns[column].dtype).reshape(shapes[name])
            self.columns[column].take(slots, axis=0, out=taken[name], mode="clip")  # with the default mode numpy buffers `out`
        return taken


def _num_pairs(rows: pa.Table) -> Slots:
    lengths: Slots = pc.list_value_length(rows["shown"]).to_numpy().astype(np.int64)
    return lengths


def _pairs_of(lengths: Slots, chosen: Slots) -> Slots:
    """Where the pairs of the chosen rows stand when the pairs of all rows, `lengths` each, stand one after the other."""
    starts, mine = np.cumsum(lengths) - lengths, lengths[chosen]
    ends = np.cumsum(mine)
    return np.repeat(starts[chosen] - (ends - mine), mine) + np.arange(int(mine.sum()))


def _chosen(values: npt.NDArray[np.generic], index: Slots) -> npt.NDArray[np.generic]:
    """Values by number; no copy of them where all are taken in their order, as of a commit without amendments."""
    return values if np.array_equal(index, np.arange(len(values))) else values[index]


def _flat(rows: pa.Table, name: str) -> npt.NDArray[np.generic]:
    """All values of a list column, one after the other; null lists have none."""
    values: npt.NDArray[np.generic] = pc.list_flatten(rows[name]).to_numpy()
    return values
