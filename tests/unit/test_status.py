"""`esrl status`: what it reads from a log, what it makes of running workers, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from esrl_ray import actors
from esrl_ray.cli import status as module
from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.parts import IngestMeter
from esrl_ray.config import Config
from esrl_ray.errors import BrokerError, ConfigError
from esrl_ray.telemetry import COUNTERS, GAUGES
from esrl_ray.vocabulary import Ended
from streaming.health import DELAY_CLASSES, label_delays
from streaming.sessions import SessionJoiner
from streaming.steplog import StepLog, WorkerState, rows_to_table
from tests.unit.test_log_command import first, later
from tests.unit.test_sessions import REWARD, SPEC, T0, decision, feedback
from tests.unit.worker_world import World

YAML = "spec: {item_features: [age]}\nkafka: {num_partitions: 2, bootstrap_servers: '127.0.0.1:1'}\n"


def of(run_dir: Path, *arguments: str, **environment: str) -> Any:
    """The command's JSON, or its text."""
    path = run_dir / "deployment.yaml"
    reward = json.dumps(REWARD.model_dump(mode="json"))
    path.write_text(f"run: {{dir: {run_dir}}}\nreward: {reward}\n{YAML}")
    result = CliRunner().invoke(module.status, ["--config", str(path), *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    return json.loads(result.output) if "--json" in arguments else result.output


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A log whose last commit has a closed step, an open one, feedback without a decision and a decision that nobody was shown."""
    config = Config(spec=SPECIFIED.spec, reward=REWARD)
    joiner = SessionJoiner(1, config)
    joiner.push(
        [(0, decision("a", 0.0)), (1, decision("b", 9.0)), (2, decision("c", 0.5, session="other"))],
        [(0, feedback("a", "shown", 0.5)), (1, feedback("b", "shown", 9.5)), (2, feedback("gone", "click", 1.0, item="i0"))],
    )
    rows = joiner.advance(clock_ms=T0 + 12_000, decisions_at_end=True, feedback_at_end=True)
    positions = {"decisions/1": 3, "feedback/1": 3}
    log = StepLog(tmp_path / "log" / SPEC.digest, "ingest-1", "one", SPEC)
    joiners = {1: [joiner.snapshot()]}
    log.commit(WorkerState(commit=0, incarnation="one", positions=positions, joiners=joiners, committed_ms=T0), rows_to_table(rows))
    return tmp_path


SPECIFIED = Config.model_validate({"spec": {"item_features": ["age"]}})


def test_without_a_cluster_the_last_commits_are_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "end_offsets", lambda _: {(topic, p): 10 for topic in ("decisions", "feedback") for p in (0, 1)})
    found = of(run_dir, "--address", "none", "--json")
    worker = found["workers"]["ingest-1"]
    assert (worker["source"], worker["commit"], worker["committed_ms"]) == ("from the log", 0, T0)
    assert worker["lag"] == {"decisions/1": 7, "feedback/1": 7} and worker["steps_closed"] == 1
    assert worker["watermarks_ms"] == {"1": T0 + 7_000} and list(worker["open_sessions"]) == ["1"]
    assert sum(found["join"]["label_delay_s"].values()) == 1 and found["join"]["label_delay_s"]["<=30"] == 1
    assert found["join"]["ledger"]["decisions"]["joined"] == 1


def test_a_broker_that_is_down_leaves_the_lag_unknown(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(_: object) -> None:
        raise BrokerError("no broker answers")

    monkeypatch.setattr(module, "end_offsets", down)
    output = of(run_dir, "--address", "none")
    assert "ingest-1" in output and "from the log" in output and "unknown" in output and "label delay: <=30 s 100.0 %" in output


def test_nothing_anywhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no worker runs and none has a step log .*log"):
        of(tmp_path, "--address", "none")


class Running:
    """Three workers on a cluster, of which one does not answer and one is slow; a hundred steps a second."""

    def __init__(self) -> None:
        world = World()
        world.write(decision("d", 0.0))
        self.status = {**world.worker().status(), "lag": {"decisions/0": 1, "feedback/0": 0, "decisions/1": 2, "feedback/1": 0}}
        self.now_s = 0.0
        self.takes_s = {"silent": 5.0, "slow": 3.0}

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def ask(self, call: Any, *_: object) -> Any:
        self.sleep(self.takes_s.get(call, 0.01))
        if call == "slow":
            self.takes_s["slow"] = 0.1  # the second time it is not
            return {"steps_closed": 100 * self.now_s}
        if call == "silent":
            return None
        if call == "stats":
            return {"size": 5, "num_samplable": 4, "lineage": {}, "num_inserted": 5}
        refusals = {"decisions": {"malformed": 2}, "feedback": {}}
        ledger = {"decisions": {"joined": 6, "never_shown": 2, "in_open_session": 9}, "feedback": {"joined": 9, "unmatched": 1}}
        return {
            **self.status,
            "steps_closed": 100 * self.now_s,
            "refusals": refusals,
            "ledger": ledger,
            "label_delays": {"<=5": 3, ">1800": 1},
        }


def test_running_workers_are_asked_twice_for_their_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running()
    calls = {"ingest-0": "status", "ingest-1": "silent", "ingest-2": "slow", "replay-0": "stats"}
    handles = {
        name: SimpleNamespace(**{kind: SimpleNamespace(remote=call) for kind in ("status", "stats")}) for name, call in calls.items()
    }
    monkeypatch.setattr(actors, "connect", lambda _: True)
    monkeypatch.setattr(actors, "present", lambda names: {name: handles[name] for name in names if name in handles})
    monkeypatch.setattr(actors, "ask", running.ask)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: running.now_s, sleep=running.sleep))
    arguments = ["--set", "ingest.num_workers=3", "--set", "kafka.num_partitions=4", "--seconds", "0.1"]
    found = of(tmp_path, *arguments, "--json")
    assert [found["workers"][name]["steps_per_s"] for name in ("ingest-0", "ingest-2")] == pytest.approx([100, 100])
    assert found["workers"]["ingest-1"] == {
        "source": "does not answer",
        "steps_per_s": None,
    }
    join = found["join"]
    assert (join["never_shown_share"], join["unmatched_feedback_share"], join["late_feedback_share"]) == (0.25, 0.1, 0.0)
    assert join["refusals"] == {"decisions malformed": 2} and found["shards"]["replay-0"]["size"] == 5
    running.status["looked_ms"] = clock_ms() - 600_000
    text = of(tmp_path, *arguments)
    for part in (
        "live, 60",
        "does not answer",
        "decisions 2, feedback 0",
        "unmatched feedback 10.0 %; never shown 25.0 %",
        "2 decisions malformed",
        "replay-0: 5",
    ):
        assert part in text


def test_label_delays_are_those_of_first_rows() -> None:
    rows = [first("a", 0), first("b", 1_000), later(first("a", 0), next_id="b", ended=Ended.HAS_NEXT, reward=1.0)]
    counts = label_delays(rows_to_table(rows))
    assert tuple(counts) == DELAY_CLASSES and {name: n for name, n in counts.items() if n} == {"<=10": 2}
    assert sum(label_delays(rows_to_table([])).values()) == 0


def test_every_number_of_a_worker_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[dict[str, str]]] = {}
    amounts: dict[str, float] = {}

    class Telemetry:
        def count(self, name: str, amount: float = 1.0, **tags: str) -> None:
            told.setdefault(name, []).append(tags)
            amounts[name] = amount

        gauge = count

    monkeypatch.setattr("esrl_ray.cli.parts.Telemetry", Telemetry)
    running = Running()
    known = {**running.ask("status"), "committed_ms": T0, "watermarks_ms": {0: T0}}
    IngestMeter("ingest-0").read(known, now_ms=T0 + 63_000)
    for name, tags in told.items():
        declared = (COUNTERS | GAUGES)[name][1]
        assert all(set(found) == set(declared) for found in tags), name
    wanted = {"esrl_kafka_lag_events", "esrl_watermark_behind_seconds", "esrl_session_open_count", "esrl_step_closed_total"}
    wanted |= {"esrl_event_refused_total", "esrl_log_last_commit_seconds", "esrl_event_settled_total", "esrl_step_label_delay_total"}
    assert wanted <= set(told) and amounts["esrl_kafka_lag_age_seconds"] == 63.0


def test_before_the_first_event_and_commit_no_age_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, float] = {}
    telemetry = SimpleNamespace(count=lambda *_, **__: None, gauge=lambda name, value, **_: told.update({name: value}))
    monkeypatch.setattr("esrl_ray.cli.parts.Telemetry", lambda: telemetry)
    world, meter = World(), IngestMeter("ingest-0")
    meter.read(world.worker().status(), now_ms=T0)
    late = {"esrl_log_last_commit_seconds", "esrl_watermark_behind_seconds"}
    assert not late & set(told) and "esrl_session_open_count" in told, "they would be 50 years, and an alarm"
    world.write(decision("d", 0.0))
    worker = world.worker()
    for _ in range(20):
        worker.run_once()
    meter.read(worker.status(), now_ms=world.now_ms)
    assert late <= set(told) and max(told[name] for name in late) < 60


def test_imports_are_no_workers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "end_offsets", lambda _: {(topic, p): 10 for topic in ("decisions", "feedback") for p in (0, 1)})
    before = of(run_dir, "--address", "none", "--json")
    log, joiner = (
        StepLog(run_dir / "log" / SPEC.digest, "import-0", "one", SPEC),
        SessionJoiner(0, Config(spec=SPECIFIED.spec, reward=REWARD)),
    )
    joiner.push([(0, decision("old", 0.0))], [(0, feedback("old", "shown", 0.5))])
    rows = joiner.close(clock_ms=T0 + 10**10)
    positions = {"decisions/0": 1, "feedback/0": 1}
    state = WorkerState(commit=0, incarnation="one", positions=positions, joiners={0: [joiner.snapshot()]}, committed_ms=T0)
    log.commit(state, rows_to_table(rows))
    assert of(run_dir, "--address", "none", "--json") == before
