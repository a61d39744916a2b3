"""The traffic of a demo in its actor: a real HTTP client and a real Kafka producer around simulated or replayed users."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config
from esrl_ray.simulation.traffic import SimulatedTraffic
from serve.client import FuseClient
from serve.schemas import FuseReply
from streaming.producer import EventProducer
from streaming.wire import SCHEMA_VERSION, Feedback

FLUSH_S = 30.0


class TrafficPart:
    """Plays the users. An async actor: `run` is one long call, the others come in between.

    Args:
        config: Deployment.
        data: Folder of a real log, or None for simulated users.
    """

    def __init__(self, config: Config, data: Path | None) -> None:
        logging.getLogger("kafka").propagate = False
        self._producer = EventProducer(config.kafka, client_id="traffic", spool=None)
        self._token = config.serve.bearer_token
        self._client: FuseClient | None = None
        if data is None:
            self._traffic: Any = SimulatedTraffic(config, fuse=self._fuse, send=self._send, clock_ms=clock_ms)
        else:
            from esrl_ray.simulation.kuairand import KuaiRandTraffic

            self._traffic = KuaiRandTraffic(config, data, fuse=self._fuse, send=self._send, clock_ms=clock_ms)

    def _send(self, **feedback: Any) -> None:
        self._producer.send(Feedback(schema_version=SCHEMA_VERSION, **feedback))

    async def _fuse(self, body: bytes) -> tuple[FuseReply, Mapping[str, str]]:
        assert self._client is not None
        return await self._client.fuse(body)

    async def run(self, url: str) -> None:
        """Play against an endpoint until `stop` or the end of the input; what Kafka did not acknowledge is counted in `events_failed`."""
        token = None if self._token is None else self._token.get_secret_value()
        async with FuseClient(url, token=token) as self._client:
            await self._traffic.run()
        await asyncio.to_thread(self._producer.close, timeout_s=FLUSH_S)

    async def stop(self) -> None:
        """Ask `run` to end."""
        await self._traffic.stop()

    async def first_decision_ms(self) -> int:
        """When the first decision came back, epoch milliseconds; 0 before."""
        moment: int = self._traffic.counts.first_decision_ms
        return moment

    async def status(self, whole: bool = False) -> dict[str, Any]:
        """Numbers so far; `whole` adds every latency."""
        producer = {"acked": dict(self._producer.acked), "events_failed": self._producer.failed}
        return {**self._traffic.status(whole=whole), **producer, "pid": os.getpid()}
