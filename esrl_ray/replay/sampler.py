"""Uniform sampling from a changing set, O(1) per change and per draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Sampler:
    """A set of slots with uniform sampling: members stand without gaps in an array, removal swaps in the last one.

    Args:
        capacity: Slots are 0..capacity-1.
        seed: Of the draws.
    """

    def __init__(self, capacity: int, *, seed: int) -> None:
        self._members = np.zeros(capacity, np.int64)
        self._place = np.full(capacity, -1, np.int64)
        self._size = 0
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, slot: int) -> bool:
        return bool(self._place[slot] >= 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return self._members.nbytes + self._place.nbytes

    def members(self) -> npt.NDArray[np.int64]:
        """All members, in no particular order."""
        return self._members[: self._size].copy()

    def add(self, slot: int) -> None:
        """Add a slot; one that is there stays."""
        if self._place[slot] < 0:
            self._members[self._size] = slot
            self._place[slot] = self._size
            self._size += 1

    def remove(self, slot: int) -> None:
        """Remove a slot; one that is not there is left alone."""
        place = self._place[slot]
        if place >= 0:
            self._size -= 1
            last = self._members[self._size]
            self._members[place], self._place[last] = last, place
            self._place[slot] = -1

    def draw(self, count: int) -> npt.NDArray[np.int64]:
        """`count` members, uniform, with replacement."""
        return self._members[self._rng.integers(0, self._size, count)]
