"""The report: its keys, its numbers, its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np

from esrl_ray.evaluation import plots
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
from esrl_ray.evaluation.weights import THIRDS
from esrl_ray.vocabulary import Bucket

KEYS = [
    *("requests", "requests_failed", "latency_ms", "decisions", "feedback", "events_failed", "ledger", "steps", "replay_size", "learner"),
    *("policies_published", "versions_served", "swap_ms", "label_delay_s", "loop_delay_s", "reward_per_session", "frozen"),
    *("peak_rss_bytes", "seconds_to_first_decision", "version_regressions", "seconds"),
]
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
        config_digest="9f2c4e1ab07d",
        settings={"learner": {"gamma": 0.9}},
        packages={"Python": "3.12.1", "Ray": "2.60.0", "torch": "2.13.0", "Kafka": "4.2.1"},
        score_names=SCORES,
        arms=tuple(
            ArmPoint(float(t), arm, around(float(v[i] + rng.normal(0, 0.4)), 1.5, 120))
            for arm, v in levels.items()
            for i, t in enumerate(at)
        ),
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
            for i, third in enumerate(THIRDS)
        ),
        waterfall=tuple(waterfall),
        request_latency_ms=Histogram.of_latencies(rng.lognormal(np.log(9), 0.5, 36_000)),
    )


def sample_report(details: Details | None = None) -> Report:
    """A run of 300 s that kept its promises; without series unless they are given."""
    return Report(
        requests=36_000,
        requests_failed=0,
        latency_ms=Percentiles(8.9, 31.0),
        decisions=36_000,
        feedback=250_000,
        events_failed=0,
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
        version_regressions=0,
        seconds=300.0,
        details=details,
    )


def test_the_json_line_has_exactly_the_promised_keys_on_one_line() -> None:
    line = sample_report().json_line()
    assert "\n" not in line
    assert list(json.loads(line)) == KEYS


def test_the_json_lines_numbers_have_the_promised_shape() -> None:
    numbers = json.loads(sample_report().json_line())
    for key in ("latency_ms", "swap_ms", "label_delay_s"):
        assert set(numbers[key]) == {"p50", "p99"}
    assert {"p50", "p99", "never_served"} <= set(numbers["loop_delay_s"])
    assert set(numbers["steps"]) == {"closed", "logged", "inserted"}
    assert set(numbers["learner"]) == {"gradient_steps", "samples", "steps_per_s"}
    interval = {"mean", "ci_low", "ci_high", "sessions"}
    assert {arm: set(r) for arm, r in numbers["reward_per_session"].items()} == dict.fromkeys(("explore", "exploit", "control"), interval)
    assert set(numbers["frozen"]) == {"control", "final", "difference"} and set(numbers["frozen"]["difference"]) == interval
    assert {b.value for b in Bucket} | {"produced", "closes"} <= set(numbers["ledger"])


def test_with_real_input_frozen_is_null_and_the_gauc_table_stands_beside_it() -> None:
    table = {"user_tab": (Gauc("control", 0.611, 0.60, 0.62, 3354), Gauc("final", 0.633, 0.62, 0.64, 3354))}
    report = msgspec.structs.replace(sample_report(), frozen=None, kuairand=table)
    numbers = json.loads(report.json_line())
    assert numbers["frozen"] is None
    assert [row["policy"] for row in numbers["kuairand"]["user_tab"]] == ["control", "final"]
    page = render_page(report)
    assert "0.6330 [0.6200, 0.6400]" in page and "GAUC by user tab" in page and "no claim" in page


def test_never_served_is_null_with_its_count() -> None:
    delay = Delay.of([1.0, 2.0, float("inf"), float("inf")])
    assert msgspec.json.decode(msgspec.json.encode(delay)) == {"p50": 2.0, "p99": None, "never_served": 2, "steps": 4}


def test_percentiles_are_observations_that_the_share_does_not_exceed() -> None:
    assert Percentiles.of(range(1, 101)) == Percentiles(50, 99)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0)
    assert Percentiles.of([]) == Percentiles(None, None)
    assert Delay.of([1.0] * 99 + [float("inf")]) == Delay(1.0, 1.0, 1, 100)
    assert Delay.of([1.0] * 98 + [float("inf")] * 2) == Delay(1.0, None, 2, 100)


def test_a_ledger_closes_when_each_topics_buckets_sum_to_what_was_produced() -> None:
    settled = {("decisions", Bucket.JOINED): 7, ("decisions", Bucket.NOT_YET_READ): 3, ("feedback", Bucket.LATE): 5}
    ledger = Ledger.of(settled, {"decisions": 10, "feedback": 5})
    assert ledger.closes
    assert (ledger.produced, ledger.joined, ledger.not_yet_read, ledger.late, ledger.duplicate) == (15, 7, 3, 5, 0)
    assert not Ledger.of(settled, {"decisions": 9, "feedback": 6}).closes  # the sums agree in all, not in each topic
    assert not Ledger.of(settled, {"decisions": 10}).closes  # events of a topic that nobody produced to
    assert not Ledger.of({}, {"decisions": 1}).closes


def test_a_report_survives_its_file_and_numpy_numbers(tmp_path: Path) -> None:
    report = msgspec.structs.replace(sample_report(sample_details()), requests=np.int64(5), seconds_to_first_decision=np.float64(31.5))
    json_file, html_file = write_report(report, tmp_path / "run")
    again = read_report(json_file)
    assert again.requests == 5 and again.seconds_to_first_decision == 31.5
    assert again.details is not None and again.details.weights == sample_details().weights
    assert html_file.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_broken_promises_are_named(tmp_path: Path) -> None:
    report = sample_report()
    assert all(p.kept for p in promises(report)) and len(promises(report)) == 8
    broken = msgspec.structs.replace(
        report,
        requests_failed=2,
        versions_served=9,
        version_regressions=1,
        steps=StepCounts(10, 9, 9),
        events_failed=1,
        ledger=Ledger.of({}, {"decisions": 1}),
        loop_delay_s=Delay(1.0, None, 3, 10),
        frozen=Frozen(17.0, 17.5, around(0.5, 0.6, 2000)),
    )
    assert [p.kept for p in promises(broken)] == [False] * 8
    assert [p.text for p in promises(broken) if p.timed] == ["Loop delay, 99th percentile at most 15 s"]
    assert "✗ broken" in render_page(broken) and "do not sum" in render_page(broken)


def test_a_short_run_promises_neither_versions_nor_learning() -> None:
    report = msgspec.structs.replace(sample_report(), seconds=90.0)
    assert not any("versions" in p.text or "beats" in p.text for p in promises(report))


def test_intervals_read_well() -> None:
    assert interval_text(Interval(1.0, 0.5, 1.5, 3)) == "+1.00 [+0.50, +1.50]"
    assert interval_text(Interval.of(1.0, float("nan"), float("nan"), 1), form=".1f") == "1.0"
    assert interval_text(Interval.of(float("nan"), float("nan"), float("nan"), 0)) == "none"


def test_the_page_is_self_contained_and_its_plots_are_valid_svg() -> None:
    page = render_page(sample_report(sample_details()))
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(https?|src=", page)
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 7
    for figure in figures:
        assert ElementTree.fromstring(figure).tag.endswith("svg")
    assert all(
        len(re.findall(rf"<{tag}\b", page)) == len(re.findall(rf"</{tag}>", page)) for tag in ("figure", "table", "div", "p", "span")
    )


def test_the_same_series_give_the_same_plot() -> None:
    losses = sample_details().losses
    assert plots.svg(plots.losses_plot(losses), "losses") == plots.svg(plots.losses_plot(losses), "losses")


def test_text_from_a_run_is_escaped() -> None:
    details = Details(title="<b>&", notes=("a < b",), packages={"<x>": "1"})
    page = render_page(msgspec.structs.replace(sample_report(), details=details))
    assert "<title>&lt;b&gt;&amp;</title>" in page and "a &lt; b" in page and "&lt;x&gt;" in page


def test_a_report_without_series_or_observations_still_renders() -> None:
    nothing = Interval.of(float("nan"), float("nan"), float("nan"), 0)
    report = msgspec.structs.replace(
        sample_report(),
        details=None,
        frozen=None,
        latency_ms=Percentiles(None, None),
        loop_delay_s=Delay(None, None, 0, 0),
        reward_per_session={"explore": nothing},
    )
    page = render_page(report)
    assert "<svg" not in page and "none" in page


def test_a_waterfall_with_a_stage_that_never_ended_is_drawn() -> None:
    stages = [Stage("committed", Delay.of([1.0]), Delay.of([1.0])), Stage("inserted", Delay.of([float("inf")]), Delay.of([float("inf")]))]
    assert "p99" in plots.svg(plots.waterfall_plot(stages), "waterfall")


def test_plots_leave_matplotlibs_settings_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.svg(plots.arms_plot(sample_details().arms), "arms")
    assert dict(mpl.rcParams) == before


def test_a_histogram_keeps_every_observation() -> None:
    histogram = Histogram.of([0.1, 1.5, 2.5, 99.0], [1, 2, 3])
    assert histogram == Histogram((1.0, 2.0, 3.0), (2, 2))
    assert sum(Histogram.of_latencies([0.2, 5.0, 1e6]).counts) == 3
