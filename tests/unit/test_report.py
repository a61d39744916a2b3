"""The report: its keys, its numbers, its files; arm rewards and served fusion weights from the step log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from esrl_ray.config import load_config
from esrl_ray.evaluation import arms, plots, weights
from esrl_ray.evaluation.page import render_page
from esrl_ray.evaluation.report import (
    ArmPoint,
    Delay,
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
    Segment,
    Stage,
    StepCounts,
    WeightsPoint,
    interval_text,
    promises,
    read_report,
    write_report,
)
from esrl_ray.vocabulary import Bucket

KEYS = (
    "requests requests_failed latency_ms decisions feedback ledger steps replay_size learner policies_published versions_served swap_ms "
    "label_delay_s loop_delay_s reward_per_session frozen peak_rss_bytes seconds_to_first_decision"
).split()
SCORES = ("click", "valid", "watch", "like", "comment")


def around(mean: float, half: float, sessions: int) -> Interval:
    """An interval of this half width."""
    return Interval(mean, mean - half, mean + half, sessions)


def sample_ledger() -> Ledger:
    """36,000 decisions and 250,000 feedback events, all settled."""
    decisions = {Bucket.JOINED: 35_120, Bucket.NEVER_SHOWN: 310, Bucket.DUPLICATE: 0, Bucket.IN_OPEN_SESSION: 570}
    feedback = {Bucket.JOINED: 245_900, Bucket.DUPLICATE: 2_480, Bucket.LATE: 212, Bucket.UNMATCHED: 8, Bucket.IN_OPEN_SESSION: 1_400}
    settled = {("decisions", b): n for b, n in decisions.items()} | {("feedback", b): n for b, n in feedback.items()}
    return Ledger.of(settled, {"decisions": 36_000, "feedback": 250_000})


def sample_details() -> Details:
    """Series that look like a run of 300 s."""
    rng = np.random.default_rng(0)
    at = np.linspace(15, 285, 10)
    levels = {"explore": 17.0 + at * 0.010, "exploit": 17.3 + at * 0.018, "control": 17.2 + 0 * at}
    losses_at = np.linspace(20, 300, 500)
    base = np.array([0.6, 0.6, 0.8, 0.3, 0.2])
    learnt = np.array([0.35, 0.1, 0.5, 0.15, -0.2])
    stages = {"committed": 0.9, "inserted": 0.05, "drawable": 2.1, "learnt": 0.4, "published": 1.2, "served": 0.06}
    waterfall, total = [], np.zeros(2000)
    for name, scale in stages.items():
        seconds = rng.gamma(3.0, scale / 3.0, 2000)
        total = total + seconds
        waterfall.append(Stage(name, Delay.of(seconds), Delay.of(total)))
    thirds = [("act", "user", 0.2), ("ema_click", "user", -0.15), ("pat", "user", 0.05)]
    thirds += [("bait_proxy", "item", -0.3), ("quality_proxy", "item", 0.25), ("duration", "item", 0.1)]
    return Details(
        title="Simulated input",
        started="2026-03-01 12:00 UTC",
        seconds=300.0,
        config_digest="9f2c4e1ab07d",
        settings={"learner": {"gamma": 0.9}},
        packages={"Python": "3.12.1", "Ray": "2.60.0", "torch": "2.13.0", "Kafka": "4.2.1"},
        score_names=SCORES,
        arms=tuple(ArmPoint(float(t), arm, around(float(v[i] + rng.normal(0, 0.4)), 1.5, 120)) for arm, v in levels.items() for i, t in enumerate(at)),
        frozen=tuple(FrozenPoint(float(t), int(t), around(17.2 + t * 0.019, 0.7, 2000), around(t * 0.019, 0.4, 2000)) for t in at[::2]),
        losses=tuple(
            LossPoint(float(t), i * 8, 0.6 + np.exp(-t / 40) + rng.normal(0, 0.08), -t / 900 + rng.normal(0, 0.02), 0.08 * t / 300)
            for i, t in enumerate(losses_at)
        ),
        weights=tuple(
            WeightsPoint(float(t), v, 900, tuple((base + learnt * t / 300).tolist()), tuple((0.55 + 0.2 * learnt * t / 300).tolist()))
            for v, t in enumerate(np.linspace(20, 295, 60))
        ),
        segments=tuple(
            Segment(feature, side, third, 4_000, tuple((base + learnt + slope * (i - 1) * np.sign(learnt)).tolist()), tuple([0.55] * 5))
            for feature, side, slope in thirds
            for i, third in enumerate(weights.THIRDS)
        ),
        waterfall=tuple(waterfall),
        request_latency_ms=Histogram.of_latencies(rng.lognormal(np.log(9), 0.5, 36_000)),
    )


def sample_report() -> Report:
    """A run of 300 s that kept its promises."""
    return Report(
        requests=36_000,
        requests_failed=0,
        latency_ms=Percentiles(8.9, 31.0),
        decisions=36_000,
        feedback=250_000,
        ledger=sample_ledger(),
        steps=StepCounts(35_120, 35_120, 35_120),
        replay_size=35_120,
        learner=LearnerCounts(3_512, 449_536, 12.4),
        policies_published=88,
        versions_served=86,
        swap_ms=Percentiles(24.0, 180.0),
        label_delay_s=Percentiles(9.4, 11.0),
        loop_delay_s=Delay(4.8, 9.7, 0, 32_000),
        reward_per_session={"explore": around(18.6, 0.6, 1500), "exploit": around(20.1, 0.8, 900), "control": around(17.3, 0.9, 600)},
        frozen=Frozen(17.21, 22.43, around(5.22, 0.61, 2000)),
        peak_rss_bytes=3_400_000_000,
        seconds_to_first_decision=31.2,
        details=sample_details(),
    )
