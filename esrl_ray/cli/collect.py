"""From readings of the running parts and the step log to the report: the only place that knows every part's status."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.live import LiveStatus
from esrl_ray.config import Config
from esrl_ray.evaluation.arms import arm_curve, arm_rewards, session_rewards
from esrl_ray.evaluation.frozen import evaluate_frozen
from esrl_ray.evaluation.report import (
    Details,
    Frozen,
    FrozenPoint,
    Gauc,
    Histogram,
    Interval,
    LearnerCounts,
    Ledger,
    LossPoint,
    Percentiles,
    Report,
    StepCounts,
)
from esrl_ray.evaluation.waterfall import StepTimes, drawable_steps, step_times
from esrl_ray.evaluation.weights import weights_by_segment, weights_by_version
from esrl_ray.policy.policy import Manifest, Policy
from esrl_ray.policy.store import CONTROL_VERSION, version_folder
from esrl_ray.vocabulary import Bucket
from streaming.steplog import list_workers, read_commits, read_steps

ARM_MARGIN_S = 60.0
"""Sessions that started later than this before the end are left out of the arms' rewards: they had no time to finish."""
RATE_MS = 10_000
"""The live view's rates are over the last ones: events are counted at commits, some seconds apart."""
PACKAGES = ("ray", "torch", "kafka-python", "deltalake", "numpy")


@dataclass(frozen=True, slots=True)
class Glance:
    """What the live view takes from the step log, now and then."""

    arms: Mapping[str, Interval] = field(default_factory=dict)
    label_delay_s: float | None = None  # median
    loop_delay_s: float | None = None  # median


@dataclass
class Readings:
    """What was seen of the running parts."""

    config: Config
    started_ms: int
    first_decision_ms: int = 0
    stop_ms: int = 0
    seconds_to_first_decision: float = 0.0
    peak_rss_bytes: int = 0
    last: dict[str, Any] = field(default_factory=dict)  # part -> its last status
    losses: list[LossPoint] = field(default_factory=list)
    inserted_ms: dict[tuple[str, str, int], tuple[int, int]] = field(default_factory=dict)  # by (shard, worker, commit)
    end_offsets: dict[str, int] = field(default_factory=dict)  # "topic/partition" -> end offset after the traffic stopped
    manifests: list[Manifest] = field(default_factory=list)
    published_ms: dict[int, int] = field(default_factory=dict)  # version -> when the store first offered it
    replicas: list[dict[str, Any]] = field(default_factory=list)  # what each replica did, after it ended
    _counts: list[tuple[int, int, int]] = field(default_factory=list)  # (clock, requests, events) of the last RATE_MS

    def add(self, statuses: Mapping[str, Any]) -> None:
        """Take one reading of some parts."""
        self.last.update({name: status for name, status in statuses.items() if status is not None})
        for name, status in statuses.items():
            if name.startswith("replay-") and status is not None:
                for worker, commit, committed, inserted in status["inserted_ms"]:
                    # A restarted shard refills and would report later times: what was seen first counts.
                    self.inserted_ms.setdefault((name, worker, commit), (committed, inserted))
        learner = statuses.get("learner")
        if learner and learner["gradient_steps"] and (not self.losses or learner["gradient_steps"] > self.losses[-1].gradient_steps):
            self.losses.append(
                LossPoint(
                    at_s=(clock_ms() - (self.first_decision_ms or self.started_ms)) / 1e3,
                    gradient_steps=learner["gradient_steps"],
                    critic=learner["critic_loss"],
                    actor=learner["actor_loss"],
                    outside_share=learner["outside_share"],
                )
            )

    def frozen(self, *, manifests: list[Manifest], published_ms: Mapping[int, int], stop_ms: int) -> Readings:
        """As they are now, for another thread."""
        own = replace(self, last=dict(self.last), inserted_ms=dict(self.inserted_ms), losses=list(self.losses))
        return replace(own, manifests=manifests, published_ms=dict(published_ms), stop_ms=stop_ms)

    def of(self, prefix: str) -> list[dict[str, Any]]:
        """Last statuses of the parts whose name begins so."""
        return [status for name, status in sorted(self.last.items()) if name.startswith(prefix)]

    @property
    def replay_size(self) -> int:
        """Steps in all shards."""
        return sum(status["size"] for status in self.of("replay-"))

    @property
    def ledger(self) -> Ledger:
        """Every acknowledged event in one bucket, as far as the last readings know."""
        settled: dict[tuple[str, Bucket], int] = {}
        positions: dict[str, int] = {}
        for worker in self.of("ingest-"):
            positions |= worker["positions"]
            for topic, buckets in worker["ledger"].items():
                for bucket, amount in buckets.items():
                    key = (topic, Bucket(bucket))
                    settled[key] = settled.get(key, 0) + amount
        produced: dict[str, int] = {}
        names = {self.config.kafka.decisions_topic: "decisions", self.config.kafka.feedback_topic: "feedback"}
        for where, end in self.end_offsets.items():
            topic = names[where.rsplit("/", 1)[0]]
            produced[topic] = produced.get(topic, 0) + end
            unread = (topic, Bucket.NOT_YET_READ)
            settled[unread] = settled.get(unread, 0) + end - positions.get(where, 0)
        return Ledger.of(settled, produced)

    def live(self, glance: Glance, *, seconds_left: float) -> LiveStatus:
        """What the live view shows."""
        now = clock_ms()
        traffic, learner = self.last.get("traffic", {}), self.last.get("learner", {})
        ingest = self.of("ingest-")
        seconds = max((now - self.first_decision_ms) / 1e3, 1e-3)
        requests = int(traffic.get("requests", 0))
        events = sum(sum(sum(b.values()) for b in worker["ledger"].values()) for worker in ingest)
        self._counts.append((now, requests, events))
        while len(self._counts) > 2 and now - self._counts[1][0] >= RATE_MS:
            del self._counts[0]
        then, old_requests, old_events = self._counts[0]
        rate = 1e3 / max(now - then, 1)
        return LiveStatus(
            seconds=seconds,
            seconds_left=seconds_left,
            requests=requests,
            requests_failed=int(traffic.get("requests_failed", 0)),
            requests_per_s=(requests - old_requests) * rate,
            latency_p99_ms=traffic.get("latency_p99_ms"),
            events_per_s=(events - old_events) * rate,
            lag_events=sum(sum(worker["lag"].values()) for worker in ingest),
            sessions=int(traffic.get("sessions_running", 0)),
            steps_closed=sum(worker["steps_closed"] for worker in ingest),
            replay_size=self.replay_size,
            replay_capacity=self.config.replay.capacity * self.config.replay.num_shards,
            gradient_steps=int(learner.get("gradient_steps", 0)),
            gradient_steps_per_s=float(learner.get("steps_per_s", 0.0)),
            critic_loss=learner.get("critic_loss"),
            round=int(learner.get("round", 0)),
            published_version=int(learner.get("version", 0)),
            served_version=max((v for r in traffic.get("served", {}).values() for v in r), default=0),
            label_delay_s=glance.label_delay_s,
            loop_delay_s=glance.loop_delay_s,
            arms=glance.arms,
        )


def served_by_all(served: Mapping[str, Mapping[int, int]]) -> dict[int, float]:
    """When every replica had served a version or a later one.

    Args:
        served: {replica: {version: first time, epoch ms}} as the traffic saw it. A replica that served only part of the run counts for
            the versions of its time.
    """
    versions = sorted({v for seen in served.values() for v in seen})
    times = {}
    for version in versions:
        moments = [min((at for v, at in seen.items() if v >= version), default=float("inf")) for seen in served.values()]
        alive = [m for m in moments if m != float("inf")]  # a replica that was killed never gets there
        times[version] = float(max(alive))
    return times


def steps_in_loop(config: Config, readings: Readings, served: Mapping[int, float]) -> StepTimes:
    """Every step's way through the loop, from the log and the readings."""
    root = config.log_root
    tables = [
        drawable_steps(worker, read_commits(root, worker), sample_without_next=config.replay.sample_without_next)
        for worker in list_workers(root)
    ]
    inserted: dict[tuple[str, int], tuple[float, float]] = {}
    for (_, worker, commit), times in readings.inserted_ms.items():  # in the replay once every shard has its rows
        inserted[worker, commit] = max(inserted.get((worker, commit), (0.0, 0.0)), times, key=lambda both: both[1])
    trained = [m for m in readings.manifests if m.gradient_steps > 0]
    first_trained_ms = min((m.learnt_ms for m in trained), default=readings.stop_ms)
    return step_times(
        pa.concat_tables(tables),
        commits=inserted,
        manifests=trained,
        published_ms={v: float(at) for v, at in readings.published_ms.items()},
        served_ms=served,
        stop_ms=float(readings.stop_ms),
        start_ms=float(first_trained_ms),
    )


def glance_at(readings: Readings) -> Glance:
    """Rewards of the arms and delays so far, from the step log; takes about a second for 30,000 steps.

    Args:
        readings: From `Readings.frozen`: another thread goes on filling the original.
    """
    steps = read_steps(readings.config.log_root)
    if not len(steps):
        return Glance()
    times = steps_in_loop(readings.config, readings, served_by_all(readings.last.get("traffic", {}).get("served", {})))
    arms = arm_rewards(session_rewards(steps), before_ms=readings.stop_ms - ARM_MARGIN_S * 1e3)
    return Glance(arms, times.label_delay_s.p50, times.loop_delay_s.p50)


def chosen_versions(manifests: Iterable[Manifest], count: int) -> list[int]:
    """Control, the final version, and others between them at about equal distances: `count` at most."""
    trained = [m.version for m in manifests if m.gradient_steps > 0]
    if not trained:
        return [CONTROL_VERSION]
    picked = np.unique(np.linspace(0, len(trained) - 1, count - 1).round().astype(int))
    return [CONTROL_VERSION, *(trained[i] for i in picked)]


def make_report(config: Config, readings: Readings, *, data: Path | None, say: Callable[[str], None]) -> Report:
    """Evaluate what the run left behind and put the report together.

    Args:
        config: Of the run.
        readings: What was seen while it ran.
        data: Folder of the real log, or None with simulated input.
        say: Takes lines for people.
    """
    start_ms, stop_ms = float(readings.first_decision_ms), float(readings.stop_ms)
    traffic, learner = readings.last["traffic"], readings.last["learner"]
    latencies, served = np.asarray(traffic["latencies_ms"]), traffic["served"]
    steps = read_steps(config.log_root)
    times = steps_in_loop(config, readings, served_by_all(served))
    sessions = session_rewards(steps)
    before_ms = max(stop_ms - ARM_MARGIN_S * 1e3, start_ms + (stop_ms - start_ms) / 2)
    by_version = {m.version: m for m in readings.manifests}
    folder = config.run.path / "policies"
    versions = chosen_versions(readings.manifests, config.simulation.frozen_policies)
    policies = [Policy.load(version_folder(folder, v)) for v in versions]
    published_ms = {v: float(at) for v, at in readings.published_ms.items()}
    points, frozen, gaucs = (
        _simulated(config, policies, published_ms, start_ms, say) if data is None else ((), None, _real(config, policies, data, say))
    )
    spec = config.spec.build()
    swaps = [at - published for replica in readings.replicas for _, published, at in replica["swaps"]]
    final = by_version[versions[-1]]
    tier = config.policy.second_tier
    notes = [f"Promotion was by {'the first tier only' if tier == 'off' else f'both tiers ({tier})'} of the gate: {final.verdict}."]
    if times.num_undrawable:
        notes.append(f"{times.num_undrawable} truncated steps are not in the loop delay: training never draws them.")
    if times.num_before:
        notes.append(f"{times.num_before} steps that closed before the training of the first policy are not in the loop delay.")
    return Report(
        requests=traffic["requests"],
        requests_failed=traffic["requests_failed"],
        version_regressions=traffic["version_regressions"],
        latency_ms=Percentiles.of(latencies),
        decisions=traffic["decisions"],
        feedback=traffic["feedback"],
        events_failed=traffic["events_failed"] + sum(replica["failed"] for replica in readings.replicas),
        ledger=readings.ledger,
        steps=StepCounts(
            closed=sum(worker["steps_closed"] for worker in readings.of("ingest-")),
            logged=len(steps),
            inserted=sum(status["num_inserted"] for status in readings.of("replay-")),
        ),
        replay_size=readings.replay_size,
        learner=LearnerCounts(learner["gradient_steps"], learner["samples"], learner["steps_per_s"]),
        policies_published=len(readings.manifests),
        versions_served=len({v for seen in served.values() for v in seen}),
        swap_ms=Percentiles.of(swaps),
        label_delay_s=times.label_delay_s,
        loop_delay_s=times.loop_delay_s,
        reward_per_session=arm_rewards(sessions, before_ms=before_ms),
        frozen=frozen,
        kuairand=gaucs,
        peak_rss_bytes=readings.peak_rss_bytes,
        seconds_to_first_decision=readings.seconds_to_first_decision,
        seconds=(stop_ms - start_ms) / 1e3,
        details=Details(
            title="Simulated input" if data is None else "Real input: KuaiRand",
            started=datetime.datetime.fromtimestamp(readings.started_ms / 1e3, datetime.UTC).isoformat(timespec="seconds"),
            config_digest=hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16],
            settings=config.shown(),
            packages={name: importlib.metadata.version(name) for name in PACKAGES},
            score_names=spec.scores,
            arms=arm_curve(sessions, start_ms=start_ms, before_ms=before_ms),
            frozen=points,
            losses=tuple(readings.losses),
            weights=weights_by_version(steps, spec, published_ms=published_ms, start_ms=start_ms),
            segments=weights_by_segment(steps, spec, min_version=versions[len(versions) // 2]),
            waterfall=times.stages,
            request_latency_ms=Histogram.of_latencies(latencies),
            notes=tuple(notes),
        ),
    )


def _simulated(
    config: Config, policies: list[Policy], published_ms: Mapping[int, float], start_ms: float, say: Callable[[str], None]
) -> tuple[tuple[FrozenPoint, ...], Frozen, None]:
    say(f"frozen evaluation: {len(policies)} policies on {config.simulation.frozen_sessions} common sessions")
    results = evaluate_frozen(policies, config, seed=config.demo.seed, sessions=config.simulation.frozen_sessions)
    points = tuple(
        FrozenPoint(
            at_s=max(0.0, (published_ms.get(p.version, start_ms) - start_ms) / 1e3),
            version=p.version,
            reward=result.reward,
            difference=result.difference,
        )
        for p, result in zip(policies, results, strict=True)
    )
    control, final = points[0], points[-1]
    return points, Frozen(control.reward.mean or 0.0, final.reward.mean or 0.0, final.difference), None


def _real(config: Config, policies: list[Policy], data: Path, say: Callable[[str], None]) -> dict[str, tuple[Gauc, ...]]:
    from esrl_ray.simulation.kuairand import evaluate_kuairand

    say(f"user x tab GAUC of {len(policies)} policies on the test days")
    return evaluate_kuairand(policies, config, data)
