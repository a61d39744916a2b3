"""What the training loop knows of its replay shards: steps inserted, newest lists, and the limiters' totals, which outlive a shard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.learning.rounds import together
from esrl_ray.telemetry import Telemetry, log_change
from esrl_ray.vocabulary import TransitionBatch

_logger = logging.getLogger(__name__)


class Shards:
    """Replay shards by number.

    A shard that restarts fills itself from the log with an empty limiter. `watch` sees that by its start and gives it the totals that were
    known last, at most one look old: what was drawn since then may be drawn again, and what came since then has its budget.

    Args:
        handles: Actors of `ReplayShard`.

    Attributes:
        handles: The same.
        limiters: Totals of each shard's limiter, for a checkpoint; None = that shard has never answered.
    """

    def __init__(self, handles: Sequence[ActorHandle]) -> None:
        self.handles = list(handles)
        self.limiters: list[Mapping[str, float] | None] = [None] * len(self.handles)
        self._inserted = [0] * len(self.handles)
        self._began_ms: list[int | None] = [None] * len(self.handles)

    @property
    def inserted(self) -> int:
        """Steps of the whole log, also after a shard refilled itself; one that is away keeps its last count."""
        return sum(self._inserted)

    def resume(self, limiters: Sequence[Mapping[str, float] | None]) -> None:
        """Go on with the totals of a checkpoint: the next `watch` gives them to the shards, whose draws since then are lost with it."""
        if limiters and len(limiters) != len(self.handles):
            facts = {"checkpoint": len(limiters), "now": len(self.handles)}
            log_change(_logger, "number of shards changed, their sampling budgets are not restored", facts)
            limiters = []
        self.limiters = list(limiters) or [None] * len(self.handles)
        self._began_ms = [None] * len(self.handles)

    def start_anew(self) -> None:
        """Let all that the shards hold be drawn again, as if it had just come: for a learner that must learn it anew."""
        self.resume([{"inserted": 0, "sampled": 0, "budget": 0.0}] * len(self.handles))

    def watch(self, telemetry: Telemetry) -> None:
        """Look at every shard; one that has begun anew gets its totals back."""
        for i, shard in enumerate(self.handles):
            if (stats := actors.ask(shard.stats.remote)) is None:
                continue
            self._inserted[i] = stats["num_inserted"]
            telemetry.gauge("esrl_replay_size_steps", stats["size"], shard=str(i))
            found, known = stats["limiter"], self.limiters[i]
            if stats["began_ms"] != self._began_ms[i] and known is not None:
                restarted_ms = None if self._began_ms[i] is None else stats["began_ms"]
                if (found := actors.ask(shard.restore_limiter.remote, known, restarted_ms)) is None:
                    continue  # the next look tries again
                facts = {"shard": i, "before": round(known["budget"]), "now": round(found["budget"])}
                log_change(_logger, "sampling budget restored", facts)
            self.limiters[i], self._began_ms[i] = found, stats["began_ms"]

    def at_most(self, inserted: int) -> int:
        """An earlier count of `inserted`, but no more than there are: retention or an erased user may have shortened the log."""
        return inserted if None in self._began_ms else min(inserted, self.inserted)

    def recent(self, num_steps: int) -> TransitionBatch | None:
        """Newest lists of all shards; None when there is none."""
        share = -(-num_steps // len(self.handles))
        found = [lists for shard in self.handles if (lists := actors.ask(shard.recent_lists.remote, share)) is not None]
        return together(found) if found else None
