"""A short run with faults of every kind on a broker of its own, compared with the run without faults."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esrl_ray.cli.chaos.faults import DOWN, KINDS, RANDOM, Fault, plan
from esrl_ray.cli.chaos.load import generate
from esrl_ray.cli.chaos.points import Point
from esrl_ray.cli.chaos.processes import ProcessFleet
from esrl_ray.cli.chaos.run import chaos_config, run_chaos
from esrl_ray.config import Config
from streaming.broker import EmbeddedBroker

EVENTS, SECONDS, SEED = 5_000, 20.0, 1
FAULTS = [
    *(Fault("ingest", point) for point in Point if point not in (Point.AFTER_STATE, Point.DURING_CHECKPOINT, Point.BEFORE_COMPACTION)),
    Fault("broker", RANDOM),
    Fault("replay", RANDOM),
    Fault("zombie", Point.BEFORE_DELTA),
]


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker.start(tmp_path / "broker", say=print) as embedded:
        yield embedded


@pytest.fixture
def fleet(tmp_path: Path, own_broker: EmbeddedBroker) -> Iterator[ProcessFleet]:
    fleet = ProcessFleet(chaos_config(tmp_path, own_broker.bootstrap_servers, capacity=300), tmp_path)
    yield fleet
    fleet.end()


def test_deaths_at_every_point_and_of_every_part_change_nothing(own_broker: EmbeddedBroker, fleet: ProcessFleet) -> None:
    config: Config = fleet.config
    load = generate(config, seed=SEED, num_events=EVENTS, num_phases=2, start_ms=time.time_ns() // 1_000_000)
    report = run_chaos(config, load, FAULTS, own_broker, fleet, seconds=SECONDS, seed=SEED, say=print)
    assert report.problems == [] and report.not_reached == []
    assert report.num_kills == len(FAULTS) and report.steps.steps > 500
    assert report.dead_letters["unique"] == report.dead_letters["sent"] > 0
    (zombie,) = report.zombies
    assert "Fenced: commit" in zombie and "another worker of this name is running" in zombie


def test_a_plan_has_every_kind_and_every_point_before_it_repeats() -> None:
    first = plan(["ingest", "replay", "broker", "zombie"], 27, seed=5)
    assert {fault.when for fault in first if fault.kind == "ingest"} == {*Point, RANDOM}
    assert Fault("broker", DOWN) in first and {fault.kind for fault in first} == set(KINDS) - {"learner"}
    assert plan(["replay"], 3, seed=0) == [Fault("replay", RANDOM)] * 3
    assert plan(KINDS, 50, seed=5) != plan(KINDS, 50, seed=6)
