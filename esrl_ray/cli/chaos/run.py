"""One run: a load, faults while it is sent, the end of the data, and the comparison with the run without faults."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from kafka import KafkaConsumer, TopicPartition

from esrl_ray.cli.chaos.compare import Report, compare_steps, ids_of, problems_of, shard_differences
from esrl_ray.cli.chaos.faults import Fault, Faults
from esrl_ray.cli.chaos.fleet import Fleet
from esrl_ray.cli.chaos.load import Load
from esrl_ray.cli.chaos.producing import Producing
from esrl_ray.cli.chaos.reference import Ends, fault_free, read_topics
from esrl_ray.config import (
    Config,
    ExplorationConfig,
    IngestConfig,
    JoinConfig,
    KafkaConfig,
    LearnerConfig,
    LogConfig,
    ReplayConfig,
    RunConfig,
    SpecConfig,
)
from esrl_ray.errors import LoopError
from esrl_ray.reward import BehaviourConfig, RewardConfig, RewardGroup
from streaming.broker import DEAD_LETTER_SUFFIX, EmbeddedBroker, end_offsets, ensure_topics
from streaming.partitions import live_workers, rows_of_shard
from streaming.session_state import DECISIONS, FEEDBACK
from streaming.steplog import commit_history, read_commits, read_steps
from streaming.steptable import step_schema

BARRIER_S, DRAIN_S = 180.0, 120.0


def chaos_config(folder: Path, bootstrap_servers: str, *, capacity: int) -> Config:
    """The deployment that is tormented: 6 partitions over 2 workers, a shard for each, many small commits."""
    return Config(
        run=RunConfig(dir=str(folder)),
        spec=SpecConfig(user_features=("a",), item_features=("b", "c")),
        reward=RewardConfig(
            behaviours=(
                BehaviourConfig(name="click", combine="max"),
                BehaviourConfig(name="watch", combine="sum", cap=5.0),
                BehaviourConfig(name="rating", combine="last", cap=5.0),
            ),
            groups=(
                RewardGroup(name="use", expression="click + 0.5 * min(watch, 2)"),
                RewardGroup(name="taste", expression="2 * rating"),
            ),
        ),
        kafka=KafkaConfig(bootstrap_servers=bootstrap_servers, num_partitions=6),
        join=JoinConfig(dedup_s=60.0, max_ahead_s=30 * 86_400.0),
        ingest=IngestConfig(num_workers=2, commit_interval_s=0.3, max_poll_records=500, max_commit_mb=0.1),
        log=LogConfig(tidy_every=6, history_minutes=24 * 60),
        replay=ReplayConfig(num_shards=2, capacity=capacity, min_size=100),
        learner=LearnerConfig(batch_size=16, updates_per_call=2, hidden_sizes=(16,), checkpoint_interval_s=2.0),
        exploration=ExplorationConfig(warmup_steps=200, round_steps=1_000),
    )


def run_chaos(
    load: Load,
    faults: Sequence[Fault],
    broker: EmbeddedBroker,
    fleet: Fleet,
    *,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> Report:
    """Send a load while parts die; then compare what is left with the run without faults.

    Args:
        load: Generated for the fleet's configuration.
        faults: In order, spread over the time.
        broker: Of this run alone: it is killed.
        fleet: Not started yet.
        seconds: Of the load; longer when faults take longer.
        seed: Of victims and moments.
        say: Told about progress.

    Raises:
        EsrlError: the run did not come to its end.
    """
    config = fleet.config
    ensure_topics(config.kafka)
    producing = Producing(config.kafka, load, seconds=seconds, barrier=lambda ends: _wait_committed(fleet, ends))
    doing = Faults(fleet, broker, seed, say)
    producing.send_before()
    for name in (*fleet.shards, *fleet.workers, *fleet.others):
        fleet.start(name)
    began = time.monotonic()
    producing.start()
    for i, fault in enumerate(faults):
        producing.released = (i + 1) / (len(faults) + 1)
        while time.monotonic() < began + seconds * i / len(faults) and not producing.done.is_set():
            time.sleep(0.05)
        producing.check()
        doing.do(fault)
    producing.released = 1.0
    producing.done.wait()
    producing.check()
    producing.close()
    took_s = time.monotonic() - began
    say(f"the load is sent, {sum(doing.kills.values())} faults done in {took_s:.0f} s; reading to the end")
    ends = end_offsets(config.kafka)
    _wait_committed(fleet, ends)
    _wait_idle_partition(fleet, load)
    statuses = [_drain(fleet, name, ends) for name in fleet.workers]
    return _report(load, fleet, producing, doing, ends, statuses, seed=seed, took_s=took_s)


def _wait(what: str, true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise LoopError(f"{what} not within {timeout_s:.0f} s")
        time.sleep(0.1)


def _wait_committed(fleet: Fleet, ends: Ends) -> None:
    """Wait until every worker has committed up to these offsets, and all rows that are due: its status is as of its last commit."""

    def committed() -> bool:
        positions: dict[str, int] = {}
        for name in fleet.workers:
            status = fleet.status(name) or {}
            positions |= {} if status.get("is_behind") else status.get("positions", {})
        return all(positions.get(f"{topic}/{p}", 0) >= end for (topic, p), end in ends.items())

    _wait("the workers' commits reached the end", committed, BARRIER_S)


def _wait_idle_partition(fleet: Fleet, load: Load) -> None:
    """Wait until the clock has moved the idle partition's watermark past all that is in it."""

    def moved() -> bool:
        marks = [(fleet.status(name) or {}).get("watermarks_ms", {}).get(load.idle_partition, 0) for name in fleet.workers]
        return bool(max(marks) >= load.idle_from_ms)

    _wait("the watermark of the idle partition followed the clock", moved, BARRIER_S)


def _drain(fleet: Fleet, name: str, ends: Ends) -> dict[str, Any]:
    until = {f"{topic}/{p}": end for (topic, p), end in ends.items()}
    while True:
        try:
            status: dict[str, Any] = fleet.ask(name, "drain", until, DRAIN_S, timeout_s=2 * DRAIN_S)
            return status
        except ConnectionError:  # it died on the way: another one drains
            fleet.wait_dead(name, DRAIN_S)
            fleet.start(name)


def _report(
    load: Load,
    fleet: Fleet,
    producing: Producing,
    doing: Faults,
    ends: Ends,
    statuses: Sequence[dict[str, Any]],
    *,
    seed: int,
    took_s: float,
) -> Report:
    config, planned = fleet.config, load.count()
    root = config.log_root
    expected, expected_ledger, refused = fault_free(config, read_topics(config.kafka, ends), producing.barriers)
    logs = {name: [rows for _, rows in read_commits(root, name)] for name in live_workers(root)}
    steps = read_steps(root)
    difference = compare_steps(expected, steps, pa.concat_tables([step_schema().empty_table(), *(t for log in logs.values() for t in log)]))
    ledger: dict[str, Counter[str]] = {DECISIONS: Counter(), FEEDBACK: Counter()}
    for status in statuses:
        for topic, buckets in status["ledger"].items():
            ledger[topic].update(buckets)
    letters = _dead_letters(config.kafka)
    shards = {}
    for i, shard in enumerate(fleet.shards):
        own = {name: ids_of(rows_of_shard(rows, i, len(fleet.shards)) for rows in log) for name, log in logs.items()}
        contents = fleet.ask(shard, "contents", [step_id for ids in own.values() for step_id in ids], timeout_s=DRAIN_S)
        lineage = {name: len(log) - 1 for name, log in logs.items()}
        shards[shard] = shard_differences(contents, own, steps, lineage, capacity=config.replay.capacity)
    in_topics: Counter[str] = Counter()
    for (topic, _), end in ends.items():
        in_topics[DECISIONS if topic == config.kafka.decisions_topic else FEEDBACK] += end
    problems = problems_of(
        steps=difference,
        ledger=ledger,
        expected=expected_ledger,
        planned=planned,
        in_topics=in_topics,
        refused=refused,
        letters=letters,
        shards=shards,
        not_reached=doing.not_reached,
    )
    return Report(
        seed=seed,
        seconds=round(took_s, 1),
        records=dict(planned),
        kills=dict(doing.kills),
        not_reached=doing.not_reached,
        recovery_s=_recovery(root, doing),
        steps=difference,
        ledger={topic: dict(buckets) for topic, buckets in ledger.items()},
        ledger_without_faults=expected_ledger,
        dead_letters={"sent": planned["poison"], "unique": len(letters), "copies": letters.total() - len(letters)},
        zombies=doing.zombies,
        shards=shards,
        problems=problems,
    )


def _recovery(root: str, doing: Faults) -> dict[str, float]:
    """Longest time until each kind of part was back: workers by their next commit, others by their answer."""
    waits = dict(doing.answers_s)
    history = {worker: commit_history(root, worker) for worker in {worker for worker, _ in doing.deaths}}
    for worker, died_ms in doing.deaths:
        after = [info.committed_ms for info in history[worker] if info.committed_ms > died_ms]
        if after:
            waits["ingest"] = max(waits.get("ingest", 0.0), (min(after) - died_ms) / 1000)
    return {part: round(seconds, 1) for part, seconds in waits.items()}


def _dead_letters(config: KafkaConfig) -> Counter[tuple[str, int, int]]:
    """(topic, partition, offset) of the refused record -> how often it stands in the dead-letter topics."""
    letters: Counter[tuple[str, int, int]] = Counter()
    names = {topic + DEAD_LETTER_SUFFIX for topic in (config.decisions_topic, config.feedback_topic)}
    consumer = KafkaConsumer(bootstrap_servers=config.bootstrap_servers, metrics_enabled=False)
    try:
        ends = consumer.end_offsets([TopicPartition(name, 0) for name in names])
    finally:
        consumer.close()
    for records in read_topics(config, {(tp.topic, tp.partition): end for tp, end in ends.items()}).values():
        for record in records:
            topic, partition, offset = (record.key or b"").decode().rsplit("/", 2)
            letters[topic, int(partition), int(offset)] += 1
    return letters
