"""A replay shard as an actor: a `ReplayBuffer` that hands out RLlib batches and tells how far it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.rllib.policy.sample_batch import MultiAgentBatch

from esrl_ray.config import Config
from esrl_ray.learning.feed import to_multi_agent_batch
from esrl_ray.replay.buffer import ReadLog, ReplayBuffer
from esrl_ray.telemetry import log_change
from esrl_ray.vocabulary import Lineage, TransitionBatch, cut_lineage

MAX_COMMITS = 10_000
"""Commits whose times `status` still tells."""

_logger = logging.getLogger(__name__)


class ReplayShard:
    """A view of the step logs, as far as they are of this shard's partitions.

    It is refilled from the log when it starts, so that it may be killed at any time. Delivery: (worker, commit) is applied once and in
    order; a repeated one is ignored, a gap is read from the log.

    Args:
        config: Deployment.
        seed: Of sampling.
        read_log: Commits of a worker after a given one, with the rows of this shard.
        clock_ms: Epoch milliseconds.
        workers: Names of the ingest workers that have a log.
    """

    def __init__(
        self, config: Config, seed: int, read_log: ReadLog, clock_ms: Callable[[], int], workers: Callable[[], Sequence[str]] = list
    ) -> None:
        self._new_buffer = partial(ReplayBuffer, config, seed=seed, read_log=read_log)
        self._clock_ms, self._made_for = clock_ms, (config.reward.digest, config.replay.num_shards)
        self._committed_ms: dict[tuple[str, int], int] = {}
        self._workers = workers
        self.refill()

    def refill(self) -> int:
        """Begin anew with what the logs hold now, as after a restart; the number of steps. A user erased from the log is gone then."""
        self._buffer = self._new_buffer()
        self._began_ms, self._restored = self._clock_ms(), False
        self._buffer.refill(self._workers(), inserted_ms=self._began_ms)
        log_change(_logger, "replay shard ready", {"size": self._buffer.size, "lineage": cut_lineage(self._buffer.lineage)})
        return self._buffer.size

    def apply(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        """Take the rows of one commit.

        Args:
            worker: Whose step log.
            commit: Its number.
            rows: As `streaming.steplog.step_schema`.
            committed_ms: Clock when the log had it.
        """
        self._committed_ms[worker, commit] = committed_ms
        while len(self._committed_ms) > MAX_COMMITS:
            del self._committed_ms[next(iter(self._committed_ms))]
        self._buffer.apply(worker, commit, rows, inserted_ms=self._clock_ms())

    def draw(self, num_rows: int) -> tuple[Lineage | None, MultiAgentBatch | None]:
        """Sample transitions for one learner call; call it with `num_returns=2`, so that the batch need not pass through the caller.

        Returns:
            The lineage that sampling could draw from and `num_rows` transitions, or twice None when the limiter says wait.
        """
        batch = self.sample_batch(num_rows)
        return (None, None) if batch is None else (dict(self._buffer.lineage), batch)

    def sample_batch(self, num_rows: int) -> MultiAgentBatch | None:
        """`num_rows` transitions as RLlib takes them; columns are named as in `TransitionBatch`."""
        sampled = self._buffer.sample(num_rows)
        return None if sampled is None else to_multi_agent_batch(sampled)

    def recent_lists(self, num_steps: int) -> TransitionBatch | None:
        """The newest steps, without the limiter: for the normaliser and the gate's probes."""
        return self._buffer.recent_lists(num_steps)

    def catch_up(self) -> int:
        """Read what the logs hold beyond what arrived, e.g. at the end of a run; the number of steps inserted so far."""
        self._buffer.catch_up(self._workers(), inserted_ms=self._clock_ms())
        return self._buffer.num_inserted

    def restore_limiter(self, totals: Mapping[str, float], began_ms: int | None = None) -> dict[str, float] | None:
        """Go on with totals that the training loop kept.

        Args:
            totals: As in `stats`.
            began_ms: The start that lost them: what was drawn since then comes on top, and it is done once for a start, however often it is
                asked, because an answer may be lost. None: the learner begins anew with these, whatever was drawn.

        Returns:
            What they are now; None when this shard has begun anew meanwhile.
        """
        if began_ms not in (None, self._began_ms):
            return None
        if began_ms is None or not self._restored:
            drawn = 0.0 if began_ms is None else self._buffer.limiter_state()["sampled"]
            self._buffer.restore_limiter({**totals, "sampled": totals["sampled"] + drawn, "budget": totals["budget"] - drawn})
        self._restored = True
        return self._buffer.limiter_state()

    def made_for(self) -> tuple[str, int]:
        """Digest of the reward section, and number of shards."""
        return self._made_for

    def stats(self) -> dict[str, Any]:
        """Lineage, sizes, counts, the limiter's totals, and when this shard began."""
        buffer = self._buffer
        return {
            "lineage": dict(buffer.lineage),
            "size": buffer.size,
            "num_inserted": buffer.num_inserted,
            "num_samplable": buffer.num_samplable,
            "num_sampled": buffer.num_sampled,
            "limiter": buffer.limiter_state(),
            "began_ms": self._began_ms,
        }

    def status(self) -> dict[str, Any]:
        """`stats`, and as `inserted_ms` the newest (worker, commit, committed_ms, inserted_ms).

        A commit that was read from the log has its insertion as both times: at the latest then it was committed.
        """
        newest = list(self._buffer.inserted_ms.items())[-MAX_COMMITS:]
        times = [(worker, commit, self._committed_ms.get((worker, commit), at), at) for (worker, commit), at in newest]
        return {**self.stats(), "inserted_ms": times, "pid": os.getpid()}
