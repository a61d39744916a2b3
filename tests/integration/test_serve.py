"""The endpoint on real Ray Serve behind HAProxy, over real HTTP, with a real broker: swaps, kills, outages."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.actor import ActorHandle

from esrl_ray.actors import NAMESPACE
from esrl_ray.algo.actor import Actor, ActorShape, PairNetwork, make_actor
from esrl_ray.cli import watchdog
from esrl_ray.config import Config, load_config
from esrl_ray.errors import RequestError
from esrl_ray.exploration import arm_of
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.vocabulary import Arm
from serve.app import deploy_local, serve_environment, stop_local
from serve.client import FuseClient
from serve.replica import ReplicaStatus, read_statuses
from serve.schemas import parse
from streaming.broker import EmbeddedBroker, end_offsets, ensure_topics
from streaming.source import Source
from streaming.wire import decode_decision

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning:ray", "ignore::DeprecationWarning:ray")


def tell(text: str) -> None:
    """Measurements for people who run with -s."""
    sys.stdout.write(text + "\n")


@dataclass
class Endpoint:
    """What is running."""

    config: Config
    url: str
    store: ActorHandle
    broker: EmbeddedBroker

    def statuses(self) -> list[ReplicaStatus]:
        """Of the replicas that live."""
        return [s for s in read_statuses(self.config.run.path) if not s.closed and time.time() * 1e3 - s.updated_ms < 3_000]

    def publish(self, seed: int) -> int:
        return int(ray.get(self.store.publish.remote(learnt(self.config, seed), None), timeout=30))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """A Ray of its own with two replicas. Whatever happens, everything that it started is ended by its mark."""
    before, mark, folder = dict(os.environ), uuid.uuid4().hex[:8], Path(tempfile.mkdtemp(prefix="esrl-t", dir="/tmp"))
    os.environ.update({**serve_environment(folder / "h"), watchdog.MARK: mark, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    ending = watchdog.start(mark, [folder])
    try:
        with EmbeddedBroker.start(folder / "broker") as broker:
            values = [f"run.dir={folder}/run", f"kafka.bootstrap_servers={broker.bootstrap_servers}", "kafka.num_partitions=2"]
            config = load_config(ROOT / "configs/demo.yaml", values)
            ensure_topics(config.kafka)
            ray.init(
                address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20,
                _temp_dir=str(folder / "ray"), log_to_driver=False,
            )  # fmt: skip
            url = deploy_local(config)
            yield Endpoint(config, url, ray.get_actor("policy_store", namespace=NAMESPACE), broker)
            ray.shutdown()
    finally:
        watchdog.stop(ending)
        os.environ.clear()
        os.environ.update(before)


def learnt(config: Config, seed: int) -> bytes:
    spec = config.spec.build()
    torch.manual_seed(seed)
    actor = Actor(spec, (64, 64), 8)
    manifest = Manifest(version=0, digest="", kind=PolicyKind.PAIR, spec=spec, hidden_sizes=(64, 64), embedding_size=8, gradient_steps=seed)
    parameters = {name: value.detach().numpy() for name, value in actor.state_dict().items()}
    return Policy.of(manifest, parameters, Normaliser.identity(spec)).to_bytes()


def of_kind(kind: PolicyKind, config: Config, shape: ActorShape = "mlp") -> Policy:
    """A policy of a kind and shape of actor, with parameters drawn at random."""
    spec = config.spec.build()
    if kind is PolicyKind.STATIC:
        return Policy.static(spec, np.linspace(-0.5, 0.5, spec.num_actions, dtype=np.float32), note="static")
    torch.manual_seed(3)
    network = (
        PairNetwork(spec, (16,), 8, num_outputs=1)
        if kind is PolicyKind.SCORE
        else make_actor(spec, (16,), 8, level="request" if kind is PolicyKind.REQUEST else "pair", shape=shape)
    )
    manifest = Manifest(version=0, digest="", kind=kind, spec=spec, hidden_sizes=(16,), embedding_size=8, actor=shape)
    parameters = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    return Policy.of(manifest, parameters, Normaliser.identity(spec))


def request(config: Config, n: int, num_candidates: int = 50) -> dict[str, Any]:
    spec, rng = config.spec, np.random.default_rng(n)
    candidates = [
        {
            "item_id": f"i{c}",
            "features": rng.normal(size=len(spec.item_features)).tolist(),
            "scores": rng.uniform(size=len(spec.scores)).tolist(),
        }
        for c in range(num_candidates)
    ]
    user, context = rng.normal(size=len(spec.user_features)).tolist(), dict.fromkeys(spec.context_features, 0.5)
    names = {"request_id": f"r{n}", "session_id": f"s{n % 50}", "user_id": f"u{n % 50}"}
    return {**names, "user_features": user, "context_features": context, "candidates": candidates}


@dataclass
class Load:
    """What concurrent clients saw."""

    replies: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    newest: dict[str, int] = field(default_factory=dict)  # replica -> newest version in a reply
    versions: set[int] = field(default_factory=set)
    went_down: list[str] = field(default_factory=list)
    client: FuseClient | None = None

    def quantiles(self) -> str:
        p50, p99 = np.quantile(self.latencies_ms, [0.5, 0.99])
        return f"{self.replies} replies, p50 {p50:.1f} ms, p99 {p99:.1f} ms"


@asynccontextmanager
async def load(endpoint: Endpoint, *, clients: int = 4) -> AsyncIterator[Load]:
    """Keep requests coming while the block runs; any that fails fails the block.

    A version went down at a replica if a request that started after the reply with a higher one got a lower one: replies may overtake.
    """
    seen, numbers, running = Load(), itertools.count(), True
    async with FuseClient(endpoint.url) as client:
        seen.client = client

        async def visit() -> None:
            while running:
                floor, start = dict(seen.newest), time.perf_counter()
                reply, headers = await client.fuse(request(endpoint.config, next(numbers)))
                seen.latencies_ms.append((time.perf_counter() - start) * 1e3)
                replica, version = headers["x-replica"], int(headers["x-policy-version"])
                assert version == reply.policy_version
                if version < floor.get(replica, 0):
                    seen.went_down.append(f"{replica}: {version} after {floor[replica]}")
                seen.newest[replica] = max(version, seen.newest.get(replica, 0))
                seen.versions.add(version)
                seen.replies += 1
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(visit()) for _ in range(clients)]
        yield seen
        running = False
        await asyncio.gather(*tasks)


async def until(condition: Callable[[], object], *, timeout_s: float = 60.0, what: str = "") -> float:
    """Seconds until a condition holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"it did not happen within {timeout_s} s: {what}"
        await asyncio.sleep(0.05)
    return time.monotonic() - start


async def all_serve(seen: Load, version: int, *, timeout_s: float = 10.0) -> None:
    await until(lambda: set(seen.newest.values()) == {version}, timeout_s=timeout_s, what=f"{seen.newest} become {version}")


def num_decisions(endpoint: Endpoint) -> int:
    topic = endpoint.config.kafka.decisions_topic
    return sum(offset for (name, _), offset in end_offsets(endpoint.config.kafka).items() if name == topic)


def test_decisions_reach_kafka_whole_and_refused_requests_do_not(endpoint: Endpoint) -> None:
    config, spec = endpoint.config, endpoint.config.spec.build()
    before = num_decisions(endpoint)

    async def scenario() -> dict[str, list[str]]:
        shown = {}
        async with FuseClient(endpoint.url) as client:
            for n in range(20):
                reply, _ = await client.fuse(request(config, n))
                shown[reply.decision_id] = reply.item_ids[: reply.list_size]
            bad = request(config, 1)
            bad["candidates"][3]["scores"][0] = float("nan")
            with pytest.raises(RequestError) as caught:
                await client.fuse(json.dumps(bad).encode())
            assert caught.value.where == "candidates[3].scores.click"
            with pytest.raises(RequestError) as caught:
                await client.fuse(request(config, 1, config.serve.max_candidates + 1))
            assert caught.value.where == "candidates"
            assert client.attempts == 22 and client.failed == 0
        return shown

    shown = asyncio.run(scenario())
    asyncio.run(until(lambda: num_decisions(endpoint) >= before + 20, timeout_s=10))
    time.sleep(1.0)
    assert num_decisions(endpoint) == before + 20
    source = Source(config.kafka, range(config.kafka.num_partitions), {}, max_poll_records=1000)
    records = [record for _ in range(20) for record in source.poll(200) if record.topic == config.kafka.decisions_topic]
    source.close()
    found = {}
    for record in records:
        decision = decode_decision(record.value, spec, record.content_type)
        assert record.key == decision.event.session_id.encode()
        assert decision.event.positions == [*range(5), *[-1] * 10] and decision.event.num_candidates == 50
        found[decision.event.decision_id] = decision.event.item_ids[:5]
    assert shown.items() <= found.items()


def test_20_swaps_under_load_fail_no_request_and_versions_only_go_up(endpoint: Endpoint) -> None:
    async def scenario() -> Load:
        async with load(endpoint) as seen:
            await until(lambda: len(seen.newest) == 2)
            for seed in range(20):
                version = await asyncio.to_thread(endpoint.publish, seed)
                await all_serve(seen, version)
                await asyncio.sleep(0.1)
        return seen

    seen = asyncio.run(scenario())
    assert seen.client is not None and seen.client.failed == 0 and seen.client.attempts == seen.replies
    assert not seen.went_down and len(seen.versions) >= 20
    time.sleep(1.5)
    swaps = [swap for status in endpoint.statuses() for swap in status.swaps if swap.version > 1]
    delays = np.array([swap.swapped_ms - swap.published_ms for swap in swaps])
    tell(f"\nswaps: {len(swaps)}, published to served p50 {np.median(delays):.0f} ms, max {delays.max()} ms; {seen.quantiles()}")
    assert len(swaps) >= 40 and delays.max() < 2_000


def test_a_round_and_a_pin_by_command_reach_every_replica(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with load(endpoint, clients=2) as seen:
            await until(lambda: len(seen.newest) == 2)
            before = max(seen.newest.values())
            command = [
                str(Path(sys.executable).parent / "esrl"), "policy", "pin", "static", "--config", "configs/demo.yaml",
                "--set", f"run.dir={endpoint.config.run.path}",
            ]  # fmt: skip
            done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0 and f"version {before + 1} is pinned" in done.stdout, done.stdout + done.stderr
            await all_serve(seen, before + 1)
            assert seen.client is not None and (await seen.client.policy()).pinned
            await asyncio.to_thread(ray.get, endpoint.store.unpin.remote())
            version = await asyncio.to_thread(endpoint.publish, 99)
            await all_serve(seen, version)
        assert not seen.went_down

    asyncio.run(scenario())


SHAPES: list[tuple[PolicyKind, ActorShape]] = [*((kind, "mlp") for kind in PolicyKind), (PolicyKind.PAIR, "ple")]


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_a_policy_of_each_kind_serves_its_own_ranking(endpoint: Endpoint, kind: PolicyKind, shape: ActorShape) -> None:
    config, policy = endpoint.config, of_kind(kind, endpoint.config, shape)
    body = request(config, 7) | {"user_id": next(f"u{n}" for n in range(1000) if arm_of(f"u{n}", config.exploration) is Arm.EXPLOIT)}
    parsed = parse(json.dumps(body).encode(), config.spec.build(), config)
    _, fused = policy.fuse(parsed.states, parsed.categorical, parsed.scores)

    async def scenario() -> None:
        async with load(endpoint, clients=2) as seen:
            version = await asyncio.to_thread(ray.get, endpoint.store.publish.remote(policy.to_bytes(), None))
            await all_serve(seen, version)
            assert seen.client is not None
            reply, _ = await seen.client.fuse(body)
            assert reply.policy_version == version and reply.arm == Arm.EXPLOIT
            assert reply.item_ids == [f"i{c}" for c in np.argsort(-fused, kind="stable")]
            np.testing.assert_allclose(reply.fused_scores, np.sort(fused)[::-1], rtol=1e-4, atol=1e-6)
        assert seen.client.failed == 0

    asyncio.run(scenario())


def test_a_killed_store_comes_back_from_its_files_while_replicas_serve(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with load(endpoint, clients=2) as seen:
            await until(lambda: len(seen.newest) == 2)
            before = max(seen.newest.values())
            manifests = len(ray.get(endpoint.store.manifests.remote()))
            (pid,) = [p.pid for p in watchdog.carriers(os.environ[watchdog.MARK]) if "PolicyStoreActor" in " ".join(p.cmdline())]
            os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            while True:
                try:
                    version = await asyncio.to_thread(endpoint.publish, 123)
                    break
                except ray.exceptions.RayActorError:
                    assert time.monotonic() - start < 60
                    await asyncio.sleep(0.2)
            assert version == before + 1 and len(ray.get(endpoint.store.manifests.remote())) == manifests + 1
            await all_serve(seen, version)
            tell(f"\nstore killed: next version served after {time.monotonic() - start:.1f} s; {seen.quantiles()}")
        assert not seen.went_down and seen.client is not None and seen.client.failed == 0

    asyncio.run(scenario())


def test_while_kafka_is_down_replicas_serve_and_spool(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with load(endpoint, clients=2) as seen:
            await until(lambda: seen.replies > 20)
            os.kill(endpoint.broker.pid, signal.SIGKILL)
            endpoint.broker.wait_dead(10.0)
            down = seen.replies
            await until(lambda: seen.replies > down + 100)
            await until(lambda: sum(status.spooled for status in endpoint.statuses()) > 0, timeout_s=30)
            await asyncio.to_thread(endpoint.broker.restart)
            tell(f"\nKafka down: {seen.replies - down} replies meanwhile; {seen.quantiles()}")
        assert seen.client is not None and seen.client.failed == 0

    asyncio.run(scenario())

    def nothing_waits() -> bool:
        statuses = endpoint.statuses()
        return len(statuses) == 2 and all(status.acked.get("decisions", 0) >= status.decisions for status in statuses)

    tell(f"all decisions acknowledged {asyncio.run(until(nothing_waits, timeout_s=60)):.1f} s after the load ended")
    assert sum(status.failed for status in endpoint.statuses()) == 0


def test_a_killed_replica_fails_no_request_and_comes_back(endpoint: Endpoint) -> None:
    async def scenario() -> None:
        async with load(endpoint) as seen:
            await until(lambda: len(seen.newest) == 2)
            victim = endpoint.statuses()[0]
            os.kill(victim.pid, signal.SIGKILL)
            start = time.monotonic()
            await until(lambda: len(seen.newest) == 3, what="a third replica answers")
            tell(f"\nreplica killed: a new one answers after {time.monotonic() - start:.1f} s; {seen.quantiles()}")
            version = await asyncio.to_thread(endpoint.publish, 77)
            await until(lambda: sum(v == version for v in seen.newest.values()) == 2, timeout_s=10)
        assert seen.client is not None
        tell(f"{seen.client.attempts - seen.client.requests} retries, worst {max(seen.latencies_ms):.0f} ms")
        assert seen.client.failed == 0 and not seen.went_down

    asyncio.run(scenario())


def test_closing_flushes_every_decision(endpoint: Endpoint) -> None:
    """Runs last: it takes the endpoint down."""

    async def scenario() -> None:
        async with load(endpoint) as seen:
            await until(lambda: seen.replies > 200)

    asyncio.run(scenario())
    statuses = stop_local(endpoint.config)
    assert sum(status["closed"] for status in statuses) == 2 and len(statuses) == 3
    for status in statuses:
        if status["closed"]:
            assert status["acked"]["decisions"] >= status["decisions"] > 0 and status["failed"] == 0
    assert num_decisions(endpoint) >= sum(status["decisions"] for status in statuses if status["closed"])
