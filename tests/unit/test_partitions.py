"""Partitions move between workers' tables: drained, dealt to more and to fewer, with crashes in between; and what readers make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from esrl_ray import actors
from esrl_ray.cli import parts
from esrl_ray.cli.ingest import drain
from esrl_ray.config import JoinConfig, KafkaConfig, ReplayConfig, RunConfig
from esrl_ray.errors import Fenced, LogError, LoopError, StreamError
from esrl_ray.learning.feed import shard_to_ask
from esrl_ray.replay.buffer import ReplayBuffer
from streaming.partitions import commits_of_shard, deal_partitions, live_workers
from streaming.steplog import StepLog, WorkerState, read_commits, read_newest, read_steps, rows_to_table
from streaming.worker import IngestWorker
from tests.unit.test_worker import refused_records
from tests.unit.worker_world import CONFIG as ONE
from tests.unit.worker_world import CrashError, Topics, World, visits

PARTITIONS = 6
# Sessions end by `leave` or with the data: what a gap makes of them depends on how long a drain takes.
CONFIG = ONE.model_copy(update={"kafka": KafkaConfig(num_partitions=PARTITIONS), "join": JoinConfig(gap_s=None)})
SPEC = CONFIG.spec.build()


def busy() -> World:
    """Sessions in all partitions, and records that are refused."""
    world = World(PARTITIONS)
    visits(world, sessions=16)
    refused_records(world)
    return world


def owners(num_workers: int) -> dict[int, str]:
    return {p: f"ingest-{p % num_workers}" for p in range(PARTITIONS)}


class Deployment:
    """Workers with real step logs over a world; each start is that of `esrl ingest`."""

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root, self.numbers = world, root, count()
        self.world.refused, self.world.waiting_late = {}, []
        self.workers: dict[str, IngestWorker] = {}

    def deal(self, num_workers: int) -> dict[int, str]:
        incarnation = f"deal-{next(self.numbers)}"
        return deal_partitions(self.root, SPEC, owners(num_workers), incarnation=incarnation, committed_ms=self.world.now_ms)

    def start(self, num_workers: int) -> dict[int, str]:
        moved = self.deal(num_workers)
        self.workers = {name: self.worker(name, owners(num_workers)) for name in dict.fromkeys(owners(num_workers).values())}
        return moved

    def worker(self, name: str, owned: Mapping[int, str]) -> IngestWorker:
        partitions = [p for p, owner in owned.items() if owner == name]
        return IngestWorker(
            CONFIG,
            name,
            partitions,
            log=StepLog(self.root, name, f"{name}-{next(self.numbers)}", SPEC),
            source_factory=lambda positions: Topics(self.world, partitions, positions),
            dead_letters=self.world,
            publish=[],
            clock_ms=lambda: self.world.now_ms,
        )

    def run(self, polls: int) -> None:
        for _ in range(polls):
            for worker in self.workers.values():
                worker.run_once()

    def check(self) -> None:
        """Drained to the end by whoever is there, it is what one worker makes of the same records."""
        calm = busy()
        steady = Deployment(calm, self.root.parent / f"{self.root.name}-calm")
        steady.start(1)
        assert steady.workers["ingest-0"].drain(calm.ends, 300.0)
        assert all(worker.drain(self.world.ends, 300.0) for worker in self.workers.values())
        ledger: dict[str, Counter[str]] = {"decisions": Counter(), "feedback": Counter()}
        for worker in self.workers.values():
            for topic, buckets in worker.status()["ledger"].items():
                ledger[topic].update(buckets)
        assert ledger == steady.workers["ingest-0"].status()["ledger"] and self.world.dead == calm.dead
        assert comparable(self.root) == comparable(steady.root)
        whole = [rows.filter(rows["item_ids"].is_valid()) for rows in rows_of(self.root).values()]
        first = Counter(name for rows in whole for name in rows["step_id"].to_pylist())
        assert set(first.values()) == {1} and len(first) == 64


def comparable(root: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = read_steps(root).drop_columns(["commit", "closed_ms", "revision"]).to_pylist()
    return rows


def rows_of(root: Path) -> dict[str, pa.Table]:
    return {worker: pa.concat_tables(rows for _, rows in read_commits(root, worker)) for worker in live_workers(root)}


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    return Deployment(busy(), tmp_path / "log")


def test_two_workers_one_drained_then_three_then_one_give_the_steps_of_one_that_never_stopped(made: Deployment) -> None:
    assert made.start(2) == {}
    made.run(24)
    assert made.workers.pop("ingest-1").release() >= 0
    made.run(5)  # the other one dies with what it has not committed
    assert made.start(3) == {2: "ingest-0", 3: "ingest-1", 4: "ingest-0", 5: "ingest-1"}
    made.run(13)
    assert made.start(1) == {1: "ingest-1", 2: "ingest-2", 4: "ingest-1", 5: "ingest-2"}
    made.check()
    tables = rows_of(made.root)
    elsewhere = set(tables["ingest-0"]["step_id"].to_pylist()) & set(tables["ingest-1"]["step_id"].to_pylist())
    assert elsewhere, "a step's later rows stand in another table than its first"


def test_a_drained_worker_does_nothing_more_until_partitions_are_dealt_again(made: Deployment) -> None:
    made.start(2)
    made.run(12)
    drained = made.workers["ingest-1"]
    drained.release()
    with pytest.raises(StreamError, match=r"released partitions \[1, 3, 5\]"):
        drained.run_once()
    with pytest.raises(StreamError, match=r"holds partitions \[\], this worker is given \[1, 3, 5\].*`esrl ingest` again"):
        made.worker("ingest-1", owners(2))
    assert made.start(2) == {}, "it takes its own ones back"
    made.check()


def test_workers_of_another_number_that_run_on_are_fenced(made: Deployment) -> None:
    made.start(2)
    made.run(12)
    before = made.workers
    made.start(3)
    for worker in before.values():
        with pytest.raises(Fenced):
            for _ in range(20):
                worker.run_once()
    made.check()


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("dies_at", range(1, 6))
def test_a_crash_at_any_commit_of_a_deal_leaves_each_partition_one_owner(
    made: Deployment, monkeypatch: pytest.MonkeyPatch, dies_at: int, durable: bool
) -> None:
    made.start(2)
    made.run(14)
    commits = iter(range(1, 100))
    commit = StepLog.commit

    def dying(self: StepLog, state: WorkerState, table: pa.Table) -> None:
        dies = next(commits) == dies_at
        if durable or not dies:
            commit(self, state, table)
        if dies:
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "commit", dying)
        with pytest.raises(CrashError):
            for num_workers in (3, 1):
                made.deal(num_workers)
    made.start(2)
    made.check()


def test_states_that_were_taken_over_are_dropped_at_the_next_start(made: Deployment) -> None:
    made.start(3)
    made.run(12)
    made.start(1)
    left = StepLog(made.root, "ingest-2", "look", SPEC).restore()
    assert left is not None and set(left.given.values()) == {"ingest-0"} and left.joiners and not left.held
    made.start(1)
    dropped = StepLog(made.root, "ingest-2", "look", SPEC).restore()
    assert dropped is not None and not dropped.joiners and not dropped.given
    made.check()


def test_a_table_that_went_back_to_before_a_move_does_not_claim_the_partition(made: Deployment) -> None:
    made.start(2)
    made.run(12)
    made.deal(3)
    given = min(n for n, s in states(made.root, "ingest-1").items() if s.given)
    for path in (made.root / "ingest-1" / "_state").glob("*.msgpack"):
        if int(path.name[:12]) >= given:
            path.write_bytes(b"")
    made.start(3)
    again = StepLog(made.root, "ingest-1", "look", SPEC).restore()
    assert again is not None and set(again.held) == {1, 4}
    made.check()


def test_a_worker_with_a_table_of_its_own_at_last_knows_which_topics_it_took_over(made: Deployment) -> None:
    made.world.topic_ids = {"decisions": "one", "feedback": "two"}
    made.start(1)
    made.run(12)
    made.start(2)
    made.world.topic_ids = {"decisions": "one", "feedback": "three"}
    made.workers["ingest-1"] = made.worker("ingest-1", owners(2))
    with pytest.raises(StreamError, match="topic feedback was made anew: its id was two, now it is three"):
        made.run(12)


def test_workers_begin_when_partitions_are_dealt_and_shards_have_read_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def spawn(name: str, *_: object, **__: object) -> SimpleNamespace:
        done.append(name)
        return SimpleNamespace(pid=SimpleNamespace(remote=name))

    def deal(*_: object, **__: object) -> dict[int, str]:
        done.append("deal")
        return {2: "ingest-0"}

    monkeypatch.setattr(parts, "deal_partitions", deal)
    monkeypatch.setattr(actors, "spawn", spawn)
    monkeypatch.setattr(actors, "insist", lambda call, **_: done.append(f"asked {call}"))
    shards = [SimpleNamespace(catch_up=SimpleNamespace(remote=f"shard {i}")) for i in range(2)]
    config = CONFIG.model_copy(update={"ingest": CONFIG.ingest.model_copy(update={"num_workers": 2})})
    assert list(parts.spawn_ingest(config, shards)) == ["ingest-0", "ingest-1"]
    assert done == ["deal", "asked shard 0", "asked shard 1", "ingest-0", "ingest-1", "asked ingest-0", "asked ingest-1"]


def states(root: Path, worker: str) -> dict[int, WorkerState]:
    log = StepLog(root, worker, "look", SPEC)
    return {n: log._states._read(n, None) for n in log._states.numbers()}


def test_two_tables_that_claim_a_partition_are_an_error(tmp_path: Path) -> None:
    for worker in ("ingest-0", "ingest-1"):
        state = WorkerState(commit=0, incarnation="x", positions={}, joiners={3: [b""]}, committed_ms=0)
        StepLog(tmp_path, worker, "x", SPEC).commit(state, rows_to_table([]))
    with pytest.raises(LogError, match="partition 3 is claimed by ingest-0 and ingest-1"):
        deal_partitions(tmp_path, SPEC, owners(2), incarnation="y", committed_ms=0)


def test_replay_shards_hold_whole_sessions_whoever_joins_them(made: Deployment) -> None:
    made.start(2)
    made.run(24)
    made.start(3)
    made.check()
    steps = read_steps(made.root)
    config = CONFIG.model_copy(update={"replay": ReplayConfig(num_shards=2, capacity=1_000)})
    held: list[str] = []
    for shard in range(2):
        buffer = ReplayBuffer(config, seed=0, read_log=partial(commits_of_shard, str(made.root), shard, 2))
        buffer.refill(live_workers(made.root))
        own = steps.filter(pa.array([p % 2 == shard for p in steps["partition"].to_pylist()]))
        ids, ended = own["step_id"].to_pylist(), own["ended"].to_pylist()
        assert buffer.size == len(ids) and buffer.num_ignored_amendments == 0
        assert buffer.samplable_ids() == {i for i, how in zip(ids, ended, strict=True) if how in ("has_next", "terminated")}
        assert all(buffer.step(i)["rewards"].any() for i in ids), "with its later feedback"
        held += ids
    assert len(held) == 64


def test_the_newest_steps_are_whole_where_a_partition_has_moved(made: Deployment) -> None:
    made.start(2)
    made.run(24)
    made.start(3)
    made.check()
    whole = {row["step_id"]: row for row in read_steps(made.root).to_pylist()}
    newest = read_newest(made.root, 10, lambda rows: rows["item_ids"].is_valid().to_numpy() | True).to_pylist()
    assert len(newest) >= 10 and all(row == whole[row["step_id"]] for row in newest)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
@pytest.mark.parametrize("num_learners", [1, 2, 3, 4])
def test_every_learner_draws_from_all_shards(num_shards: int, num_learners: int) -> None:
    asks = [shard_to_ask(number, num_shards, num_learners) for number in range(12 * num_shards * num_learners)]
    for learner in range(num_learners):
        assert Counter(asks[learner::num_learners]) == dict.fromkeys(range(num_shards), 12)


def test_the_worker_of_an_actor_is_drained_from_outside_and_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka = CONFIG.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})  # it is down: nothing is read, and nothing needs to be
    config = CONFIG.model_copy(update={"run": RunConfig(dir=str(tmp_path)), "kafka": kafka})
    part = parts.IngestPart(config, "ingest-0", [])
    assert not part.status()["released"]
    handles = {"ingest-0": SimpleNamespace(release=SimpleNamespace(remote=part.release))}

    def find(name: str) -> SimpleNamespace:
        if name not in handles:
            raise ValueError(name)
        return handles[name]

    monkeypatch.setattr(actors, "find", find)
    monkeypatch.setattr(actors, "insist", lambda call: call())
    for _ in range(2):  # asked again, as when the answer was lost
        drain(["ingest-0"])
    assert capsys.readouterr().out == "ingest-0 is drained at commit 0, partitions [0, 1, 2, 3, 4, 5]\n" * 2
    assert part.status()["released"] and part.status()["error"] is None
    with pytest.raises(LoopError, match="no worker 'ingest-7' is running"):
        drain(["ingest-7"])
    with pytest.raises(StreamError, match="deals all partitions"):
        parts.IngestPart(config, "ingest-0", [])
