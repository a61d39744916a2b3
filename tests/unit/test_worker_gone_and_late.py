"""The ingest worker and records that are gone when they are needed again, or come too late."""

from __future__ import annotations

import threading

import msgspec
import pyarrow as pa
import pytest

from esrl_ray.errors import BrokerError, StreamError
from streaming.source import partition_of
from streaming.wire import JSON, encode
from tests.unit.test_sessions import decision, feedback
from tests.unit.worker_world import CONFIG, PARTITIONS, CrashError, World, visits

WITH_LATE = CONFIG.model_copy(update={"kafka": CONFIG.kafka.model_copy(update={"late_topics": True})})


def with_an_open_list() -> World:
    """Its first worker is gone; before and after its decision stands a record that is none."""
    world = World()
    partition = partition_of(b"s", PARTITIONS)
    world.raw("decisions", b"poison", partition=partition)
    world.write(decision("a", 0, session="s"))
    world.write(decision("a", 0, session="s"))
    world.raw("decisions", b"poison", partition=partition)
    world.write(feedback("a", "shown", 1, session="s"))
    worker = world.worker()
    while len(world.commits) < 1:
        worker.run_once()
    return world


def test_the_state_carries_no_bulk_and_a_restart_takes_it_from_the_topic() -> None:
    world = with_an_open_list()
    sent = decision("a", 0, session="s")
    assert world.state is not None and not any(sent.states.tobytes() in part for parts in world.state.joiners.values() for part in parts)
    dead, world.num_passed = dict(world.dead), 0
    worker = world.worker()
    worker.run_once()  # reads again
    assert world.refused == {} and world.num_passed == 0 and len(world.commits) == 1
    assert worker.drain(world.ends, 60.0)
    (row,) = pa.concat_tables(world.commits).to_pylist()
    assert row["states"] == sent.states.reshape(-1).tolist() and row["shown"] == [True, True, False]
    assert (
        world.dead == dead
        and worker.status()["ledger"]["decisions"] | {"joined": 1, "duplicate": 1, "dead_letter": 2}
        == (worker.status()["ledger"]["decisions"])
    )


def test_a_worker_that_ends_before_the_open_lists_are_whole_changes_nothing() -> None:
    world = with_an_open_list()
    state, stop = world.state, threading.Event()
    stop.set()
    world.worker().run(stop)
    assert not world.worker().drain(world.ends, 0.0) and world.state is state and len(world.commits) == 1


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (b"poison", "now it is unreadable: not a Decision"),
        (encode(decision("b", 0, session="s").event), "now it is decision b"),
        (None, "1 decisions from offset 1 to 1 are needed again for lists without a row and do not come"),
    ],
)
def test_a_topic_that_lost_an_open_list_stops_the_worker(now: bytes | None, reason: str) -> None:
    world, partition = with_an_open_list(), partition_of(b"s", PARTITIONS)
    records = world.topics["decisions", partition]
    if now is None:
        del records[1]
    else:
        records[1] = records[1]._replace(value=now)
    worker = world.worker()
    with pytest.raises(StreamError, match=rf"{reason}.*at decisions\[{partition}\]@1.*made anew"):
        for _ in range(10):
            worker.run_once()
    assert len(world.commits) == 1


@pytest.mark.parametrize("crash_at", ["", "after flush", "before commit", "after commit"])
def test_late_events_are_written_before_the_commit_that_counts_them(crash_at: str) -> None:
    config, world = WITH_LATE, World()
    visits(world)
    world.write(decision("old", -500))
    late = [feedback(f"d{s}-0", "click", -500 - s, item="i0", session=f"s{s}") for s in range(6)]
    for event in late:
        world.write(event)
    worker = world.worker(config=config)
    if crash_at:
        world.crash_at = crash_at
        with pytest.raises(CrashError):
            worker.drain(world.ends, 60.0)
        worker = world.worker(config=config)
    assert worker.drain(world.ends, 60.0)
    topics = [record for records in world.topics.values() for record in records]
    assert len(world.late_events) == len(late) + 1 and all(record in topics for record in world.late_events.values())
    assert world.late_events.keys() == {("feedback", event.event_id) for event in late} | {("decisions", "old")}
    ledger = worker.status()["ledger"]
    assert (ledger["decisions"]["late"], ledger["feedback"]["late"]) == (1, 6)


@pytest.mark.parametrize("restarts", [False, True])
def test_what_is_known_to_be_late_long_after_its_poll_keeps_its_bytes_until_a_restart(*, restarts: bool) -> None:
    world = World()
    world.write(decision("a", 0, session="s"))
    world.write(feedback("a", "shown", 0.1, session="s"))
    world.write(feedback("a", "click", 1, item="i0", session="s"))
    late, partition = feedback("a", "click", 60, item="i0", session="s"), partition_of(b"s", PARTITIONS)
    value = msgspec.json.encode({**msgspec.structs.asdict(late), "a_field_of": "the future"})
    world.raw("feedback", value, partition=partition, key=b"s", content_type=JSON)
    worker = world.worker(config=WITH_LATE)
    while len(world.commits) < 2:
        worker.run_once()
    assert worker.status()["ledger"]["feedback"]["in_open_session"] == 1 and world.late_events == {}
    worker = world.worker(config=WITH_LATE) if restarts else worker
    assert worker.drain(world.ends, 200.0)
    assert worker.status()["ledger"]["feedback"] | {"joined": 2, "late": 1} == worker.status()["ledger"]["feedback"]
    assert world.late_events == {("feedback", late.event_id): late if restarts else world.topics["feedback", partition][-1]}


def test_with_on_gap_skip_a_list_that_the_topic_lost_is_counted_and_leaves_no_link_to_it() -> None:
    config = CONFIG.model_copy(update={"kafka": CONFIG.kafka.model_copy(update={"on_gap": "skip"})})
    world, partition = with_an_open_list(), partition_of(b"s", PARTITIONS)
    world.write(decision("b", 3, session="s"))
    world.write(feedback("b", "shown", 3.1, session="s"))
    records = world.topics["decisions", partition]
    records[1] = records[1]._replace(offset=-1)  # never returned again
    world.skipped = {("decisions", partition): 7, ("feedback", 0): 2}
    worker = world.worker(config=config)
    assert worker.drain(world.ends, 60.0)
    (row,) = pa.concat_tables(world.commits).to_pylist()
    assert (row["step_id"], row["index"], row["ended"]) == ("b", 0, "truncated")
    ledger = {topic: {bucket: n for bucket, n in buckets.items() if n} for topic, buckets in worker.status()["ledger"].items()}
    assert ledger["decisions"] == {"joined": 1, "duplicate": 1, "dead_letter": 2, "skipped": 1 + 7}
    assert ledger["feedback"] == {"joined": 1, "skipped": 1 + 2}


def test_a_topic_made_anew_with_as_many_records_stops_the_worker_before_it_commits() -> None:
    world = World()
    world.topic_ids = {"decisions": "one", "feedback": "two"}
    visits(world)
    worker = world.worker()
    assert worker.drain(world.ends, 60.0)
    num_commits = len(world.commits)
    world.topic_ids = {"decisions": "one", "feedback": "three"}
    world.write(feedback("d0-0", "click", 5, item="i0", session="s0"))
    worker = world.worker()
    with pytest.raises(StreamError, match=r"feedback was made anew: its id was two, now it is three \(at feedback/0@\d+ feedback/1@\d+\)"):
        worker.drain(world.ends, 60.0)
    assert len(world.commits) == num_commits


def test_the_position_does_not_pass_a_bad_record_that_has_no_dead_letter_yet() -> None:
    world = World()
    world.raw("feedback", b"poison")

    def fail() -> None:
        raise BrokerError("1 dead letters or late events were not acknowledged")

    working, world.flush = world.flush, fail  # type: ignore[method-assign]
    with pytest.raises(BrokerError, match="not acknowledged"):
        world.worker().drain(world.ends, 60.0)
    assert world.commits == [] and world.state is None
    world.flush = working  # type: ignore[method-assign]
    assert world.worker().drain(world.ends, 60.0)
    assert world.dead.keys() == {("feedback", 0, 0)} and world.state.positions["feedback/0"] == 1  # type: ignore[attr-defined]
