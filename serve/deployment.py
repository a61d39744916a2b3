"""The replica inside Ray Serve: here clocks, ids and actors are taken, nowhere below."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import cast

import ray
import torch
from ray import serve as ray_serve
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.config import Config
from esrl_ray.policy.store import PolicySnapshot
from esrl_ray.policy.store_actor import PolicyStoreActor, wall_clock_ms
from esrl_ray.telemetry import Telemetry
from serve.api import Application, application
from serve.replica import Replica
from streaming.producer import EventProducer

_logger = logging.getLogger(__name__)


def policy_store(config: Config) -> ActorHandle:
    """The detached policy store, made by whoever comes first."""
    address = ray.get_runtime_context().gcs_address
    folder = config.run.path / "policies"
    return actors.spawn(actors.POLICY_STORE, PolicyStoreActor, folder, config, wall_clock_ms, address, detached=True, max_concurrency=1000)


class RemoteStore:
    """The policy store in its actor; looked up (or made) again after every failed call."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._handle: ActorHandle | None = None

    async def snapshot(self) -> PolicySnapshot:
        """See `PolicyStoreActor.snapshot`."""
        return cast(PolicySnapshot, await self._call("snapshot"))

    async def wait_newer(self, have: int, timeout_s: float) -> PolicySnapshot | None:
        """See `PolicyStoreActor.wait_newer`."""
        return cast(PolicySnapshot | None, await self._call("wait_newer", have, timeout_s))

    async def _call(self, method: str, *args: float) -> object:
        if self._handle is None:
            self._handle = await asyncio.to_thread(policy_store, self._config)
        handle, self._handle = self._handle, None
        result: object = await getattr(handle, method).remote(*args)
        self._handle = handle
        return result


@ray_serve.ingress()
class FuseReplica:
    """One Serve replica. Configuration comes as an argument, so that every replica of a deployment has the same."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(1)
        name = ray_serve.get_replica_context().replica_id.unique_id
        self._telemetry = Telemetry()
        self._replica = Replica(
            config,
            name,
            store=RemoteStore(config),
            producer=EventProducer(config.kafka, client_id=f"serve-{name}", spool=config.run.path / "spool"),
            clock_ms=wall_clock_ms,
            new_id=lambda: uuid.uuid4().hex,
            telemetry=self._telemetry,
        )

    async def __serve_build_asgi_app__(self) -> Application:
        """Serve calls this once before the replica takes requests."""
        await self._replica.start()
        return application(self._replica, self._telemetry)

    async def check_health(self) -> None:
        """Serve asks every `health_check_period_s`."""
        self._replica.check()

    async def status(self) -> dict[str, object]:
        """What this replica has done, by handle."""
        return dict(vars(self._replica.status()))
