"""The replay shard's actor, in a module of its own: an actor imports only the module of its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esrl_ray.cli.chaos.processes import contents_of
from esrl_ray.learning.replay_shard import ReplayShard


class ChaosReplayShard(ReplayShard):
    """A replay shard that tells what it holds."""

    def contents(self, step_ids: Sequence[str]) -> dict[str, Any]:
        """See `contents_of`, after reading what the logs hold beyond what arrived."""
        self.catch_up()
        return contents_of(self._buffer, step_ids)
