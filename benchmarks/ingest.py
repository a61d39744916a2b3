"""From a real broker to rows in the replay: events per second of one worker, beside three others on the same topics. `make bench-ingest`

Every run is a process of its own and reads the same records; runs take turns, so that ratios mean something on a machine that others
use too. Times are of the processor, all threads of the process; the broker is another process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.ingest_events import EVENTS_PER_S, FEEDBACK_PER_DECISION, LISTED, PAIRS, Written, deployment, write_events
from benchmarks.ingest_runs import Task
from benchmarks.rows import RESULTS, ROOT, commit
from benchmarks.timing import Table
from esrl_ray.config import KafkaConfig
from streaming.broker import EmbeddedBroker, ensure_topics

MACHINE = "2 cores x86_64, shared"
BARE, OURS, DICTS, QUIX = "kafka-python, poll and decode only", "ingest worker, to the replay", "json and dicts, join only", "quix-streams"
LATE_STAGES = ("join", "state", "rows to table", "commit", "insert")
STAGES = ("poll", "decode", *LATE_STAGES)
TARGET_PER_S, TARGET_SHARE = 50_000, 0.5

Result = dict[str, Any]


class Case(NamedTuple):
    """One pair of topics."""

    num_features: int
    decisions: str
    feedback: str
    runs: tuple[str, ...]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.num_features} floats a pair, decisions {self.decisions}, feedback {self.feedback}"


def measure(run: str, task: Task, quix: Path | None) -> Result:
    """One run in a process of its own."""
    if run == QUIX:
        kafka = task.kafka
        topics = kafka["decisions_topic"], kafka["feedback_topic"]
        command = [str(quix), "-m", "benchmarks.ingest_quix", kafka["bootstrap_servers"], *topics, str(task.num_events)]
    else:
        name = {BARE: "bare", OURS: "ours", DICTS: "dicts"}[run]
        command = [sys.executable, "-m", "benchmarks.ingest_runs", name, msgspec.json.encode(task).decode()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{run} failed: {done.stderr[-2000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def install_quix(folder: Path) -> Path:
    """An environment with quix-streams and nothing of ours; the path of its Python."""
    uv = ROOT / ".venv" / "uv" / "bin" / "uv"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "quixstreams", "python-snappy"], check=True)
    return python


def fill(servers: str, case: Case, num_events: int) -> tuple[Task, Written]:
    """Two fresh topics with about `num_events` events, the newest of them some minutes old."""
    suffix = uuid.uuid4().hex[:8]
    kafka = KafkaConfig(bootstrap_servers=servers, decisions_topic=f"decisions-{suffix}", feedback_topic=f"feedback-{suffix}")
    ensure_topics(kafka)
    count = max(100, num_events // (1 + FEEDBACK_PER_DECISION))
    start_ms = time.time_ns() // 1_000_000 - round(num_events / EVENTS_PER_S * 1000) - 600_000
    written = write_events(
        deployment(case.num_features, kafka), count, start_ms,
        json_decisions=case.decisions == "json", json_feedback=case.feedback == "json",
    )  # fmt: skip
    fields = {name: getattr(kafka, name) for name in ("bootstrap_servers", "decisions_topic", "feedback_topic")}
    return Task(fields, case.num_features, written.num_events, case.decisions, case.feedback), written


def us(result: Result, seconds: float | None = None) -> float:
    """Microseconds per event."""
    return 1e6 * float(result["cpu_s"] if seconds is None else seconds) / float(result["events"])


def middle(results: Sequence[Result], value: str) -> float:
    """Median over repetitions, per event."""
    return statistics.median(1e6 * float(result[value]) / float(result["events"]) for result in results)


def comparison(case: Case, task: Task, written: Written, *, rounds: int, quix: Path | None) -> tuple[Table, Table]:
    """All runs of one case in turns: what an event costs, and where ours spends it."""
    results: dict[str, list[Result]] = defaultdict(list)
    runs = [run for run in case.runs if run != QUIX or quix is not None]
    for _ in range(rounds):
        for run in runs:
            results[run].append(measure(run, task, quix))
    share = written.num_feedback / written.num_events
    rows = []
    for run in runs:
        cpu, wall = middle(results[run], "cpu_s"), middle(results[run], "wall_s")
        ratio = statistics.median(us(mine) / us(base) for mine, base in zip(results[run], results[BARE], strict=True))
        steps = results[run][0].get("steps", "-")
        rows.append((run, f"{cpu:.1f}", f"{share * 1e6 / cpu:,.0f}", f"{share * 1e6 / wall:,.0f}", f"{ratio:.2f}", f"{steps}"))
    columns = ("run", "us of processor an event", "feedback/s a core", "feedback/s as it ran", "ratio to the bare loop", "steps")
    counts = f"{written.num_decisions:,} decisions, {written.num_feedback:,} feedback; {rounds} rounds, medians."
    reached = share * 1e6 / middle(results[OURS], "cpu_s")
    verdict = f"Target {'met' if reached >= TARGET_PER_S else 'not met'}: {reached:,.0f} feedback/s a core through the ingest worker."
    table = Table(case.name, f">= {TARGET_PER_S:,} feedback/s a core", columns, rows, [counts, verdict])
    return table, breakdown(case, results)


def breakdown(case: Case, results: Mapping[str, Sequence[Result]]) -> Table:
    """Where the ingest worker spends its time, beside the bare loop of the same round."""
    mine, bare = results[OURS], results[BARE]
    base = statistics.median(map(us, bare))

    def median(*stages: str) -> float:
        return statistics.median(us(result, sum(result["stages"].get(stage, 0.0) for stage in stages)) for result in mine)

    rows = [(stage, f"{median(stage):.2f}", f"{median(stage) / base:.0%}") for stage in STAGES]
    known = [us(result) - us(result, sum(result["stages"].values())) for result in mine]
    rows.append(("everything else", f"{statistics.median(known):.2f}", f"{statistics.median(known) / base:.0%}"))
    late = statistics.median(
        us(one, sum(one["stages"].get(stage, 0.0) for stage in LATE_STAGES)) / us(two) for one, two in zip(mine, bare, strict=True)
    )
    rows.append(("join to insert", f"{median(*LATE_STAGES):.2f}", f"{late:.0%}"))
    verdict = f"Target {'met' if late < TARGET_SHARE else 'not met'}: {late:.0%} of the bare loop's {base:.1f} us."
    title, target = f"Stages: {case.name}", f"join to insert < {TARGET_SHARE:.0%} of the bare poll and decode"
    return Table(title, target, ("stage", "us an event", "of the bare loop"), rows, [verdict])


def long_run(servers: str, num_events: int) -> Table:
    """Cost and memory as events pass by."""
    case = Case(16, "msgpack", "json", (OURS,))
    task, written = fill(servers, case, num_events)
    marks = measure(OURS, task, None)["marks"]
    rows, before = [], {"events": 0, "cpu_s": 0.0}
    for mark in marks:
        cost = (mark["cpu_s"] - before["cpu_s"]) / (mark["events"] - before["events"]) * 1e6
        rows.append((f"{mark['events']:,.0f}", f"{cost:.1f}", f"{mark['rss_bytes'] / 1e6:.0f}"))
        before = mark
    capacity = deployment(case.num_features).replay.capacity
    note = (
        f"{written.num_events:,} events over {written.num_events / EVENTS_PER_S:.0f} s of event time; ids are remembered for 120 s of it. "
        f"The replay has all its memory once its {capacity:,} steps are filled, after {capacity * (1 + FEEDBACK_PER_DECISION):,} events."
    )
    return Table("A long run: " + case.name, "flat", ("events read", "us an event since the line above", "RSS [MB]"), rows, [note])


def run(*, num_events: int, long: int, rounds: int, quix: Path | None) -> list[Table]:
    """All tables, printed as they are made."""
    cases = (
        (Case(16, "msgpack", "json", (BARE, OURS)), num_events),
        (Case(16, "msgpack", "msgpack", (BARE, OURS)), num_events),
        (Case(16, "json", "json", (BARE, OURS, DICTS, QUIX)), num_events),
        (Case(600, "msgpack", "json", (BARE, OURS)), num_events // 4),
        (Case(600, "msgpack", "msgpack", (BARE, OURS)), num_events // 4),
        (Case(600, "json", "json", (BARE, OURS, DICTS, QUIX)), num_events // 10),
    )
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker.start(Path(folder)) as broker:
        for case, count in cases:
            task, written = fill(broker.bootstrap_servers, case, count)
            for table in comparison(case, task, written, rounds=rounds, quix=quix):
                tables.append(table)
                print(table.markdown(), "\n", flush=True)
        if long:
            tables.append(long_run(broker.bootstrap_servers, long))
            print(tables[-1].markdown(), flush=True)
    return tables


def main() -> None:
    """Write benchmarks/results/ingest.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000, help="of the comparisons; fewer where a pair has 600 floats")
    parser.add_argument("--long", type=int, default=1_000_000, help="events of the long run; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quix", type=Path, metavar="FOLDER", help="also quix-streams, installed into this environment of its own")
    parser.add_argument("--machine", default=MACHINE)
    parser.add_argument("--out", type=Path, default=RESULTS / "ingest.md")
    arguments = parser.parse_args()
    quix = None if arguments.quix is None else install_quix(arguments.quix.absolute())
    tables = run(num_events=arguments.events, long=arguments.long, rounds=arguments.rounds, quix=quix)
    head = (
        f"Commit {commit()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {arguments.machine}. Made by `make bench-ingest`. Each run is "
        "a process of its own that reads the same topics of an embedded broker; runs take turns.\n\n"
        f"Lists have {LISTED} shown and {PAIRS - LISTED} unshown pairs, one decision to {FEEDBACK_PER_DECISION} feedback; there are "
        f"{EVENTS_PER_S:,} events a second of event time, read as fast as it goes. The ingest worker commits to a step log on the local "
        "disk every 2 s and inserts into a `ReplayBuffer` in its own process. The two peers join in memory and drop the result: no log, no "
        "insert, no restart. Where the time goes, and why targets are missed: docs/operations.md."
    )
    arguments.out.write_text("\n\n".join(["# Speed of ingestion", head, *(table.markdown() for table in tables)]) + "\n")


if __name__ == "__main__":
    main()
