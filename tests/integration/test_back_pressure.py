"""A replay shard and a learner that stand still, beside a worker that commits on: real processes, stopped by SIGSTOP."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from benchmarks.backpressure import StallingIngestPart, produce
from esrl_ray import actors
from esrl_ray.cli.chaos.compare import ids_of, shard_differences
from esrl_ray.cli.chaos.shard_part import ChaosReplayShard
from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.learning import LearnerPart
from esrl_ray.cli.parts import Publisher
from esrl_ray.config import Config, KafkaConfig, load_config
from esrl_ray.policy.store_actor import PolicyStoreActor
from streaming.broker import end_offsets
from streaming.steplog import read_commits, read_steps
from tests.integration.test_training_loop import SET

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # Ray's own
]

WAIT_S, DECISIONS_PER_S, WORKER = 120.0, 40.0, "ingest-0"
QUICK = ["join.label_age_s=1", "join.lateness_s=0.5", "ingest.commit_interval_s=0.2", "learner.device=cpu"]


class Parts:
    """Worker, shard and learner in actors of their own, and events that come all the time; what was stopped goes on at the end."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.root = config, config.log_root
        self.store = actors.spawn("store", PolicyStoreActor, folder / "policies", config, max_concurrency=100)
        read_log = functools.partial(read_commits, self.root)
        self.shard = actors.spawn("shard", ChaosReplayShard, config, 0, read_log, clock_ms, lambda: [WORKER])
        self.worker = actors.spawn("worker", StallingIngestPart, config, WORKER, [self.shard], max_concurrency=4)
        self.learner = actors.spawn("learner", LearnerPart, config, self.store, [self.shard], max_concurrency=4)
        self.pids = {part: int(self.status(part)["pid"]) for part in (self.shard, self.learner)}
        self.stop_events = threading.Event()
        self.producing = threading.Thread(target=produce, args=(config, DECISIONS_PER_S, self.stop_events))
        self.producing.start()

    def status(self, part: ActorHandle) -> dict[str, Any]:
        status: dict[str, Any] = actors.insist(part.status.remote, timeout_s=WAIT_S)
        assert not status.get("error"), status
        return status

    def commit(self) -> int:
        return int(self.status(self.worker)["commit"])

    def seen(self) -> int:
        """Newest commit that the shard has."""
        return int(self.status(self.shard)["lineage"].get(WORKER, -1))

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not true():
            assert time.monotonic() < deadline, self.status(self.worker)
            time.sleep(0.1)

    def until_read(self) -> dict[str, int]:
        """Wait until the worker's status has passed what the topics hold now."""
        ends = {f"{topic}/{p}": end for (topic, p), end in end_offsets(self.config.kafka).items()}
        self.until(lambda: all(self.status(self.worker)["positions"].get(where, 0) >= end for where, end in ends.items()))
        return ends

    def end(self) -> None:
        self.stop_events.set()
        self.producing.join(WAIT_S)
        for pid in self.pids.values():
            os.kill(pid, signal.SIGCONT)
        actors.end({"learner": self.learner, "worker": self.worker, "shard": self.shard, "store": self.store})


@pytest.fixture
def running(tmp_path: Path, kafka_config: KafkaConfig) -> Iterator[Parts]:
    config = load_config("configs/demo.yaml", [*SET, *QUICK, f"run.dir={tmp_path}"]).model_copy(update={"kafka": kafka_config})
    made = Parts(config, tmp_path)
    yield made
    made.end()


def test_a_shard_and_a_learner_that_stand_still_hold_nothing_up_and_the_shard_catches_up_from_the_log(running: Parts) -> None:
    running.until(lambda: running.status(running.learner)["gradient_steps"] > 0)
    os.kill(running.pids[running.learner], signal.SIGSTOP)
    alone = running.seen()
    running.until(lambda: running.seen() > alone + 2)  # the shard takes commits without its learner

    os.kill(running.pids[running.shard], signal.SIGSTOP)
    stalled = running.commit()
    running.until(lambda: running.commit() > stalled + 3 * Publisher.MAX_WAITING)
    running.until_read()  # and no event waits in the topics for either of them
    assert ray.get(running.worker.num_waiting.remote()) == Publisher.MAX_WAITING

    os.kill(running.pids[running.shard], signal.SIGCONT)
    again = running.commit()
    running.until(lambda: running.seen() > again)  # calls go through, the gap before them is closed
    running.stop_events.set()
    running.producing.join(WAIT_S)
    ray.get(running.worker.drain.remote(running.until_read(), WAIT_S))
    last = running.commit()
    running.until(lambda: running.seen() == last)
    commits = [rows for _, rows in read_commits(running.root, WORKER)]
    ids, capacity = ids_of(commits), running.config.replay.capacity
    contents = ray.get(running.shard.contents.remote(ids))
    lineage = {WORKER: len(commits) - 1}
    assert ids and shard_differences(contents, {WORKER: ids}, read_steps(running.root), lineage, capacity=capacity) == []

    steps = ray.get(running.shard.stats.remote())["num_sampled"]
    os.kill(running.pids[running.learner], signal.SIGCONT)
    running.until(lambda: ray.get(running.shard.stats.remote())["num_sampled"] > steps)
