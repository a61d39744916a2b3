"""One replica without Ray Serve: following the store, refusing what is worse, the HTTP surface."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import SecretStr

from esrl_ray.config import Config, RunConfig, ServeConfig
from esrl_ray.errors import LoopError, PolicyRejected
from esrl_ray.policy.policy import Policy
from esrl_ray.policy.store import PolicySnapshot
from esrl_ray.policy.store_actor import PolicyStoreActor
from esrl_ray.vocabulary import Round
from serve.api import application
from serve.replica import Replica, read_statuses
from serve.schemas import MAX_BODY_BYTES, FuseReply, PolicyReply
from streaming.wire import Decision
from tests.unit.test_schemas import CONFIG as DEPLOYMENT
from tests.unit.test_schemas import request
from tests.unit.test_store import learnt as store_learnt


class RecordingProducer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Decision] = []
        self.acked: Counter[str] = Counter()
        self.spooled = self.failed = 0
        self.closed = False

    def send(self, event: Decision) -> None:
        self.sent.append(event)
        self.acked["decisions"] += 1

    def close(self, *, timeout_s: float) -> None:
        self.closed = True


class AwayStore:
    """A store that does not answer until `back` is set."""

    def __init__(self, actor: PolicyStoreActor | None = None) -> None:
        self.back = actor
        self.calls = 0

    async def snapshot(self) -> PolicySnapshot:
        return await self._store().snapshot()

    async def wait_newer(self, have: int, timeout_s: float) -> PolicySnapshot | None:
        return await self._store().wait_newer(have, timeout_s)

    def _store(self) -> PolicyStoreActor:
        self.calls += 1
        if self.back is None:
            raise TimeoutError("nobody there")
        return self.back


def deployment(folder: Path, *, token: str | None = None) -> Config:
    serve = ServeConfig(bearer_token=SecretStr(token) if token else None)
    return DEPLOYMENT.model_copy(update={"run": RunConfig(dir=str(folder)), "serve": serve})


def store_of(config: Config) -> PolicyStoreActor:
    times = iter(range(1_000, 10_000))
    return PolicyStoreActor(config.run.path / "policies", config, lambda: next(times))


def replica_of(config: Config, store: Any) -> tuple[Replica, RecordingProducer]:
    producer, times, ids = RecordingProducer(), iter(range(20_000, 90_000)), iter(range(100_000))
    made = Replica(
        config, "replica-a", store=store, producer=producer, clock_ms=lambda: next(times), new_id=lambda: f"d{next(ids)}", telemetry=None
    )  # fmt: skip
    return made, producer


async def until(condition: Any) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 4 s")


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def static(config: Config, action: float) -> bytes:
    import numpy as np

    spec = config.spec.build()
    return Policy.static(spec, np.full(spec.num_actions, action, np.float32), note="vector").to_bytes()


BODY = json.dumps(request()).encode()


def test_a_replica_swaps_within_its_long_poll_and_remembers_when(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path)
        store = store_of(config)
        replica, producer = replica_of(config, store)
        await replica.start()
        assert replica.fuse(BODY).policy_version == 1
        for version in (2, 3):
            assert await store.publish(static(config, 0.1 * version), None) == version
            await until(lambda version=version: replica.version == version)
        assert replica.fuse(BODY).policy_version == 3
        assert [d.policy_version for d in producer.sent] == [1, 3]
        policy = replica.policy()
        assert [swap.version for swap in policy.swaps] == [2, 3], "the first policy is no swap"
        assert policy.swapped_ms == policy.swaps[-1].swapped_ms >= 20_000
        assert policy.published_ms == policy.swaps[-1].published_ms < 10_000 and policy.digest == replica.served.current.manifest.digest
        await replica.stop()
        (status,) = read_statuses(tmp_path)
        assert producer.closed and status.closed and (status.decisions, status.acked, status.version) == (2, {"decisions": 2}, 3)

    go(scenario())


def test_a_new_round_and_a_pin_arrive_without_a_new_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path)
        store = store_of(config)
        replica, _ = replica_of(config, store)
        await replica.start()
        await store.start_round(Round(1, 1, 5, -0.15, 0.15, 9))
        await until(lambda: replica.served.round.number == 1)
        await store.pin("static")
        await until(lambda: replica.served.pinned)
        await store.unpin()
        await until(lambda: not replica.served.pinned)
        assert [swap.version for swap in replica.policy().swaps] == [2]
        await replica.stop()

    go(scenario())


def test_without_a_store_a_replica_starts_from_its_files_and_joins_it_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path)
        store = store_of(config)
        await store.publish(static(config, 0.1), None)
        away = AwayStore()
        replica, _ = replica_of(config, away)
        await replica.start()
        assert replica.version == 2
        await until(lambda: away.calls > 2)
        assert replica.fuse(BODY).policy_version == 2
        away.back = store
        await store.publish(static(config, 0.2), None)
        await until(lambda: replica.version == 3)
        await replica.stop()

    go(scenario())


def test_without_store_and_files_a_replica_does_not_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        replica, _ = replica_of(deployment(tmp_path), AwayStore())
        with pytest.raises(PolicyRejected, match="no policy has been published"):
            await replica.start()

    go(scenario())


def test_an_older_a_damaged_or_a_foreign_snapshot_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path)
        store = store_of(config)
        await store.publish(static(config, 0.1), None)
        old = await store.snapshot()
        await store.publish(static(config, 0.2), None)
        new = await store.snapshot()
        news: asyncio.Queue[PolicySnapshot] = asyncio.Queue()

        class Scripted:
            async def snapshot(self) -> PolicySnapshot:
                return new

            async def wait_newer(self, have: int, timeout_s: float) -> PolicySnapshot | None:
                return await news.get()

        replica, _ = replica_of(config, Scripted())
        await replica.start()
        digest = replica.policy().digest
        later = new.sequence + 10
        for bad in (
            msgspec.structs.replace(old, sequence=later),
            msgspec.structs.replace(new, sequence=later, current=new.current[:-1]),
            msgspec.structs.replace(new, sequence=later, current=store_learnt()),
            old,
        ):
            news.put_nowait(bad)
        await until(news.empty)
        await asyncio.sleep(0.1)
        assert replica.version == 3 and replica.policy().digest == digest and not replica.policy().swaps
        await store.publish(static(config, 0.3), None)
        news.put_nowait(msgspec.structs.replace(await store.snapshot(), sequence=later + 1))
        await until(lambda: replica.version == 4)
        await replica.stop()

    go(scenario())


def test_a_replica_that_cannot_follow_any_more_is_unhealthy(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path)
        store = store_of(config)

        class Broken:
            async def snapshot(self) -> PolicySnapshot:
                return await store.snapshot()

            async def wait_newer(self, have: int, timeout_s: float) -> PolicySnapshot | None:
                raise ZeroDivisionError("a bug")

        replica, producer = replica_of(config, Broken())
        await replica.start()
        replica.check()
        await asyncio.sleep(0.05)
        with pytest.raises(LoopError, match="following the policy store ended"):
            replica.check()
        assert replica.fuse(BODY).policy_version == 1
        await replica.stop()
        assert producer.closed

    go(scenario())


async def http(
    app: Any, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request, straight into the ASGI application."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("localhost", 80),
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, content


def test_the_http_surface(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path)
        replica, producer = replica_of(config, store_of(config))
        await replica.start()
        app = application(replica, None)
        status, headers, content = await http(app, "POST", "/v1/fuse", BODY)
        reply = msgspec.json.decode(content, type=FuseReply)
        assert status == 200 and headers["x-policy-version"] == "1" and headers["x-replica"] == "replica-a"
        assert sorted(reply.item_ids) == [f"i{n}" for n in range(5)] and reply.fused_scores == sorted(reply.fused_scores, reverse=True)
        assert reply.decision_id == producer.sent[0].decision_id == "d0" and reply.request_id == "r" and reply.list_size == 5

        bad = request()
        del bad["candidates"][3]["scores"]["click"]
        status, _, content = await http(app, "POST", "/v1/fuse", json.dumps(bad).encode())
        assert status == 422 and json.loads(content)["field"] == "candidates[3].scores.click"
        status, _, content = await http(app, "POST", "/v1/fuse", b" " * (MAX_BODY_BYTES + 1))
        assert status == 413 and json.loads(content)["field"] == "body"
        assert len(producer.sent) == 1, "nothing that was refused reaches Kafka"
        assert replica.status().refused == 1

        status, _, content = await http(app, "GET", "/v1/policy")
        assert status == 200 and msgspec.json.decode(content, type=PolicyReply).version == 1
        assert (await http(app, "GET", "/healthz"))[0] == 200
        assert (await http(app, "GET", "/docs"))[0] == 200
        status, _, content = await http(app, "GET", "/openapi.json")
        document = json.loads(content)
        operation = document["paths"]["/v1/fuse"]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/FuseRequest"}
        assert set(operation["responses"]) == {"200", "401", "413", "422"}
        text, schemas = json.dumps(document), document["components"]["schemas"]
        for name in ("FuseRequest", "Candidate", "FuseReply", "PolicyReply", "Refusal", "SwapTime"):
            assert name in schemas and f"#/components/schemas/{name}" in text
        assert "candidates[].scores: click, watch" in document["info"]["description"]
        await replica.stop()

    go(scenario())


def test_a_bearer_token_is_needed_for_v1_when_configured(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = deployment(tmp_path, token="s3cret")
        replica, producer = replica_of(config, store_of(config))
        await replica.start()
        app = application(replica, None)
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}, {"authorization": "Bearer s3crét"}):
            for method, path in (("POST", "/v1/fuse"), ("GET", "/v1/policy")):
                status, _, content = await http(app, method, path, BODY, headers)
                assert status == 401 and json.loads(content)["field"] == "authorization" and b"s3cret" not in content
        assert not producer.sent
        assert (await http(app, "POST", "/v1/fuse", BODY, {"authorization": "Bearer s3cret"}))[0] == 200
        assert (await http(app, "GET", "/healthz"))[0] == 200
        await replica.stop()

    go(scenario())
