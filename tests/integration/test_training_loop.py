"""The training loop with a real store, real shards and a real step log: warm-up, publishing, rounds, and the death of each part."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import ray
import torch
from ray.actor import ActorHandle

from esrl_ray import actors
from esrl_ray.algo.actor import make_actor
from esrl_ray.cli import parts
from esrl_ray.config import Config, load_config
from esrl_ray.errors import LoopError
from esrl_ray.learning.checkpoint import PROGRESS_FILE, Progress
from esrl_ray.learning.loop import TrainingLoop
from esrl_ray.learning.replay_shard import ReplayShard
from esrl_ray.learning.rounds import next_round
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.policy.store_actor import PolicyStoreActor
from esrl_ray.vocabulary import Ended, StepRow
from streaming.steplog import StepLog, WorkerState, read_commits, read_newest
from streaming.steptable import rows_to_table
from tests.transitions import make_transitions

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # Ray's own
]

SET = [
    "learner.batch_size=16",
    "learner.updates_per_call=4",
    "learner.hidden_sizes=[16]",
    "learner.checkpoint_interval_s=1",
    "policy.publish_interval_s=0.3",
    "replay.min_size=50",
    "exploration.warmup_steps=150",
    "exploration.round_steps=300",
]
WAIT_S = 120.0


def clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Writer:
    """An ingest worker without a stream: commits made-up steps and hands them to the shard."""

    def __init__(self, config: Config, root: Path) -> None:
        self._config, self._commit = config, -1
        self._log = StepLog(root, "ingest-0", "one", config.spec.build())

    def write(self, shard: ActorHandle, num_steps: int) -> None:
        """One commit of steps that end their sessions."""
        self._commit += 1
        t = make_transitions(self._config, num_steps, seed=self._commit, list_size=5)
        rows = [
            StepRow(
                step_id=f"{self._commit}-{i}",
                revision=0,
                session_id="s",
                user_id="u",
                index=0,
                partition=0,
                offset=0,
                event_time_ms=0,
                closed_ms=clock_ms(),
                arm="explore",
                policy_version=1,
                round=0,
                num_candidates=50,
                shown=t["shown"][i] > 0,
                behaviours=np.zeros((len(t["shown"][i]), len(self._config.reward.behaviours)), np.float32),
                rewards=t["rewards"][i] * t["shown"][i][:, None],
                next_id=None,
                ended=Ended.TERMINATED,
                item_ids=tuple(f"i{j}" for j in range(len(t["shown"][i]))),
                positions=np.where(t["shown"][i] > 0, 0, -1).astype(np.int32),
                states=t["states"][i],
                categorical=t["categorical"][i],
                scores=t["scores"][i],
                actions=t["actions"][i],
                anchor_actions=t["anchor_actions"][i],
                fused_scores=np.zeros(len(t["shown"][i]), np.float32),
            )
            for i in range(num_steps)
        ]
        table = rows_to_table(rows)
        state = WorkerState(commit=self._commit, incarnation="one", positions={}, joiners={}, committed_ms=clock_ms())
        self._log.commit(state, table)
        shard.apply.remote("ingest-0", self._commit, table, clock_ms())


class Running:
    """A training loop in a thread, with a trickle of new steps."""

    def __init__(self, config: Config, folder: Path, name: str) -> None:
        self.config, self.folder = config, folder
        self.store = actors.spawn(f"store-{name}", PolicyStoreActor, folder / "policies", config, max_concurrency=100)
        read_log = functools.partial(read_commits, str(folder / "log"))
        self.shard = actors.spawn(f"replay-{name}", ReplayShard, config, 0, read_log, clock_ms, lambda: ["ingest-0"])
        self.writer = Writer(config, folder / "log")
        self.start()

    def start(self) -> None:
        self.stop_event = threading.Event()
        self.errors: list[BaseException] = []
        self.loop = TrainingLoop(
            self.config,
            store=self.store,
            shards=[self.shard],
            checkpoint_dir=self.folder / "checkpoints",
            clock_ms=clock_ms,
            read_newest=functools.partial(read_newest, str(self.folder / "log")),
        )
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run(self.stop_event)
        except BaseException as error:
            self.errors.append(error)
            raise

    def stop(self) -> None:
        self.stop_event.set()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive() and not self.errors

    def until(self, what: Callable[[], bool], *, num_steps: int = 20) -> None:
        """Write steps until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert not self.errors and time.monotonic() < deadline, (self.loop.status(), self.errors)
            if num_steps:
                self.writer.write(self.shard, num_steps)
            time.sleep(0.2)

    def status(self, name: str) -> int:
        return int(self.loop.status()[name])

    def progress(self) -> tuple[int, int]:
        return self.status("gradient_steps"), self.status("published")


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    config = load_config("configs/demo.yaml", [*SET, f"learner.num_learners={getattr(request, 'param', 0)}"])
    made = Running(config, tmp_path, tmp_path.name)
    yield made
    made.stop_event.set()
    made.thread.join(WAIT_S)
    actors.end({"store": made.store, "shard": made.shard})


def learns_on(running: Running) -> None:
    """More gradient steps and another published policy."""
    steps, published = running.progress()
    running.until(lambda: running.status("gradient_steps") > steps and running.status("published") > published)


def test_the_loop_warms_up_publishes_ends_rounds_and_resumes(running: Running) -> None:
    running.until(lambda: running.loop.status()["state"] == "warming up", num_steps=0)
    assert running.status("gradient_steps") == 0
    running.until(lambda: running.status("round") >= 2)
    learns_on(running)
    snapshot = ray.get(running.store.snapshot.remote())
    assert snapshot.round.number >= 2
    anchor, current = Policy.from_bytes(snapshot.anchor), Policy.from_bytes(snapshot.current)
    assert anchor.manifest.kind is PolicyKind.PAIR and anchor.version <= current.version
    manifest = current.manifest
    assert manifest.lineage["ingest-0"] > 0 and 0 < manifest.learnt_ms <= manifest.created_ms
    assert manifest.gradient_steps > 0 and manifest.parent > 0 and manifest.config_digest
    stats = ray.get(running.shard.stats.remote())
    ratio = running.config.replay.samples_per_insert
    assert running.status("samples") <= stats["num_sampled"] <= ratio * stats["num_inserted"]
    running.stop()
    before = running.loop.status()
    assert before["rejected"] == 0 and before["state"] == "stopped"
    progress = max((running.folder / "checkpoints").glob("0*")) / PROGRESS_FILE
    (totals,) = msgspec.json.decode(progress.read_bytes(), type=Progress).limiters
    assert totals is not None and totals["sampled"] >= before["samples"]

    running.start()  # a new process would do the same
    running.until(lambda: running.loop.status()["state"] == "learning", num_steps=0)
    assert running.status("gradient_steps") == before["gradient_steps"]
    assert running.status("round") == before["round"]
    assert running.loop.status()["lineage"] == before["lineage"]
    learns_on(running)
    manifests = ray.get(running.store.manifests.remote())
    assert [m.version for m in manifests] == sorted(m.version for m in manifests)
    running.stop()


def test_a_loop_with_another_reward_begins_anew_from_what_is_logged_and_keeps_the_old_checkpoints(running: Running) -> None:
    running.until(lambda: running.status("published") >= 1)
    running.stop()
    before, old = running.loop.status(), running.config
    running.config = load_config("configs/demo.yaml", [*SET, "reward.scale=3.0"])
    ray.get(running.shard.refill.remote())  # as new shards do
    running.start()
    running.until(lambda: running.loop.status()["state"] == "learning" and running.status("gradient_steps") > 0, num_steps=0)
    running.until(lambda: running.status("published") >= 1, num_steps=0)  # on no more than the steps that were there
    assert running.status("version") > before["version"]
    assert running.status("round") >= before["round"]  # what is logged may end a round at once
    assert list((running.folder / f"checkpoints-reward-{old.reward.digest}").glob("0*"))
    running.stop()
    anew = msgspec.json.decode((max((running.folder / "checkpoints").glob("0*")) / PROGRESS_FILE).read_bytes(), type=Progress)
    assert anew.reward_digest == running.config.reward.digest != old.reward.digest


def test_the_loop_goes_on_after_kill_9_of_the_shard_and_of_the_store(running: Running) -> None:
    running.until(lambda: running.status("published") >= 2)
    pid = ray.get(running.shard.status.remote())["pid"]
    before = ray.get(running.shard.stats.remote())
    os.kill(pid, signal.SIGKILL)

    def refilled() -> bool:
        """And the limiter has its totals again: more was drawn than since the restart."""
        status = actors.ask(running.shard.status.remote)
        if status is None or status["pid"] == pid:
            return False
        return bool(status["num_inserted"] > before["num_inserted"] and status["limiter"]["sampled"] > status["num_sampled"])

    running.until(refilled)
    learns_on(running)
    ray.kill(running.store, no_restart=False)
    learns_on(running)
    running.stop()


@pytest.mark.parametrize("running", [1], indirect=True)
def test_the_loop_rebuilds_a_remote_learner_after_kill_9(running: Running) -> None:
    running.until(lambda: running.status("published") >= 1)
    (pid,) = running.loop.status()["learner_pids"]
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    running.until(lambda: running.loop.status()["learner_pids"] not in ([], [pid]))
    learns_on(running)
    running.stop()


def test_a_pinned_store_keeps_the_round_and_unpinning_lets_it_end(running: Running) -> None:
    running.until(lambda: running.status("published") >= 1)
    ray.get(running.store.pin.remote("static"))
    number = ray.get(running.store.snapshot.remote()).round.number
    running.until(lambda: running.status("round") == number)  # the pin may come while a new round is being entered
    inserted = ray.get(running.shard.stats.remote())["num_inserted"]
    running.until(lambda: ray.get(running.shard.stats.remote())["num_inserted"] > inserted + 700, num_steps=50)
    time.sleep(1.5)
    assert running.status("round") == number == ray.get(running.store.snapshot.remote()).round.number
    ray.get(running.store.unpin.remote())
    running.until(lambda: running.status("round") > number)
    running.stop()


def test_a_round_that_someone_else_started_is_taken_over(running: Running) -> None:
    running.until(lambda: running.status("published") >= 1)
    snapshot = ray.get(running.store.snapshot.remote())
    version = Policy.from_bytes(snapshot.current).version
    turn = msgspec.structs.replace(snapshot.round, number=snapshot.round.number + 5, anchor_version=version, salt=7)
    ray.get(running.store.start_round.remote(turn))
    running.until(lambda: running.status("round") == turn.number)
    learns_on(running)
    running.stop()


def test_a_policy_brought_from_elsewhere_is_explored_around_and_learnt_on_from_at_once(running: Running) -> None:
    running.until(lambda: running.status("published") >= 1)
    learner, spec = running.config.learner, running.config.spec.build()
    actor = make_actor(spec, learner.hidden_sizes, learner.embedding_size)
    actor.make_constant(torch.full((spec.num_actions,), 0.8))
    hidden, width = learner.hidden_sizes, learner.embedding_size
    made = Manifest(version=0, digest="", kind=PolicyKind.PAIR, spec=spec, hidden_sizes=hidden, embedding_size=width, note="from elsewhere")
    brought = Policy.of(made, {name: value.numpy() for name, value in actor.state_dict().items()}, Normaliser.identity(spec))
    version = ray.get(running.store.publish.remote(brought.to_bytes(), None))
    turn = next_round(ray.get(running.store.snapshot.remote()).round.number + 1, version, running.config, started_ms=clock_ms())
    ray.get(running.store.start_round.remote(turn))
    running.until(lambda: running.status("round") == turn.number, num_steps=0)  # its own round gets no steps
    published = running.status("published")
    running.until(lambda: running.status("published") > published)
    newest = Policy.from_bytes(ray.get(running.store.snapshot.remote()).current)
    batch = make_transitions(running.config, 64, seed=99)
    actions = newest.act(batch["states"], batch["categorical"], batch["scores"])
    assert newest.version > version and newest.manifest.note == "" and abs(actions.mean() - 0.8) < 0.3
    running.stop()


def test_a_worker_that_refuses_to_begin_is_an_error_of_the_start(tmp_path: Path) -> None:
    """Its log has another reward; without a look at its constructor the first word of it would come with the first status."""
    config = load_config("configs/demo.yaml", [f"run.dir={tmp_path}", "kafka.bootstrap_servers=127.0.0.1:1"])
    log = StepLog(config.log_root, "ingest-0", "one", config.spec.build())
    other = config.reward.model_copy(update={"scale": 99.0}).canonical
    state = WorkerState(commit=0, incarnation="one", positions={}, joiners={}, committed_ms=clock_ms(), reward=other)
    log.commit(state, rows_to_table([]))
    del log  # the lock of a running worker
    with pytest.raises(LoopError, match=r"an actor cannot start: .*LogError.*recompute-rewards"):
        parts.spawn_ingest(config, [])
