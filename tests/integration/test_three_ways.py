"""The three ways in, against one Ray cluster that this test starts as an operator would."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from esrl_ray.cli import watchdog
from esrl_ray.config import Config, load_config
from esrl_ray.ports import free_ports
from serve.app import serve_environment
from serve.client import FuseClient
from streaming.producer import EventProducer
from streaming.wire import SCHEMA_VERSION, Feedback

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """Addresses and environment of a running cluster."""

    gcs: str
    dashboard: str
    environment: dict[str, str]

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen([BIN / command[0], *command[1:]], cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    mark = uuid.uuid4().hex[:8]
    temporary = watchdog.temporary_folder(mark)
    gcs, dashboard, client, agent, metrics, agent_grpc = free_ports(6)
    environment = {
        **os.environ,
        **serve_environment(temporary / "ha"),
        watchdog.MARK: mark,
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    log = tmp_path_factory.mktemp("cluster") / "ray.log"
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        "--num-cpus=4",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--temp-dir={temporary}",
        f"--object-store-memory={200 * 2**20}",
        "--disable-usage-stats",
    ]
    guard = watchdog.start(mark, [temporary])
    found = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
    head = found.start(*command, log=log)
    deadline = time.monotonic() + 90
    while (job := found.run("ray", "job", "submit", "--address", found.dashboard, "--", "true")).returncode:
        assert head.poll() is None and time.monotonic() < deadline, f"no job gets in:\n{job.stderr[-1000:]}\n{log.read_text()[-3000:]}"
        time.sleep(1)
    yield found
    watchdog.stop(guard)
    head.wait(30)


def overrides(bootstrap: str, run_dir: Path, topics: str) -> list[str]:
    """The operator's own values: everything else is configs/online.yaml, with times that suit a test."""
    return [
        f"run.dir={run_dir}",
        f"kafka.bootstrap_servers={bootstrap}",
        f"kafka.decisions_topic=decisions-{topics}",
        f"kafka.feedback_topic=feedback-{topics}",
        "kafka.num_partitions=2",
        "ingest.num_workers=1",
        "ingest.commit_interval_s=0.5",
        "join.label_age_s=0.2",
        "join.lateness_s=0.2",
        "join.gap_s=2.0",
        "replay.min_size=40",
        "replay.capacity=2000",
        "replay.samples_per_insert=200",
        "learner.batch_size=16",
        "learner.updates_per_call=4",
        "exploration.warmup_steps=40",
        "exploration.round_steps=100",
        "policy.publish_interval_s=1.0",
        "serve.list_size=3",
        "serve.num_unshown=4",
    ]


def sets(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def request_of(config: Config, session: str, user: str, rng: random.Random) -> dict[str, Any]:
    spec = config.spec
    return {
        "request_id": uuid.uuid4().hex,
        "session_id": session,
        "user_id": user,
        "user_features": [rng.gauss(0, 1) for _ in spec.user_features],
        "context_features": [rng.gauss(0, 1) for _ in spec.context_features],
        "context_categorical": {"tab": rng.randrange(16)},
        "candidates": [
            {"item_id": f"i{n}", "features": [rng.gauss(0, 1) for _ in spec.item_features], "scores": [rng.random() for _ in spec.scores]}
            for n in range(12)
        ],
    }


async def visits(url: str, config: Config, producer: EventProducer, *, seconds: float, rng: random.Random) -> set[int]:
    """Sessions of three pages each, one after the other, until the time is over; returns the policy versions that decided."""
    versions: set[int] = set()
    end = time.monotonic() + seconds
    async with FuseClient(url) as client:
        while time.monotonic() < end:
            session, user = uuid.uuid4().hex, f"u{rng.randrange(50)}"
            for page in range(3):
                reply, headers = await client.fuse(request_of(config, session, user, rng))
                versions.add(int(headers["x-policy-version"]))
                for behaviour, item in [("shown", None), ("click", reply.item_ids[0]), *([("leave", None)] if page == 2 else [])]:
                    producer.send(
                        Feedback(
                            schema_version=SCHEMA_VERSION,
                            event_id=uuid.uuid4().hex,
                            decision_id=reply.decision_id,
                            session_id=session,
                            behaviour=behaviour,
                            event_time_ms=time.time_ns() // 1_000_000,
                            item_id=item,
                        )
                    )
                await asyncio.sleep(0.02)
    return versions


def test_serve_deploy_ingest_and_job_submit_make_one_loop(cluster: Cluster, broker: str, tmp_path: Path) -> None:
    values = overrides(broker, tmp_path / "run", uuid.uuid4().hex[:6])
    config = load_config(ROOT / "configs/online.yaml", values)
    (port,) = free_ports(1)

    deployed: dict[str, Any] = yaml.safe_load((ROOT / "configs/serve.yaml").read_text())
    deployed["http_options"]["port"] = port
    deployed["applications"][0]["args"] = {"config": str(ROOT / "configs/online.yaml"), "set": values}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(deployed))
    done = cluster.run("serve", "deploy", "--address", cluster.dashboard, str(tmp_path / "serve.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr

    ingest_log, url = tmp_path / "ingest.log", f"http://127.0.0.1:{port}"
    ingest = cluster.start("esrl", "ingest", "--config", "configs/online.yaml", *sets(values), log=ingest_log)
    submitted = cluster.run(
        "ray",
        "job",
        "submit",
        "--address",
        cluster.dashboard,
        "--no-wait",
        "--submission-id",
        "learn",
        "--working-dir",
        ".",
        "--",
        "esrl",
        "train",
        "--config",
        "configs/online.yaml",
        *sets(values),
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    producer = EventProducer(config.kafka, client_id="test", spool=None)
    versions: set[int] = set()
    deadline = time.monotonic() + 180
    while len(versions) < 3 and time.monotonic() < deadline:
        assert ingest.poll() is None, ingest_log.read_text()[-3000:]
        try:
            versions |= asyncio.run(visits(url, config, producer, seconds=10.0, rng=random.Random(len(versions))))
        except aiohttp.ClientError:
            time.sleep(1)  # the endpoint is not up yet
    producer.close()
    job_log = cluster.run("ray", "job", "logs", "--address", cluster.dashboard, "learn")
    assert len(versions) >= 3, f"only versions {versions} served\ningest: {ingest_log.read_text()[-2000:]}\njob: {job_log.stdout[-3000:]}"

    asked = cluster.run("esrl", "status", "--config", "configs/online.yaml", *sets(values), "--json")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    status = json.loads(asked.stdout)
    assert status["workers"]["ingest-0"]["source"] == "live" and set(status["workers"]["ingest-0"]["lag"]) == {
        f"{topic}/{p}" for topic in (config.kafka.decisions_topic, config.kafka.feedback_topic) for p in range(2)
    }
    assert sum(status["join"]["label_delay_s"].values()) > 40 and status["shards"]["replay-0"]["size"] > 40
    forgotten = cluster.run("esrl", "log", "forget", "--user-id", "u1", "--config", "configs/online.yaml", *sets(values))
    assert "steps" in forgotten.stdout and "replay-0: refilled from the log" in forgotten.stdout, forgotten.stdout + forgotten.stderr

    stopped = cluster.run("ray", "job", "stop", "--address", cluster.dashboard, "learn")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    drained = cluster.run("esrl", "ingest", "--drain", "ingest-0", "--config", "configs/online.yaml", *sets(values))
    assert "ingest-0 is drained at commit" in drained.stdout, drained.stdout + drained.stderr
    assert ingest.wait(90) == 0 and "all workers are drained" in ingest_log.read_text(), ingest_log.read_text()[-3000:]
    more_log = tmp_path / "more.log"
    more = cluster.start("esrl", "ingest", "--config", "configs/online.yaml", *sets([*values, "ingest.num_workers=2"]), log=more_log)
    deadline = time.monotonic() + 90
    while "ingest-1 " not in more_log.read_text():
        assert more.poll() is None and time.monotonic() < deadline, more_log.read_text()[-3000:]
        time.sleep(0.5)
    more.terminate()
    assert more.wait(90) == 0 and "stopped after the last commit" in more_log.read_text(), more_log.read_text()[-3000:]
    left = json.loads(cluster.run("esrl", "status", "--config", "configs/online.yaml", *sets(values), "--json").stdout)
    assert left["workers"]["ingest-0"]["source"] == "from the log" and left["workers"]["ingest-0"]["commit"] > 0
    shown = cluster.run("esrl", "log", "show", "--config", "configs/online.yaml", *sets(values))
    assert shown.returncode == 0 and "ingest-0" in shown.stdout, shown.stdout + shown.stderr
