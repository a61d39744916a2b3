"""Samples per insert: how much may be sampled for what came in. It bounds sampling and never insertion."""

from __future__ import annotations

from collections.abc import Mapping

from esrl_ray.errors import ConfigError


class Limiter:
    """Grants a budget of `samples_per_insert` sampled transitions for each new step.

    Refills and amendments grant nothing. At most a full buffer's budget is kept, so that a learner that was away does not
    then train without end on what is long gone.

    Args:
        samples_per_insert: Ratio.
        min_size: Samplable steps before sampling starts.
        capacity: Of the buffer.
        batch: Transitions of one call.

    Raises:
        ConfigError: sampling could never start: one call needs more than the budget can ever hold, or `min_size` more than the buffer.
    """

    def __init__(self, *, samples_per_insert: float, min_size: int, capacity: int, batch: int) -> None:
        self._ratio, self._min_size, self._most = samples_per_insert, min_size, samples_per_insert * capacity
        if batch > self._most:
            raise ConfigError(
                f"one call draws {batch} transitions, but samples_per_insert {samples_per_insert} x capacity {capacity} = {self._most:.0f}"
                " is all that may ever wait: it would never start",
                "replay.samples_per_insert",
                "raise it, or lower learner.batch_size x learner.updates_per_call",
            )
        if min_size > capacity:
            raise ConfigError(f"min_size {min_size} exceeds capacity {capacity}: sampling would never start", "replay.min_size", "lower it")
        self._budget = 0.0
        self.num_inserted = self.num_sampled = 0

    @property
    def budget(self) -> float:
        """Transitions that may be sampled now."""
        return self._budget

    def insert(self, steps: int) -> None:
        """Count new steps and grant their budget."""
        self.refill(steps)
        self._budget = min(self._budget + self._ratio * steps, self._most)

    def refill(self, steps: int) -> None:
        """Count steps that were there before a restart."""
        self.num_inserted += steps

    def take(self, samples: int, *, samplable: int) -> bool:
        """Spend the budget of a draw; False means wait."""
        if samplable < self._min_size or self._budget < samples:
            return False
        self._budget -= samples
        self.num_sampled += samples
        return True

    def state(self) -> dict[str, float]:
        """Totals of the whole log, and what is left of the budget, for a checkpoint."""
        return {"inserted": self.num_inserted, "sampled": self.num_sampled, "budget": self._budget}

    def restore(self, totals: Mapping[str, float]) -> None:
        """Go on with what `state` said; steps that came since then have their budget."""
        missed = max(0, self.num_inserted - int(totals["inserted"]))
        self.num_inserted, self.num_sampled = int(totals["inserted"]) + missed, int(totals["sampled"])
        self._budget = min(totals["budget"] + self._ratio * missed, self._most)
