"""An ingest worker's state: bytes of a commit, and time of a restart, by open sessions. `make bench-state`

Sessions of ten lists, one list each 100 s, eight feedback to a list within 16 s: 100,000 open sessions are 1,000 decisions and 8,000
feedback a second. A commit every 2 s of event time. Beside it, on the same joins, the way before: the whole state at each commit, with
the arrays of the lists that have no row.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
import uuid
from collections import defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from kafka import KafkaProducer

from benchmarks.ingest_events import FEEDBACK_PER_DECISION, LISTED, PAIRS, deployment
from benchmarks.rows import RESULTS, commit
from benchmarks.timing import Table
from esrl_ray.cli.parts import tune_process
from esrl_ray.config import Config, KafkaConfig
from esrl_ray.spec import Spec
from streaming.broker import EmbeddedBroker, ensure_topics
from streaming.client import connect
from streaming.deadletter import DeadLetters
from streaming.session_state import Bulk
from streaming.sessions import SessionJoiner
from streaming.source import Source, place_of
from streaming.steplog import StepLog, WorkerState, rows_to_table
from streaming.wire import MSGPACK, SCHEMA_VERSION, Decision, DecodedDecision, Feedback, encode
from streaming.worker import IngestWorker

STEP_S, LIST_EVERY_S, LISTS = 2, 100, 10
WARM_STEPS, MEASURED_STEPS, OLD_COMMITS = 100, 60, 2
LABEL_AGE_S, LATENESS_S, GAP_S = 30, 5, 300
TARGET_S = 30.0
COLUMNS = (
    "open sessions", "floats a pair", "way", "bytes a commit, mean", "largest", "s a commit without rows, mean", "largest",
    "lists read again", "restart: until it polls [s]", "until the first new commit [s]",
)  # fmt: skip


class Traffic:
    """What arrives in each step of two seconds; (offset, event) by partition."""

    def __init__(self, config: Config, num_sessions: int, start_ms: int) -> None:
        self._spec, self._partitions, self._start_ms = config.spec.build(), config.kafka.num_partitions, start_ms
        self._num_sessions, self._per_step = num_sessions, num_sessions * STEP_S // LIST_EVERY_S
        self._recent: deque[list[Decision]] = deque(maxlen=FEEDBACK_PER_DECISION)
        self._counts = [0] * self._partitions
        rng = np.random.default_rng(0)
        widths = (self._spec.num_features, self._spec.num_scores, self._spec.num_actions, 1)
        self._arrays = [rng.normal(size=(PAIRS, width)).astype("<f4") for width in widths]
        self._bytes = [array.tobytes() for array in self._arrays]

    def step(self, number: int) -> tuple[dict[int, list[tuple[int, DecodedDecision]]], dict[int, list[tuple[int, Feedback]]]]:
        """The events of one step, each topic's in order."""
        decisions: dict[int, list[tuple[int, DecodedDecision]]] = defaultdict(list)
        feedback: dict[int, list[tuple[int, Feedback]]] = defaultdict(list)
        made = [self._decision(number, i) for i in range(self._per_step)]
        states, scores, actions, fused = self._arrays
        for event in made:
            partition = place_of(event.session_id, self._partitions)[1]
            decoded = DecodedDecision(event, states, np.zeros((PAIRS, 0), np.int32), scores, actions, actions, fused[:, 0])
            decisions[partition].append((self._counts[partition], decoded))
            self._counts[partition] += 1
        self._recent.appendleft(made)
        for j, shown in enumerate(self._recent):
            for event in shown:
                feedback[place_of(event.session_id, self._partitions)[1]].append((0, self._feedback(event, number, j)))
        return decisions, feedback

    def _decision(self, number: int, i: int) -> Decision:
        count = number * self._per_step + i
        turn, visit = count % self._num_sessions, count // self._num_sessions
        states, scores, actions, fused = self._bytes
        return Decision(
            schema_version=SCHEMA_VERSION,
            decision_id=f"{count:032x}",
            request_id=f"r{count}",
            session_id=f"session-{turn:08d}-{(visit + turn) // LISTS:04d}",
            user_id=f"user-{turn:08d}",
            event_time_ms=self._start_ms + number * STEP_S * 1000 + i * STEP_S * 1000 // self._per_step,
            policy_version=1,
            round=0,
            arm="explore",
            spec_digest=self._spec.digest,
            num_candidates=50,
            item_ids=[f"item-{(count * 31 + j * 7919) % 100_000:06d}" for j in range(PAIRS)],
            positions=[j if j < LISTED else -1 for j in range(PAIRS)],
            states=states,
            categorical=b"",
            scores=scores,
            actions=actions,
            anchor_actions=actions,
            fused_scores=fused,
        )

    def _feedback(self, decision: Decision, number: int, j: int) -> Feedback:
        time_ms = decision.event_time_ms + j * STEP_S * 1000 + 100
        return Feedback(
            schema_version=SCHEMA_VERSION,
            event_id=f"f{decision.decision_id[9:]}{j:08x}",
            decision_id=decision.decision_id,
            session_id=decision.session_id,
            behaviour="shown" if j == 0 else "click" if j % 2 else "watch_s",
            event_time_ms=min(time_ms, self._start_ms + (number + 1) * STEP_S * 1000 - 1),
            item_id=None if j == 0 else decision.item_ids[j % LISTED],
        )


class Deployment:
    """One worker's joins, its step log, and what the topics hold for its restart."""

    def __init__(self, servers: str, folder: Path, num_sessions: int, num_features: int) -> None:
        suffix = uuid.uuid4().hex[:8]
        kafka = KafkaConfig(bootstrap_servers=servers, decisions_topic=f"decisions-{suffix}", feedback_topic=f"feedback-{suffix}")
        ensure_topics(kafka)
        config = deployment(num_features, kafka)
        join = {"label_age_s": LABEL_AGE_S, "lateness_s": LATENESS_S, "gap_s": GAP_S, "max_open_sessions": 10**6}
        self.config = config.model_copy(update={"join": config.join.model_copy(update=join)})
        self.spec: Spec = config.spec.build()
        self.folder, self.partitions = folder, range(kafka.num_partitions)
        self.steps = WARM_STEPS + MEASURED_STEPS
        start_ms = time.time_ns() // 1_000_000 - self.steps * STEP_S * 1000
        self.traffic = Traffic(self.config, num_sessions, start_ms)
        self.joiners = {p: SessionJoiner(p, self.config) for p in self.partitions}
        self.producer: KafkaProducer = connect(
            KafkaProducer, kafka, linger_ms=20, batch_size=2**20, compression_type="lz4", max_request_size=2**23,
            metrics_enabled=False,
        )  # fmt: skip
        self.first: dict[int, int] = {}  # offset of the first decision that the topic holds, by partition
        self.positions: dict[str, int] = {}

    def advance(self, number: int) -> int:
        """Read one step; the number of rows that it makes. The end of the topic is written, as far as a restart may want it again."""
        decisions, feedback = self.traffic.step(number)
        tail = number >= self.steps - (LABEL_AGE_S + 2 * LATENESS_S) // STEP_S
        num_rows = 0
        for p, joiner in self.joiners.items():
            if tail and decisions[p]:
                self.first.setdefault(p, decisions[p][0][0])
                self.write(self.config.kafka.decisions_topic, p, [decoded.event for _, decoded in decisions[p]])
            first = self.first.get(p)
            joiner.push([(-1 if first is None else offset - first, decoded) for offset, decoded in decisions[p]], feedback[p])
            num_rows += len(joiner.advance(clock_ms=0, decisions_at_end=False, feedback_at_end=False))
            if first is not None and decisions[p]:
                self.positions[f"{self.config.kafka.decisions_topic}/{p}"] = decisions[p][-1][0] + 1 - first
        return num_rows

    def write(self, topic: str, partition: int, events: list[Any]) -> None:
        """Events into their partition."""
        for event in events:
            headers = [("content-type", MSGPACK)]
            self.producer.send(topic, value=encode(event), key=event.session_id.encode(), partition=partition, headers=headers)

    def write_next_step(self) -> None:
        """What has come since the worker died."""
        decisions, feedback = self.traffic.step(self.steps)
        for p in self.partitions:
            self.write(self.config.kafka.decisions_topic, p, [decoded.event for _, decoded in decisions[p]])
            self.write(self.config.kafka.feedback_topic, p, [event for _, event in feedback[p]])
        self.producer.flush(timeout=300.0)

    def state(self, n: int, joiners: dict[int, list[bytes]], base: int | None, incarnation: str) -> WorkerState:
        """As a worker writes it."""
        reward = self.config.reward.canonical
        return WorkerState(
            commit=n, incarnation=incarnation, positions=self.positions, joiners=joiners, committed_ms=n, reward=reward, builds_on=base
        )  # fmt: skip


def in_chains(made: Deployment) -> tuple[str, ...]:
    """Commits as they are now, then a restart of a real worker on the real topics."""
    log = StepLog(made.folder / "log", "ingest-0", "one", made.spec)
    empty, sizes, seconds = rows_to_table([]), list[int](), list[float]()
    for number in range(made.steps):
        made.advance(number)
        began, base = time.perf_counter(), log.base
        joiners = {p: [joiner.snapshot(whole=base is None)] for p, joiner in made.joiners.items()}
        log.commit(made.state(number, joiners, base, "one"), empty)
        if number >= WARM_STEPS:
            sizes.append(sum(len(part) for parts in joiners.values() for part in parts))
            seconds.append(time.perf_counter() - began)
    made.write_next_step()
    made.producer.close()
    # In a process of its own, without the joins of this one, which its collector would walk.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        lacking, ready, whole = pool.submit(restart, made.config, made.folder / "log", made.steps).result()
    return (*figures(sizes, seconds), f"{lacking:,}", f"{ready:.1f}", f"{whole:.1f}")


def restart(config: Config, folder: Path, num_commits: int) -> tuple[int, float, float]:
    """A real worker on the real topics: lists that it lacks, seconds until it polls, and until its first commit."""
    tune_process()  # as the process of an ingest worker does
    began, partitions = time.perf_counter(), range(config.kafka.num_partitions)
    worker = IngestWorker(
        config,
        "ingest-0",
        partitions,
        log=StepLog(folder, "ingest-0", "two", config.spec.build()),
        source_factory=lambda positions: Source(config.kafka, partitions, positions, max_poll_records=config.ingest.max_poll_records),
        dead_letters=DeadLetters(config.kafka),
        publish=[],
        clock_ms=lambda: time.time_ns() // 1_000_000,
    )
    lacking, ready = sum(len(joiner.lacking) for joiner in worker._joiners.values()), time.perf_counter() - began
    while worker.status()["commit"] < num_commits:
        worker.run_once()
    return lacking, ready, time.perf_counter() - began


def whole_with_arrays(made: Deployment) -> tuple[str, ...]:
    """The same joins as they were stored before: everything, at each commit; and what a restart did with it."""

    def content() -> dict[int, list[bytes]]:
        return {
            p: [joiner.snapshot(), msgspec.msgpack.encode([as_bytes(bulk) for bulk in joiner._bulks.values()])]
            for p, joiner in made.joiners.items()
        }

    log = StepLog(made.folder / "before", "ingest-0", "one", made.spec)
    empty, sizes, seconds = rows_to_table([]), list[int](), list[float]()
    for n in range(OLD_COMMITS):
        began = time.perf_counter()
        joiners = content()
        log.commit(made.state(n, joiners, None, "one"), empty)
        sizes.append(sum(len(part) for parts in joiners.values() for part in parts))
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    stored = StepLog(made.folder / "before", "ingest-0", "two", made.spec).restore()
    assert stored is not None
    for p, (state, arrays) in stored.joiners.items():
        SessionJoiner(p, made.config, state=[state])
        msgspec.msgpack.decode(arrays)
    ready = time.perf_counter() - began
    return (*figures(sizes, seconds), "0", f"{ready:.1f}", f"{ready + seconds[-1]:.1f} + 2 s of reading")


def as_bytes(bulk: Bulk) -> list[bytes]:
    """Its arrays."""
    return [value.tobytes() for value in bulk.values() if isinstance(value, np.ndarray)]


def figures(sizes: list[int], seconds: list[float]) -> tuple[str, ...]:
    """Of the commits of one way."""
    mean_s, most_s = statistics.mean(seconds), max(seconds)
    return f"{statistics.mean(sizes) / 1e6:.2f} MB", f"{max(sizes) / 1e6:.2f} MB", f"{mean_s:.2f}", f"{most_s:.2f}"


def measure(servers: str, num_sessions: int, num_features: int) -> list[tuple[str, ...]]:
    """Both ways on one case."""
    with tempfile.TemporaryDirectory() as folder:
        made = Deployment(servers, Path(folder), num_sessions, num_features)
        now = in_chains(made)
        num_open = f"{sum(joiner.num_open_sessions for joiner in made.joiners.values()):,}"
        before = whole_with_arrays(made)
    return [(num_open, str(num_features), way, *row) for way, row in (("before: whole, with arrays", before), ("now", now))]


def main() -> None:
    """Write benchmarks/results/state.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--floats", type=int, nargs="+", default=[16, 600], help="features of a pair")
    parser.add_argument("--machine", default="2 cores x86_64, shared")
    parser.add_argument("--out", type=Path, default=RESULTS / "state.md")
    arguments = parser.parse_args()
    tune_process()  # as the process of an ingest worker does
    rows: list[tuple[str, ...]] = []
    for num_sessions in arguments.sessions:
        for num_features in arguments.floats:
            with tempfile.TemporaryDirectory() as folder, EmbeddedBroker.start(Path(folder)) as broker:
                rows += measure(broker.bootstrap_servers, num_sessions, num_features)
                print(*rows[-2:], sep="\n", flush=True)
    assert __doc__ is not None
    notes = [
        f"Label age {LABEL_AGE_S} s, lateness {LATENESS_S} s, gap {GAP_S} s, ids remembered for {deployment(16).join.dedup_s:.0f} s; "
        f"{PAIRS} pairs a list, 4 partitions. {MEASURED_STEPS} commits after {WARM_STEPS} that do not count, state files fsynced on the "
        "local disk; rows are left out. A restart is a real worker on a real broker: it reads its state, the lists without a row, and what "
        "came in 2 s, and commits with its rows; the worker's 2 s to its first commit are in it. "
        "By then the label age of nearly all these lists has passed, as after half a minute's outage, so the first commits write their "
        "rows too, `ingest.max_commit_mb` at a time."
    ]
    restarts = [f"{row[-1]} s with {row[1]} floats a pair" for row in rows if row[2] == "now" and int(row[0].replace(",", "")) >= 100_000]
    if restarts:
        met = all(float(restart.split()[0]) <= TARGET_S for restart in restarts)
        notes.append(f"Target {'met' if met else 'not met'}: {', '.join(restarts)}.")
    table = Table("State", f"restart to the first new commit within {TARGET_S:.0f} s at 100,000 open sessions", COLUMNS, rows, notes)
    head = f"Commit {commit()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {arguments.machine}. Made by `make bench-state`."
    arguments.out.write_text("\n\n".join(["# Small state", head, " ".join(__doc__.split("\n\n", 1)[1].split()), table.markdown()]) + "\n")


if __name__ == "__main__":
    main()
