"""What one run of the loop did: the numbers of `--json`, the series behind the plots, and the files `report.json` and `report.html`.

The composition root fills a `Report`; nothing here reads a clock or asks a part. Times of series are seconds since the first served
decision. A number that is infinite (never served) or unknown is None, and null in JSON; how many were infinite stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from esrl_ray.vocabulary import Bucket

JSON_FILE, HTML_FILE = "report.json", "report.html"
LONG_RUN_S = 300.0
"""Promises about versions and learning are for runs of this length."""


def finite(value: float) -> float | None:
    """The value, or None where it is infinite or not a number."""
    return float(value) if math.isfinite(value) else None


class Percentiles(msgspec.Struct, frozen=True):
    """Median and 99th percentile; None without observations."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Percentiles:
        """Percentiles of observations (n,); infinite ones count as larger than any other."""
        return cls(*percentiles(np.asarray(values, np.float64)))


def percentiles(values: npt.NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The smallest observations that 50 % and 99 % do not exceed; None where that is infinite or there are none."""
    if not values.size:
        return None, None
    p50, p99 = np.quantile(values, (0.5, 0.99), method="inverted_cdf")
    return finite(p50), finite(p99)


class Delay(msgspec.Struct, frozen=True):
    """Percentiles of a delay in which what never arrived counts as infinite."""

    p50: float | None
    p99: float | None
    never_served: int
    steps: int

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Delay:
        """Percentiles of delays (n,) in which infinite means never."""
        delays = np.asarray(values, np.float64)
        return cls(*percentiles(delays), never_served=int(np.isinf(delays).sum()), steps=len(delays))


class Interval(msgspec.Struct, frozen=True):
    """A mean reward per session with its 95 % interval; None where there are too few users."""

    mean: float | None
    ci_low: float | None
    ci_high: float | None
    sessions: int

    @classmethod
    def of(cls, mean: float, ci_low: float, ci_high: float, sessions: int) -> Interval:
        """From plain numbers, which may be NaN."""
        return cls(finite(mean), finite(ci_low), finite(ci_high), sessions)


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Every event that the broker acknowledged, each in exactly one bucket."""

    produced: int
    joined: int
    duplicate: int
    late: int
    dead_letter: int
    never_shown: int
    unmatched: int
    skipped: int
    in_open_session: int
    not_yet_read: int
    closes: bool  # in each topic the buckets sum to what was produced
    topics: dict[str, dict[str, int]]  # the same, {topic: {bucket or "produced": events}}

    @classmethod
    def of(cls, settled: Mapping[tuple[str, Bucket], int], produced: Mapping[str, int]) -> Ledger:
        """Put the ledger together.

        Args:
            settled: {(topic, bucket): events}, `NOT_YET_READ` included.
            produced: {topic: events that the broker acknowledged}.
        """
        topics = {t: {"produced": n} | {b.value: int(settled.get((t, b), 0)) for b in Bucket} for t, n in produced.items()}
        total = {b.value: sum(int(n) for (_, bucket), n in settled.items() if bucket == b) for b in Bucket}
        closes = {t for t, _ in settled} <= set(topics) and all(2 * row["produced"] == sum(row.values()) for row in topics.values())
        return cls(produced=sum(produced.values()), closes=closes, topics=topics, **total)


class StepCounts(msgspec.Struct, frozen=True):
    """Distinct steps: closed by the join, in the step log, inserted into the replay buffer."""

    closed: int
    logged: int
    inserted: int


class LearnerCounts(msgspec.Struct, frozen=True):
    """What the learner did; rates are gradient steps per second since its first one."""

    gradient_steps: int
    samples: int
    steps_per_s: float


class Frozen(msgspec.Struct, frozen=True):
    """Reward per session of the final policy and of control, on the same sessions without noise; the difference is paired."""

    control: float
    final: float
    difference: Interval


class Gauc(msgspec.Struct, frozen=True):
    """GAUC of one policy on real input, or its difference to control's: a regression test, no claim."""

    policy: str
    gauc: float | None
    ci_low: float | None
    ci_high: float | None
    units: int


class ArmPoint(msgspec.Struct, frozen=True):
    """Reward per session of one arm's sessions that started in one stretch of the run."""

    at_s: float
    arm: str
    reward: Interval


class FrozenPoint(msgspec.Struct, frozen=True):
    """The frozen evaluation of one policy."""

    at_s: float  # when it was published
    version: int
    reward: Interval
    difference: Interval  # to control, paired


class LossPoint(msgspec.Struct, frozen=True):
    """Losses of one learner call."""

    at_s: float
    gradient_steps: int
    critic: float
    actor: float
    outside_share: float  # of actions outside the bounds


class WeightsPoint(msgspec.Struct, frozen=True):
    """Mean fusion weights of one policy version over the pairs that it served."""

    at_s: float
    version: int
    pairs: int
    powers: tuple[float, ...]  # k
    biases: tuple[float, ...]  # k


class Segment(msgspec.Struct, frozen=True):
    """Mean fusion weights of the pairs whose feature is in one third of its range."""

    feature: str
    side: str  # user or item
    third: str  # low, middle or high
    pairs: int
    powers: tuple[float, ...]  # k
    biases: tuple[float, ...]  # k


class Stage(msgspec.Struct, frozen=True):
    """One stage of the loop delay, and the time from the closing of the step to the end of this stage."""

    name: str
    seconds: Delay
    since_closed_s: Delay


class Histogram(msgspec.Struct, frozen=True):
    """Counts of observations between edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: npt.ArrayLike, edges: npt.ArrayLike) -> Histogram:
        """Count observations; those outside go to the first and the last bin."""
        bounds = np.asarray(edges, np.float64)
        counts, _ = np.histogram(np.clip(np.asarray(values, np.float64), bounds[0], bounds[-1]), bounds)
        return cls(tuple(bounds.tolist()), tuple(counts.tolist()))

    @classmethod
    def of_latencies(cls, values_ms: npt.ArrayLike) -> Histogram:
        """40 bins of equal ratio from 1 ms to 10 s."""
        return cls.of(values_ms, np.geomspace(1.0, 10_000.0, 41))


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """The series behind the plots, and what made this run."""

    title: str = "Simulated input"
    started: str = ""  # date and time, UTC
    config_digest: str = ""
    settings: dict[str, object] = {}  # effective configuration without secrets
    packages: dict[str, str] = {}
    score_names: tuple[str, ...] = ()
    arms: tuple[ArmPoint, ...] = ()
    frozen: tuple[FrozenPoint, ...] = ()
    losses: tuple[LossPoint, ...] = ()
    weights: tuple[WeightsPoint, ...] = ()
    segments: tuple[Segment, ...] = ()
    waterfall: tuple[Stage, ...] = ()
    request_latency_ms: Histogram | None = None
    notes: tuple[str, ...] = ()  # sentences that a reader of the numbers must know


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The numbers of one run, under the keys of `esrl demo --json`."""

    requests: int
    requests_failed: int
    latency_ms: Percentiles
    decisions: int
    feedback: int
    events_failed: int  # given up by a producer of this run: neither acknowledged nor spooled
    ledger: Ledger
    steps: StepCounts
    replay_size: int
    learner: LearnerCounts
    policies_published: int
    versions_served: int
    swap_ms: Percentiles
    label_delay_s: Percentiles
    loop_delay_s: Delay
    reward_per_session: dict[str, Interval]
    frozen: Frozen | None  # None with real input
    peak_rss_bytes: int
    seconds_to_first_decision: float
    version_regressions: int  # replies with an older version than one before from the same replica
    seconds: float  # from the first served decision to the end of the traffic
    kuairand: dict[str, tuple[Gauc, ...]] | None = None  # only with real input: {grouping: one per policy}
    details: Details | None = None

    def json_line(self) -> str:
        """The numbers without the series, on one line."""
        return msgspec.json.encode(msgspec.structs.replace(self, details=None), enc_hook=_plain).decode()


def _plain(value: object) -> object:
    """Numpy's scalars as plain numbers."""
    if isinstance(value, np.generic):
        return value.item()
    # What msgspec wants of a hook that does not know a type.
    raise NotImplementedError(f"a report cannot hold a {type(value).__name__}")


class Promise(msgspec.Struct, frozen=True):
    """One thing that every run promises."""

    text: str
    value: str
    kept: bool
    timed: bool = False  # depends on the machine's speed


def promises(report: Report) -> tuple[Promise, ...]:
    """What this run promised and what it did. Promises about a run of 300 s are left out of shorter ones."""
    steps, delay = report.steps, report.loop_delay_s
    made = [
        Promise("No request failed", f"{report.requests_failed:,} of {report.requests:,}", report.requests_failed == 0),
        Promise(
            "The ledger closes: every event is in exactly one bucket",
            "closes" if report.ledger.closes else "does not close",
            report.ledger.closes,
        ),
        Promise("No producer gave up an event", f"{report.events_failed:,}", report.events_failed == 0),
        Promise("The log holds each closed step once", f"{steps.closed:,} closed, {steps.logged:,} logged", steps.closed == steps.logged),
        Promise("Versions never go down at a replica", f"{report.version_regressions:,} times", report.version_regressions == 0),
    ]
    long_enough = report.seconds >= LONG_RUN_S
    if long_enough:
        made.append(Promise("At least 10 policy versions served", f"{report.versions_served}", report.versions_served >= 10))
    if long_enough and report.frozen is not None:
        gain = report.frozen.difference
        made.append(Promise("The final policy beats control, whole interval above 0", interval_text(gain), (gain.ci_low or 0.0) > 0))
    value = "never served" if delay.p99 is None else f"{delay.p99:.1f} s"
    made.append(Promise("Loop delay, 99th percentile at most 15 s", value, delay.p99 is not None and delay.p99 <= 15.0, timed=True))
    return tuple(made)


def interval_text(interval: Interval, *, form: str = "+.2f") -> str:
    """`+1.20 [+0.80, +1.60]`, or what there is of it."""
    if interval.mean is None:
        return "none"
    if interval.ci_low is None or interval.ci_high is None:
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.ci_low:{form}}, {interval.ci_high:{form}}]"


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and the self-contained `report.html`.

    Args:
        report: The run.
        folder: Made when missing.

    Returns:
        The two paths.
    """
    from esrl_ray.evaluation.page import render_page

    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / JSON_FILE, folder / HTML_FILE
    json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=_plain), indent=1))
    html_path.write_text(render_page(report), encoding="utf-8")
    return json_path, html_path


def read_report(path: Path) -> Report:
    """Read `report.json` back."""
    return msgspec.json.decode(path.read_bytes(), type=Report)
