"""The generated load: its shares are as told, every poison is refused, and how it is read changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from esrl_ray.cli.chaos import load as chaos_load
from esrl_ray.cli.chaos.compare import compare_steps
from esrl_ray.cli.chaos.load import POISON, Load, Planned, generate
from esrl_ray.cli.chaos.reference import Ends, fault_free
from esrl_ray.cli.chaos.run import chaos_config
from streaming.records import Record

CONFIG = chaos_config(Path("nowhere"), "nowhere:1", capacity=1_000)
PARTITIONS = range(CONFIG.kafka.num_partitions)
Topics = dict[tuple[str, int], list[Record]]


@pytest.fixture(scope="module")
def load() -> Load:
    return generate(CONFIG, seed=3, num_events=15_000, num_phases=2, start_ms=time.time_ns() // 1_000_000)


def topics_of(load: Load) -> tuple[Topics, list[Ends]]:
    """The load as the broker would hold it, and the ends of its phases."""
    topics: Topics = {(topic, p): [] for topic in ("decisions", "feedback") for p in PARTITIONS}
    ends: list[Ends] = []

    def write(planned: Planned) -> None:
        there = topics[planned.topic, planned.partition]
        there.append(Record(planned.topic, planned.partition, len(there), 0, planned.key, planned.value, planned.content_type))

    for planned in load.before:
        write(planned)
    for phase in load.phases:
        for planned in phase:
            write(planned)
        ends.append({where: len(there) for where, there in topics.items()})
    return topics, ends


def test_the_shares_are_as_told(load: Load) -> None:
    counts, everything = load.count(), [p for phase in load.phases for p in phase]
    total = len(everything) + len(load.before)
    assert total >= 13_000 and counts["decisions"] + counts["feedback"] == total
    newest: Counter[tuple[int, str]] = Counter()
    behind = []
    for p in everything:
        if p.kind in ("event", "late"):
            behind.append(newest[p.partition, p.topic] - p.event_time_ms)
            newest[p.partition, p.topic] = max(newest[p.partition, p.topic], p.event_time_ms)
    lateness_ms = 1000 * CONFIG.join.lateness_s
    assert 0.15 < sum(0 < ms <= lateness_ms for ms in behind) / len(behind) < 0.25
    assert 0.005 < sum(ms > lateness_ms for ms in behind) / len(behind) < 0.05
    assert 0.04 < counts["duplicate"] / total < 0.06
    assert counts["poison"] / total == pytest.approx(0.005, abs=0.001) and counts["too_late"] >= 10
    assert {p.partition for p in everything} == {0, 1, 2, 3} and {p.partition for p in load.before} == {4}


def test_a_load_depends_on_nothing_but_its_seed() -> None:
    one, same, other = (generate(CONFIG, seed=seed, num_events=1_000, num_phases=2, start_ms=10**12) for seed in (1, 1, 2))
    assert one == same != other


def test_poison_is_made_of_valid_events_however_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_load, "POISONED", 1.0)
    assert generate(CONFIG, seed=1, num_events=1_000, num_phases=2, start_ms=10**12).count()["poison"] > 1_000


def test_every_poison_is_refused_and_how_the_topics_are_read_changes_nothing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    topics, ends = topics_of(load)
    steps, ledger, refused = fault_free(CONFIG, topics, ends)
    counts = load.count()
    assert sum(buckets["duplicate"] for buckets in ledger.values()) == counts["duplicate"]
    assert len(refused) == counts["poison"] == sum(buckets["dead_letter"] for buckets in ledger.values()) >= len(POISON)
    assert sum(buckets["late"] for buckets in ledger.values()) >= counts["too_late"]
    assert {topic: sum(buckets.values()) for topic, buckets in ledger.items()} == {t: counts[t] for t in ("decisions", "feedback")}
    assert set(steps["ended"].to_pylist()) == {"has_next", "terminated", "truncated"}
    assert any("#1" in session for session in steps["session_id"].to_pylist()), "sessions come back after the gap"
    monkeypatch.setattr("esrl_ray.cli.chaos.reference.POLL_RECORDS", 77)
    feedback_first = dict(reversed(topics.items()))
    again, ledger_again, refused_again = fault_free(CONFIG, feedback_first, ends)
    difference = compare_steps(steps, again, again)
    assert difference.exact, difference
    assert (ledger_again, refused_again) == (ledger, refused)
