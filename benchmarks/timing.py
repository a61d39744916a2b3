"""What the speed benchmarks share: calls timed in turns, and tables with their targets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WARM_UP = 2
"""Rounds that do not count."""


class Timing(NamedTuple):
    """Median time of a call [s]."""

    cpu: float  # of this process: what else runs on the machine counts only as far as it takes caches away
    wall: float


def in_turns(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
    """Every call once per round, one after the other, so that they share what the machine does meanwhile."""
    times: dict[str, list[Timing]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            timing = Timing(time.process_time() - cpu, time.perf_counter() - wall)
            if number >= WARM_UP:
                times[name].append(timing)
    return {name: Timing(*(statistics.median(of) for of in zip(*each, strict=True))) for name, each in times.items()}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a heading; `notes` stand behind it."""

    title: str
    target: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        head = [f"## {self.title}", f"Target: {self.target}.", ""]
        return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), *(f"\n{note}" for note in self.notes)])
