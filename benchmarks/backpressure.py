"""What a replay shard or a step log that stands still does to memory, lag and commits: `python -m benchmarks.backpressure [--seconds 60]`.

The real parts: embedded broker, Ray actors of one ingest worker and one replay shard, Delta. Events come at a fixed pace all the time.
First the shard's process is stopped (SIGSTOP), then the log's commits are held up; after each, the rest is given the time to drain.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from esrl_ray import actors
from esrl_ray.cli import learning, parts
from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.local import local_run, own_folder, start_ray
from esrl_ray.config import Config, load_config
from serve.app import serve_environment
from streaming.broker import EmbeddedBroker, ensure_topics
from streaming.producer import EventProducer
from streaming.wire import SCHEMA_VERSION, Decision, Feedback

PAIRS, FEEDBACK_PER_DECISION, TICK_S = 15, 8, 0.05


class StallingIngestPart(parts.IngestPart):
    """An ingest worker whose log can be held up, and that tells how many calls a replay shard has not answered."""

    def num_waiting(self) -> int:
        """Of calls to its shard."""
        publisher: Any = self._worker._publish[0]
        return len(publisher._waiting)

    def stall_log(self, seconds: float) -> None:
        """The next commit takes this much longer."""
        log: Any = self._worker._log
        commit = log.commit

        def late(*args: object) -> None:
            log.commit = commit
            time.sleep(seconds)
            commit(*args)

        log.commit = late


def events(config: Config, number: int) -> list[Decision | Feedback]:
    """One decision and its feedback; a session has ten."""
    spec, now_ms, name, session = config.spec.build(), clock_ms(), f"d{number}", f"s{number // 10}"
    decision = Decision(
        schema_version=SCHEMA_VERSION,
        decision_id=name,
        request_id=name,
        session_id=session,
        user_id=session,
        event_time_ms=now_ms,
        policy_version=1,
        round=0,
        arm="control",
        spec_digest=spec.digest,
        num_candidates=PAIRS,
        item_ids=[f"i{i}" for i in range(PAIRS)],
        positions=[*range(5), *[-1] * (PAIRS - 5)],
        states=bytes(4 * PAIRS * spec.num_features),
        categorical=bytes(4 * PAIRS * spec.num_categorical),
        scores=bytes(4 * PAIRS * spec.num_scores),
        actions=bytes(4 * PAIRS * spec.num_actions),
        anchor_actions=bytes(4 * PAIRS * spec.num_actions),
        fused_scores=bytes(4 * PAIRS),
    )
    behaviours = ["shown", *[config.reward.behaviours[0].name] * (FEEDBACK_PER_DECISION - 1)]
    return [decision] + [
        Feedback(
            schema_version=SCHEMA_VERSION,
            event_id=f"{name}-{i}",
            decision_id=name,
            session_id=session,
            behaviour=behaviour,
            event_time_ms=now_ms,
            item_id=None if behaviour == "shown" else f"i{i % 5}",
        )
        for i, behaviour in enumerate(behaviours)
    ]


def produce(config: Config, decisions_per_s: float, stop: threading.Event) -> None:
    """Send at a fixed pace until told to stop."""
    producer, number, start = EventProducer(config.kafka, client_id="load", spool=None), 0, time.monotonic()
    while not stop.wait(TICK_S):
        while number < (time.monotonic() - start) * decisions_per_s:
            for event in events(config, number):
                producer.send(event)
            number += 1
    producer.close()


def row(phase: str, worker: Any, shard: Any, pids: dict[str, int], *, worst_lag: int) -> None:
    """One line of the table."""
    status = actors.ask(worker.status.remote, timeout_s=10.0, otherwise=None)
    lag, commit = (sum(status["lag"].values()), status["commit"]) if status else ("?", "?")
    steps = actors.ask(shard.status.remote, timeout_s=10.0, otherwise={}).get("num_inserted", "?")
    rss = " | ".join(f"{psutil.Process(pid).memory_info().rss / 2**20:.0f}" for pid in pids.values())
    print(f"| {phase} | {rss} | {worst_lag} | {lag} | {commit} | {steps} |", flush=True)


def wait(seconds: float, worker: Any) -> int:
    """Wait and watch the lag; its largest value."""
    worst, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(1.0)
        status = actors.ask(worker.status.remote, timeout_s=1.0, otherwise=None)
        worst = max(worst, sum(status["lag"].values()) if status else 0)
    return worst


def run(config: Config, *, seconds: float, decisions_per_s: float) -> None:
    """All phases, on a Ray that is connected."""
    (shard,) = learning.replay_shards(config)
    (name,) = parts.worker_names(config)
    worker = actors.spawn(name, StallingIngestPart, config, name, [shard], max_concurrency=4)
    pids = {"worker": ray.get(worker.pid.remote()), "shard": ray.get(shard.status.remote())["pid"]}
    pids["raylet"] = next(p.pid for p in psutil.Process().children(recursive=True) if p.name() == "raylet")
    print(f"{decisions_per_s:.0f} decisions/s with {FEEDBACK_PER_DECISION} feedback each; each stall {seconds:.0f} s\n")
    print("| after | worker MB | shard MB | raylet MB | lag, worst | lag, then | commit | steps in the shard |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    stop = threading.Event()
    threading.Thread(target=produce, args=(config, decisions_per_s, stop), daemon=True).start()

    def phase(what: str, length: float, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None) -> None:
        before()
        worst = wait(length, worker)
        after()
        row(what, worker, shard, pids, worst_lag=worst)

    phase("30 s as usual", 30.0)
    stopped = pids["shard"]
    phase("the shard stood still", seconds, lambda: os.kill(stopped, signal.SIGSTOP), lambda: os.kill(stopped, signal.SIGCONT))
    phase("30 s more", 30.0)
    phase("the log stood still", seconds, lambda: ray.get(worker.stall_log.remote(seconds)))
    phase("30 s more", 30.0)
    stop.set()
    actors.end({name: worker, "shard": shard})


def main() -> None:
    """Start everything on this machine, print the table, end everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each stall")
    parser.add_argument("--decisions-per-s", type=float, default=100.0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="esrl-backpressure-"))
    with own_folder(folder) as lock, local_run(folder, lock) as local, EmbeddedBroker.start(folder / "broker") as broker:
        settings = [f"run.dir={folder}", f"kafka.bootstrap_servers={broker.bootstrap_servers}"]
        config = load_config("configs/demo.yaml", settings)
        ensure_topics(config.kafka)
        start_ray(local, serve_environment(local.temporary / "haproxy"))
        run(config, seconds=arguments.seconds, decisions_per_s=arguments.decisions_per_s)


if __name__ == "__main__":
    main()
