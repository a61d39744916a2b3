"""The ingest worker over a log, topics and a clock in memory: what it refuses, what it commits, and what a crash at any moment leaves."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest

from esrl_ray.config import JoinConfig
from esrl_ray.errors import Fenced, LogError, StreamError
from streaming.source import partition_of
from streaming.steplog import WorkerState
from streaming.wire import JSON
from streaming.worker import MIN_LEAD_MS
from tests.unit.test_sessions import REWARD, T0, decision, feedback
from tests.unit.worker_world import CONFIG, PARTITIONS, CrashError, World, comparable, visits


def test_drain_reads_everything_commits_it_and_closes_what_is_open() -> None:
    world = World()
    visits(world)
    worker = world.worker()
    assert worker.drain({**world.ends, "decisions/7": 99}, 60.0)
    steps = comparable(world)
    assert len(steps) == 24 == worker.status()["steps_closed"]
    ends = {row["session_id"]: row["ended"] for row in steps if row["next_id"] is None}
    assert ends == {f"s{s}": "terminated" if s % 2 else "truncated" for s in range(6)}
    status = worker.status()
    assert status["positions"] == world.ends and status["open_sessions"] == {0: 0, 1: 0} and status["error"] is None
    assert {k: v for k, v in status["ledger"]["decisions"].items() if v} == {"joined": 24}
    assert {k: v for k, v in status["ledger"]["feedback"].items() if v} == {"joined": 51, "duplicate": 24}
    assert set(status["lag"].values()) == {0} and status["commit"] == len(world.commits) - 1
    assert [(worker, n) for worker, n, _, _ in world.published] == [("ingest-0", n) for n in range(len(world.commits))]
    for (_, n, table, committed_ms), committed in zip(world.published, world.commits, strict=True):
        assert table["commit"].to_pylist() == [n] * len(committed)
        assert table.drop_columns(["commit"]).equals(committed.drop_columns(["commit"])) and committed_ms > T0


def test_drain_closes_what_it_has_when_the_time_is_over() -> None:
    world = World()
    visits(world)
    worker = world.worker()
    assert not worker.drain({"decisions/0": 1_000}, 30.0)
    assert worker.status()["steps_closed"] == 24


def test_commits_come_at_the_interval_and_none_when_nothing_changed() -> None:
    world = World()
    worker = world.worker()
    for _ in range(20):
        worker.run_once()
    assert world.commits == []
    world.write(decision("a", 10))
    for _ in range(5):
        worker.run_once()
    assert len(world.commits) == 1 and len(world.commits[0]) == 0  # it was read: the position is worth a commit
    for _ in range(60):
        worker.run_once()
    assert len(world.commits) == 2  # never shown
    assert worker.status()["ledger"]["decisions"]["never_shown"] == 1


def test_what_is_due_at_once_after_a_pause_comes_in_several_commits_one_after_the_other() -> None:
    def after_a_pause(max_commit_mb: float) -> World:
        world = World()
        ingest = CONFIG.ingest.model_copy(update={"max_commit_mb": max_commit_mb})
        config = CONFIG.model_copy(update={"ingest": ingest, "join": JoinConfig(gap_s=None)})
        worker = world.worker(config=config)
        for i in range(9):
            world.write(decision(f"d{i}", 10 + i / 1000))
            world.write(feedback(f"d{i}", "shown", 11))
        for _ in range(10):
            worker.run_once()
        assert sum(map(len, world.commits)) == 0
        world.now_ms += 100_000
        before = len(world.commits)
        for _ in range(8):  # four seconds, two intervals
            worker.run_once()
        assert [len(rows) for rows in world.commits[before:] if len(rows)] == ([9] if max_commit_mb == 1 else [3, 3, 3])
        return world

    mb_of_a_row = CONFIG.ingest.max_commit_mb / CONFIG.max_commit_rows
    in_parts = after_a_pause(3.1 * PARTITIONS * mb_of_a_row)  # three of each partition
    assert comparable(in_parts) == comparable(after_a_pause(1))


def test_a_drain_that_is_behind_ends_the_sessions_whose_users_have_left() -> None:
    ends = []
    for max_commit_mb in (128.0, 3.1 * PARTITIONS * CONFIG.ingest.max_commit_mb / CONFIG.max_commit_rows):
        world = World()
        ingest = CONFIG.ingest.model_copy(update={"max_commit_mb": max_commit_mb})
        worker = world.worker(config=CONFIG.model_copy(update={"ingest": ingest}))
        for i in range(9):
            world.write(decision(f"d{i}", 10 + i / 1000))
            world.write(feedback(f"d{i}", "shown", 11))
        for _ in range(10):
            worker.run_once()
        world.now_ms += 100_000
        while not any(len(rows) for rows in world.commits):
            worker.run_once()
        assert worker.drain(world.ends, 60.0) and not worker.status()["is_behind"]
        ends.append([row["ended"] for row in comparable(world)])
    assert ends[0] == ends[1] == ["has_next"] * 8 + ["terminated"]


def test_while_a_commit_hangs_the_status_has_the_lag_from_when_it_began() -> None:
    world, seen = World(), []
    visits(world)
    committed, worker = world.commit, world.worker()

    def hangs(state: WorkerState, table: pa.Table) -> None:
        began_ms = world.now_ms
        world.now_ms += 600_000
        seen.append((worker.status(), began_ms))
        committed(state, table)

    world.commit = hangs  # type: ignore[method-assign]
    assert worker.drain(world.ends, 10_000.0)
    at = dict.fromkeys(world.ends, 0)
    assert len(seen) > 1
    for (status, began_ms), state in zip(seen, [state for state, _ in seen[1:]], strict=False):
        assert status["lag"] == {where: end - at[where] for where, end in world.ends.items()} and sum(status["lag"].values()) > 0
        assert status["looked_ms"] == began_ms
        at = state["positions"]
    assert set(worker.status()["lag"].values()) == {0} and worker.status()["looked_ms"] == world.now_ms


def test_neither_topic_is_read_far_ahead_of_the_other() -> None:
    world = World()
    for i in range(100):
        world.write(decision(f"d{i}", 2 * i, session="s"))
        world.write(feedback(f"d{i}", "shown", 2 * i + 0.1, session="s"))
    config = CONFIG.model_copy(update={"join": JoinConfig(lateness_s=0)})
    worker, partition = world.worker(config=config), partition_of(b"s", PARTITIONS)
    one_poll_ms = 5 * 2_000
    while worker.run_once():
        at_ms = {topic: T0 + 2_000 * worker.status()["positions"].get(f"{topic}/{partition}", 0) for topic in ("decisions", "feedback")}
        assert abs(at_ms["decisions"] - at_ms["feedback"]) <= MIN_LEAD_MS + one_poll_ms
    assert worker.drain(world.ends, 10.0)
    assert worker.status()["steps_closed"] == 100


def test_a_clock_that_was_set_back_does_not_stop_the_commits() -> None:
    world = World()
    worker = world.worker()
    world.write(decision("a", 10))
    world.now_ms -= 3_600_000
    worker.run_once()
    assert len(world.commits) == 1


def refused_records(world: World) -> list[tuple[str, str]]:
    """Writes one record of each kind that is refused; returns (topic, part of the reason)."""
    session = next(f"x{i}" for i in range(100) if partition_of(f"x{i}".encode(), PARTITIONS) == 1)
    world.raw("decisions", b"\xc1")
    world.raw("feedback", b"{", content_type=JSON)
    world.raw("feedback", b"{}", content_type=b"text/plain")
    world.write(feedback("a", "dance", 1, item="i0", session="s"))
    world.write(decision("far", 301, session="s"))
    world.write(feedback("a", "click", 1, item="i0", session=session), partition=0)
    world.write(feedback("a", "click", 1, item="i0", session="s"), key=b"other")
    return [
        ("decisions", "not a Decision"),
        ("decisions", "ahead of the clock, at most 300000 is believed"),
        ("feedback", "not a Feedback"),
        ("feedback", "content-type b'text/plain' is unknown"),
        ("feedback", "behaviour 'dance' is not declared"),
        ("feedback", "murmur2, Kafka's default, gives 1"),
        ("feedback", "key b'other' is not the session_id 's'"),
    ]


def test_what_is_no_valid_event_becomes_a_dead_letter_with_its_reason() -> None:
    world = World()
    expected = refused_records(world)
    world.write(feedback("a", "click", 1, item="i0", session="s"))
    worker = world.worker()
    assert worker.drain(world.ends, 60.0)
    got = sorted((topic, reason) for (topic, _, _), reason in world.dead.items())
    assert len(got) == len(expected)
    for topic, part in expected:
        assert any(t == topic and part in reason for t, reason in got), part
    ledger = worker.status()["ledger"]
    assert ledger["decisions"]["dead_letter"] == 2 and ledger["feedback"]["dead_letter"] == 5
    refusals = worker.status()["refusals"]
    assert refusals["decisions"] == {"malformed": 1, "far-future": 1}
    assert refusals["feedback"] == dict.fromkeys(
        ["malformed", "unknown-content-type", "undeclared-behaviour", "wrong-partition", "key-mismatch"], 1
    )
    assert ledger["feedback"]["unmatched"] == 1 and world.num_passed == 1
    assert sum(ledger["feedback"].values()) == sum(end for where, end in world.ends.items() if where.startswith("feedback"))


@pytest.mark.parametrize("crash_at", ["poll", "after flush", "before commit", "after commit"])
@pytest.mark.parametrize("skip", range(5))
def test_a_crash_at_any_moment_changes_neither_the_steps_nor_the_ledger(crash_at: str, skip: int) -> None:
    calm, world = World(), World()
    for w in (calm, world):
        visits(w)
        refused_records(w)
    steady = calm.worker()
    assert steady.drain(calm.ends, 300.0)
    worker = world.worker()
    for _ in range(3):
        for _ in range(skip):
            worker.run_once()
        world.crash_at = crash_at
        with pytest.raises(CrashError):
            for _ in range(100):
                worker.run_once()
        assert worker.status()["error"] == f"CrashError: {crash_at}"
        with pytest.raises(StreamError, match="make a new one"):
            worker.run_once()
        worker = world.worker()
    assert worker.drain(world.ends, 300.0)
    assert worker.status()["ledger"] == steady.status()["ledger"]
    assert world.dead == calm.dead
    rows = pa.concat_tables(world.commits)
    whole = [step for step, bulky in zip(rows["step_id"].to_pylist(), rows["states"].to_pylist(), strict=True) if bulky is not None]
    assert sorted(whole) == [f"d{s}-{i}" for s in range(6) for i in range(4)]  # the first row of each step came once
    assert worker.status()["steps_closed"] == 24
    assert comparable(world) == comparable(calm)


def test_a_log_of_other_partitions_is_refused() -> None:
    world = World()
    visits(world)
    world.worker().drain(world.ends, 60.0)
    with pytest.raises(StreamError, match=r"holds partitions \[0, 1\], this worker is given \[0\]: \[1\] would be lost"):
        world.worker(partitions=[0])


def test_a_log_of_another_reward_is_refused() -> None:
    world = World()
    visits(world, sessions=1)
    worker = world.worker()
    worker.drain(world.ends, 60)
    assert world.state is not None and world.state.reward == REWARD.canonical
    other = CONFIG.model_copy(update={"reward": REWARD.model_copy(update={"scale": 3.0})})
    with pytest.raises(LogError, match=f"of reward {REWARD.digest}.*{other.reward.digest}.*recompute-rewards"):
        world.worker(config=other)
    world.worker()


def test_a_subscriber_that_fails_does_not_stop_the_log(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    visits(world)

    def fail(worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        raise ConnectionError("gone")

    world.publish = fail  # type: ignore[method-assign]
    worker = world.worker()
    assert worker.drain(world.ends, 60.0)
    assert worker.status()["steps_closed"] == 24 and "publish failed worker=ingest-0" in caplog.text


def test_run_works_in_a_thread_until_told_to_stop_and_drain_goes_on_from_there() -> None:
    world = World()
    visits(world)
    worker, stop = world.worker(), threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    deadline = threading.Event()
    while worker.status()["positions"] != world.ends and thread.is_alive():
        deadline.wait(0.01)
    stop.set()
    thread.join(10)
    assert not thread.is_alive() and worker.status()["commit"] >= 0
    assert worker.drain(world.ends, 60.0)
    assert len(comparable(world)) == 24


def test_a_fenced_worker_ends_with_the_reason_in_its_status() -> None:
    world = World()
    visits(world)

    def fence(state: WorkerState, table: pa.Table) -> None:
        raise Fenced("commit 0 was made by another incarnation x")

    world.commit = fence  # type: ignore[method-assign]
    worker = world.worker()
    with pytest.raises(Fenced):
        worker.run(threading.Event())
    assert worker.status()["error"] == "Fenced: commit 0 was made by another incarnation x"


def test_the_partition_of_a_key_is_that_of_kafkas_default_partitioner() -> None:
    of_java = {b"21": -973932308, b"foobar": -790332482, b"abc": 479470107, b"a-little-bit-long-string": -985981536}  # Kafka's UtilsTest
    for key, murmur2 in of_java.items():
        assert partition_of(key, 1_000) == (murmur2 & 0x7FFFFFFF) % 1_000
