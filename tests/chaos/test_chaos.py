"""A short run with faults of every kind on a broker of its own, compared with the run without faults."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from esrl_ray import actors
from esrl_ray.cli.chaos.compare import Report
from esrl_ray.cli.chaos.faults import DOWN, KINDS, RANDOM, Fault, plan
from esrl_ray.cli.chaos.fleet import Fleet
from esrl_ray.cli.chaos.load import generate
from esrl_ray.cli.chaos.points import Point
from esrl_ray.cli.chaos.processes import ProcessFleet
from esrl_ray.cli.chaos.run import chaos_config, run_chaos
from streaming.broker import EmbeddedBroker

SEED = 1
FAULTS = [
    *(Fault("ingest", point) for point in Point if point not in (Point.AFTER_STATE, Point.DURING_CHECKPOINT, Point.BEFORE_COMPACTION)),
    Fault("broker", RANDOM),
    Fault("replay", RANDOM),
    Fault("zombie", Point.BEFORE_DELTA),
    Fault("deal", RANDOM),
    Fault("deal", RANDOM),
]


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker.start(tmp_path / "broker", say=print) as embedded:
        yield embedded


@pytest.fixture
def processes(tmp_path: Path, own_broker: EmbeddedBroker) -> Iterator[Fleet]:
    fleet = ProcessFleet(chaos_config(tmp_path, own_broker.bootstrap_servers, capacity=300), tmp_path)
    yield fleet
    fleet.end()


@pytest.fixture
def deployed(tmp_path: Path, own_broker: EmbeddedBroker) -> Iterator[Fleet]:
    from esrl_ray.cli.chaos.actor_fleet import ActorFleet  # imports RLlib, whose warnings are let pass in the test alone

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a local Ray leaves a token file in the home folder
    ray.init(address="local", namespace=actors.NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False)
    fleet = ActorFleet(chaos_config(tmp_path, own_broker.bootstrap_servers, capacity=300), tmp_path, with_learner=False)
    yield fleet
    fleet.end()
    ray.shutdown()


def run(fleet: Fleet, broker: EmbeddedBroker, faults: list[Fault], *, num_events: int, seconds: float) -> Report:
    load = generate(fleet.config, seed=SEED, num_events=num_events, num_phases=2, start_ms=time.time_ns() // 1_000_000)
    report = run_chaos(load, faults, broker, fleet, seconds=seconds, seed=SEED, say=print)
    assert report.problems == [] and report.not_reached == []
    assert report.num_kills == len(faults) and report.steps.steps > num_events / 10
    assert report.dead_letters["unique"] == report.dead_letters["sent"] > 0
    return report


def test_deaths_at_every_point_and_of_every_part_change_nothing(own_broker: EmbeddedBroker, processes: Fleet) -> None:
    report = run(processes, own_broker, FAULTS, num_events=4_000, seconds=15.0)
    (zombie,) = report.zombies
    assert "Fenced: commit" in zombie and "another worker of this name is running" in zombie


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own
def test_ray_brings_back_what_dies_and_nothing_changes(own_broker: EmbeddedBroker, deployed: Fleet) -> None:
    faults = [Fault("ingest", Point.DURING_COMPACTION), Fault("deal", RANDOM), Fault("replay", RANDOM)]
    run(deployed, own_broker, faults, num_events=2_000, seconds=6.0)


def test_a_plan_has_every_kind_and_every_point_before_it_repeats() -> None:
    first = plan([kind for kind in KINDS if kind != "learner"], 30, seed=5)
    assert {fault.when for fault in first if fault.kind == "ingest"} == {*Point, RANDOM}
    assert Fault("broker", DOWN) in first and {fault.kind for fault in first} == set(KINDS) - {"learner"}
    assert plan(["replay"], 3, seed=0) == [Fault("replay", RANDOM)] * 3
    assert plan(KINDS, 50, seed=5) != plan(KINDS, 50, seed=6)
