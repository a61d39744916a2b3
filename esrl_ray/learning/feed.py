"""Draws batches from the replay shards ahead of the learners, by reference: the driver sees only a draw's lineage."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from esrl_ray.vocabulary import Lineage, TransitionBatch

PREFETCH = 2
"""Calls for which batches are drawn ahead: hides the shard's answer time."""

WAIT_S = 0.05
"""Pause after a shard's limiter said wait."""

_logger = logging.getLogger(__name__)


def shard_to_ask(number: int, num_shards: int, num_learners: int) -> int:
    """The shard of an ask: all in turn, and a learner's is another one at each call, or it would see the sessions of one shard only."""
    call, learner = divmod(number, num_learners)
    return (call + learner) % num_shards


class BatchFeed:
    """Batches for learner calls, one reference per learner, from all shards in turn.

    Args:
        shards: Actors of `ReplayShard`.
        num_rows: Transitions a learner takes per call.
        num_learners: References per call, at least 1.
    """

    def __init__(self, shards: Sequence[ActorHandle], num_rows: int, num_learners: int) -> None:
        self._shards, self._num_rows, self._num_learners = list(shards), num_rows, num_learners
        self._num_asked = 0
        self._away = False  # a shard did not answer: logged once
        self._asked: deque[tuple[ray.ObjectRef, ray.ObjectRef]] = deque()  # (lineage or None, batch or None)
        self._ready: list[tuple[Lineage, ray.ObjectRef]] = []

    def next(self, wait_s: float) -> tuple[dict[str, int], list[ray.ObjectRef]] | None:
        """References to one batch per learner; none before every learner's is there.

        Args:
            wait_s: Give up after this long; what was drawn so far is kept.

        Returns:
            The lineage of the drawn data and `num_learners` references to MultiAgentBatches, or None.
        """
        deadline = time.monotonic() + wait_s
        while len(self._ready) < self._num_learners:
            while len(self._asked) < PREFETCH * self._num_learners:
                self._ask()
            head = self._asked[0][0]
            done, _ = ray.wait([head], timeout=max(0.0, deadline - time.monotonic()), fetch_local=True)
            if not done:
                return None
            _, batch = self._asked.popleft()
            if (lineage := self._result(head)) is not None:
                self._ready.append((lineage, batch))
                continue
            if time.monotonic() + WAIT_S >= deadline:
                return None
            time.sleep(WAIT_S)
        taken, self._ready = self._ready[: self._num_learners], self._ready[self._num_learners :]
        lineages = [lineage for lineage, _ in taken]
        newest = {w: max(lineage.get(w, -1) for lineage in lineages) for w in dict.fromkeys(w for lineage in lineages for w in lineage)}
        return newest, [batch for _, batch in taken]

    def _ask(self) -> None:
        shard = self._shards[shard_to_ask(self._num_asked, len(self._shards), self._num_learners)]
        self._num_asked += 1
        lineage, batch = shard.draw.options(num_returns=2).remote(self._num_rows)
        self._asked.append((lineage, batch))

    def _result(self, ref: ray.ObjectRef) -> Lineage | None:
        try:
            lineage: Lineage | None = ray.get(ref)
        except RayError as error:  # the shard is being restarted: it refills itself from the step log
            if not self._away:
                _logger.warning("a replay shard does not answer: %s", str(error).splitlines()[0])
            self._away = True
            return None
        if self._away and lineage is not None:
            _logger.info("replay shards answer again")
            self._away = False
        return lineage


def to_multi_agent_batch(batch: TransitionBatch) -> MultiAgentBatch:
    """Columns as an RLlib batch; nothing is copied."""
    columns = cast(dict[str, Any], dict(batch))
    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(columns)}, env_steps=len(columns["has_next"]))
