"""The ingest worker's actor, in a module of its own: an actor imports only the module of its class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ray.actor import ActorHandle

from esrl_ray.cli import parts
from esrl_ray.cli.chaos import points
from esrl_ray.config import Config


class ChaosIngestPart(parts.IngestPart):
    """An ingest worker that can be told to die at a point."""

    def __init__(self, config: Config, worker: str, shards: Sequence[ActorHandle], folder: Path) -> None:
        points.watch(folder, worker)
        super().__init__(config, worker, shards)
