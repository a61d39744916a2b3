"""The report of `benchmarks/methods.py`: tables in Markdown and learning curves, from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from benchmarks.methods_rows import CONTROL, METHODS, Row
from esrl_ray.simulation.oracle import ORACLES

mpl.rcParams["svg.hashsalt"] = "esrl"  # the same rows give the same file


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval over runs; NaN for the latter with one run."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


def write_report(rows: Sequence[Row], stem: Path) -> None:
    """Write `<stem>.md` and `<stem>.svg`."""
    if not rows:
        return
    worlds = sorted({row.world for row in rows})
    order = [name for name in [*METHODS, *ORACLES] if any(row.method == name for row in rows)]
    chosen = f" --methods {','.join(order)}" if len(order) < len(METHODS) + len(ORACLES) else ""
    lines = [
        "# Methods in simulated worlds",
        "",
        f"Reward per session of the policy after {rows[0].num_steps:,} list requests, played frozen, without noise, on "
        f"{rows[0].sessions:,} unseen sessions with common random "
        "numbers; ± is the half width of a 95 % t interval over runs, for these worlds; `other worlds` is that of a mean over worlds drawn "
        "like these, from the means of each. Best round = the mean of "
        "each run's best, on half as many sessions, which flatters: nobody knows it beforehand. "
        "Share = (reward - control) / (observed-features oracle - control), of runs whose world and seed have both.",
        f"Worlds {', '.join(map(str, worlds))}; seeds {', '.join(map(str, sorted({row.seed for row in rows})))}; "
        f"{', '.join(sorted({row.machine for row in rows}))}, shared. A method with fewer runs has the first seeds; the last column says "
        f"of which commits its rows are. Written by `python -m benchmarks.methods{chosen} --worlds {','.join(map(str, worlds))} "
        f"--out benchmarks/results/{stem.name}.jsonl`.",
        "",
        f"| method | runs |{''.join(f' world {w} |' for w in worlds)} all | other worlds | best round | share | other worlds "
        "| pages | watch s | gradient steps | seconds | commits |",
        "|---|---|" + "---|" * (len(worlds) + 10),
    ]
    control, oracle = _reference(rows, CONTROL), _reference(rows, "oracle-observed")
    for name in order:
        mine = [row for row in rows if row.method == name]
        cells = [_cell([row.reward for row in mine if row.world == w]) for w in worlds]
        compared = [r for r in mine if (r.world, r.seed) in control.keys() & oracle]
        shares = [100 * (r.reward - control[at]) / (oracle[at] - control[at]) for r in compared for at in [(r.world, r.seed)]]
        rewards = [r.reward for r in mine]
        cells += [_cell(rewards), _over_worlds(mine, rewards), _best_round(mine), _cell(shares, "%"), _over_worlds(compared, shares)]
        cells += [_cell([r.pages for r in mine]), _cell([r.watch_s for r in mine], digits=0)]
        cells += [f"{np.mean([r.gradient_steps for r in mine]):,.0f}", f"{np.mean([r.seconds for r in mine]):.0f}"]
        cells += [", ".join(sorted({r.commit[:7] for r in mine}))]
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
    lines += ["", f"![learning curves]({stem.name}.svg)", ""]
    lines += [f"- **{name}**: {METHODS[name].what}" for name in order if name in METHODS]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _curves(rows, [name for name in order if name in METHODS]).savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _reference(rows: Sequence[Row], name: str) -> dict[tuple[int, int], float]:
    """Reward of a method by (world, seed)."""
    return {(row.world, row.seed): row.reward for row in rows if row.method == name}


def _over_worlds(rows: Sequence[Row], values: Sequence[float]) -> str:
    """Half width of the interval of a mean over worlds."""
    means = [np.mean([v for row, v in zip(rows, values, strict=True) if row.world == w]) for w in sorted({row.world for row in rows})]
    return f"± {mean_interval([float(m) for m in means])[1]:.1f}" if len(means) > 1 else "-"


def _best_round(rows: Sequence[Row]) -> str:
    """Mean over runs of the highest point of their curves."""
    best = [max(point.reward for point in row.curve) for row in rows if row.curve]
    return f"{np.mean(best):.1f}" if best else "-"


def _cell(values: Sequence[float], unit: str = "", *, digits: int = 1) -> str:
    if not values:
        return "-"
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}{unit}" if np.isnan(half) else f"{mean:.{digits}f}{unit} ± {half:.{digits}f}"


def _curves(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Mean curves, this project's method and its ablations on the right; a bar is the 95 % interval over runs."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    own = [name for name in names if name.startswith("enhancedrl")]
    for axes, shown in ((left, [name for name in names if name not in own[1:]]), (right, own)):
        for i, name in enumerate(shown):
            mine = [row for row in rows if row.method == name and row.curve]
            if not mine:
                continue
            steps = np.array([p.num_steps for p in mine[0].curve]) / 1e3
            found = [mean_interval(at) for at in zip(*([p.reward for p in row.curve] for row in mine), strict=True)]
            means, halves = zip(*found, strict=True)
            default = name == "enhancedrl"
            style: dict[str, Any] = (
                {"color": "black", "lw": 2.4, "zorder": 9} if default else {"color": mpl.colormaps["tab20"](i % 20), "lw": 1.2}
            )
            axes.errorbar(steps + 0.08 * i, means, np.nan_to_num(halves), label=name, marker=".", capsize=2, elinewidth=0.6, **style)
        axes.set(xlabel="thousand list requests")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, ncols=2)
    left.set(ylabel="reward per session")
    return figure
