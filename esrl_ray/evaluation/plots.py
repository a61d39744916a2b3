"""The report's plots as inline SVG: one function per plot, drawn without pyplot's global state."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from esrl_ray.evaluation.report import ArmPoint, FrozenPoint, Histogram, Interval, LossPoint, Segment, Stage, WeightsPoint

P = ParamSpec("P")

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
ARM_COLOURS = {"explore": "#d97706", "exploit": "#0f6cbd", "control": "#66727f"}
SCORE_COLOURS = ("#0f6cbd", "#d97706", "#0b8a6a", "#b4358b", "#7a5cc7", "#a4402f", "#3f7d8c", "#8a7a1f")
STAGE_COLOURS = ("#9db8d2", "#7ea6cc", "#d8b26a", "#6fb39b", "#b39bd0", "#d08a93")
WIDTH = 7.2  # inches of 72 SVG points

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#b8c1ca",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with this report's style, and leave matplotlib's own as it is."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element that scales with its column; the same figure gives the same text."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).strip()


@_styled
def arms_plot(points: Sequence[ArmPoint]) -> Figure:
    """Reward per session of each arm over the run, with 95 % intervals."""
    figure, (axes,) = _figure(2.8)
    for arm, colour in ARM_COLOURS.items():
        mine = [p for p in points if p.arm == arm]
        if mine:
            _band(axes, [p.at_s for p in mine], [p.reward for p in mine], colour, arm)
    axes.set_xlabel("start of the session, seconds since the first served decision")
    axes.set_ylabel("reward per session")
    axes.legend(loc="upper left", ncols=3)
    _headroom(axes)
    return figure


@_styled
def frozen_plot(points: Sequence[FrozenPoint], control: float) -> Figure:
    """Reward per session of frozen policies on the same sessions, by when they were published."""
    figure, (axes,) = _figure(2.8)
    axes.axhline(control, color=ARM_COLOURS["control"], linestyle=(0, (4, 3)), label="control")
    _band(axes, [p.at_s for p in points], [p.reward for p in points], ARM_COLOURS["exploit"], "policies")
    for p in points:
        if p.reward.mean is not None:
            axes.annotate(
                f"v{p.version}", (p.at_s, p.reward.mean), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=MUTED
            )
    axes.set_xlabel("published, seconds since the first served decision")
    axes.set_ylabel("reward per session")
    axes.legend(loc="upper left", ncols=2)
    _headroom(axes)
    return figure


@_styled
def losses_plot(points: Sequence[LossPoint]) -> Figure:
    """Critic loss, actor loss and the share of actions outside the bounds."""
    figure, panels = _figure(2.3, 3)
    seconds = np.array([p.at_s for p in points])
    series = (
        ("critic loss", [p.critic for p in points]),
        ("actor loss", [p.actor for p in points]),
        ("share outside the bounds", [p.outside_share for p in points]),
    )
    for axes, (title, values), colour in zip(panels, series, SCORE_COLOURS, strict=False):
        axes.plot(seconds, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(seconds, _smooth(np.asarray(values, np.float64)), color=colour)
        axes.set_title(title)
        axes.set_xlabel("seconds")
    panels[2].set_ylim(bottom=0)
    return figure


@_styled
def weights_plot(points: Sequence[WeightsPoint], scores: Sequence[str]) -> Figure:
    """Mean power and bias of each score by the policy version that served."""
    figure, panels = _figure(2.9, 2)
    seconds = [p.at_s for p in points]
    for axes, title, values in zip(
        panels, ("mean power", "mean bias"), ([p.powers for p in points], [p.biases for p in points]), strict=True
    ):
        for column, score in enumerate(scores):
            line = [v[column] for v in values]
            axes.plot(
                seconds, line, color=SCORE_COLOURS[column % len(SCORE_COLOURS)], marker="o", markersize=2.5, linewidth=1.3, label=score
            )
        axes.set_title(title)
        axes.set_xlabel("published, seconds")
    _legend_below(figure, panels[0], len(scores))
    return figure


@_styled
def segments_plot(segments: Sequence[Segment], scores: Sequence[str]) -> Figure:
    """Mean power of each score in the low, middle and high third of each feature."""
    features = list(dict.fromkeys(s.feature for s in segments))
    columns = min(3, len(features))
    num_rows = -(-len(features) // columns)
    figure, panels = _figure(1.9 * num_rows + 0.5, columns, num_rows, sharey=True)
    for axes, feature in zip(panels, features, strict=False):
        mine = [s for s in segments if s.feature == feature]
        for column, score in enumerate(scores):
            colour = SCORE_COLOURS[column % len(SCORE_COLOURS)]
            axes.plot([s.third for s in mine], [s.powers[column] for s in mine], color=colour, marker="o", linewidth=1.3, label=score)
        axes.set_title(f"{feature} ({mine[0].side})")
        axes.margins(x=0.12)
    for axes in panels[len(features) :]:
        axes.set_visible(False)
    _legend_below(figure, panels[0], len(scores))
    return figure


@_styled
def waterfall_plot(stages: Sequence[Stage]) -> Figure:
    """Median time of each stage, one after the other, and how far the 99th percentile reaches."""
    figure, (axes,) = _figure(0.38 * len(stages) + 0.8)
    begin = 0.0
    for row, (stage, colour) in enumerate(zip(stages, STAGE_COLOURS * 2, strict=False)):
        p50, p99 = stage.seconds.p50, stage.seconds.p99
        if p50 is None:
            continue
        if p99 is not None:
            axes.plot([begin + p50, begin + p99], [row, row], color=colour, linewidth=1.4)
            axes.plot([begin + p99], [row], marker="|", color=colour, markersize=9, markeredgewidth=1.6)
        axes.barh(row, p50, left=begin, height=0.58, color=colour)
        reach = begin + max(p50, p99 or 0.0)
        label = f"{p50:.2f} s" + (f", p99 {p99:.2f} s" if p99 is not None else ", p99 never")
        axes.annotate(label, (reach, row), (7, 0), textcoords="offset points", va="center", fontsize=8.5, color=MUTED)
        begin += p50
    axes.set_yticks(range(len(stages)), [s.name for s in stages])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.22)
    axes.set_xlabel("seconds after the step was closed")
    return figure


@_styled
def latency_plot(histogram: Histogram) -> Figure:
    """Latency of requests, as the client saw it."""
    figure, (axes,) = _figure(2.1)
    edges, counts = np.asarray(histogram.edges), np.asarray(histogram.counts)
    axes.stairs(counts, edges, fill=True, color="#8db6dc")
    axes.set_xscale("log")
    used = np.flatnonzero(counts)
    if len(used):
        axes.set_xlim(edges[max(0, used[0] - 2)], edges[min(len(edges) - 1, used[-1] + 3)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("requests")
    return figure


def _figure(height: float, columns: int = 1, num_rows: int = 1, *, sharey: bool = False) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(num_rows, columns, sharey=sharey, squeeze=False)
    return figure, list(grid.flat)


def _band(axes: Any, at_s: Sequence[float], rewards: Sequence[Interval], colour: str, label: str) -> None:
    def column(values: Sequence[float | None]) -> Any:
        return np.array([np.nan if v is None else v for v in values])

    axes.plot(at_s, column([r.mean for r in rewards]), color=colour, marker="o", label=label)
    axes.fill_between(
        at_s, column([r.ci_low for r in rewards]), column([r.ci_high for r in rewards]), color=colour, alpha=0.13, linewidth=0
    )


def _headroom(axes: Any) -> None:
    """Room above the curves for the legend."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.18 * (high - low))


def _legend_below(figure: Figure, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, 6))


def _smooth(values: Any, share: float = 0.05) -> Any:
    """Centred moving mean over a share of the points."""
    width = max(1, int(len(values) * share))
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
