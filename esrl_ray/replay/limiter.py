"""Samples per insert: how much may be sampled for what came in. It bounds sampling and never insertion."""

from __future__ import annotations

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
        ConfigError: one call needs more than the budget can ever hold.
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
        self._budget = 0.0

    def insert(self, steps: int) -> None:
        """Count new steps."""
        self._budget = min(self._budget + self._ratio * steps, self._most)

    def take(self, samples: int, *, samplable: int) -> bool:
        """Spend the budget of a draw; False means wait."""
        if samplable < self._min_size or self._budget < samples:
            return False
        self._budget -= samples
        return True

    def state(self) -> float:
        """What is left, for a checkpoint."""
        return self._budget

    def restore(self, budget: float) -> None:
        """Go on with what was left."""
        self._budget = min(budget, self._most)
