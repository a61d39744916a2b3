"""Which limit keeps broken off-policy estimates out: logs of different lengths and explore shares in the simulator, all limits off.

OMP_NUM_THREADS=1 python -m benchmarks.support [--worlds 0 3] [--seeds 11 12 13]

One row per finished (world, lists, share, seed, policy) goes into `benchmarks/results/support.jsonl`; a later call goes on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from benchmarks.estimators import TRUTH_SEED, make_log
from benchmarks.rows import RESULTS, ROOT, append_row, commit, read_rows
from esrl_ray.config import Config, load_config
from esrl_ray.evaluation.frozen import play
from esrl_ray.evaluation.offline import Estimate, OffPolicy, Settings
from esrl_ray.evaluation.support import SupportLimits
from esrl_ray.policy.policy import Policy

LISTS, SHARES = (6_000, 12_000, 20_000), (0.125, 0.25, 0.5, 1.0)
WIDTHS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
SESSIONS = 3_000
"""Behind each real value: its standard error is about .4."""
WILD = 1 / 3
"""An estimate further off than this share of the real value."""
OFF = SupportLimits(0, 0, 0.0, 0.0, 0.0, max_width=1e9)


class Row(msgspec.Struct, frozen=True):
    """One policy, judged by one log around control."""

    world: int
    lists: int
    share: float  # of users who explore
    seed: int
    policy: str
    truth: float
    explore_lists: int
    earned: float  # root mean square of what sessions earn
    faults: list[str]  # of the default limits, but for the interval's
    fqe: Estimate
    dr: Estimate
    commit: str

    def error(self, name: str) -> float:
        """Relative to the truth."""
        estimate: Estimate = getattr(self, name)
        return abs(estimate.mean - self.truth) / self.truth

    def width(self, name: str) -> float:
        """Of the 95 % interval, as `SupportLimits.max_width` counts."""
        estimate: Estimate = getattr(self, name)
        return (estimate.ci_high - estimate.ci_low) / self.earned


def vectors(config: Config) -> dict[str, Policy]:
    """Control, one that only looks at clicks, and random ones, far from control and inside the bounds around it."""
    spec, rng = config.spec.build(), np.random.default_rng(5)
    actions = {"control": np.zeros(spec.num_actions), "clicks": np.zeros(spec.num_actions)}
    actions["clicks"][: spec.num_scores] = (1, -0.5, -0.5, -0.25, -0.2)
    for name, width in (("far", 0.6), ("near", 0.3)):
        actions |= {f"{name} {i}": rng.uniform(-width, width, spec.num_actions) for i in range(3)}
    return {name: Policy.static(spec, a.astype(np.float32)) for name, a in actions.items()}


def measure(world: int, lists: int, share: float, seed: int, truths: dict[tuple[int, str], float], *, code: str) -> Iterator[Row]:
    """All policies by one log; real values are played once and kept in `truths`."""
    shares = [f"exploration.explore_share={share}", f"exploration.exploit_share={min(0.5, 1 - share)}"]
    config = load_config(ROOT / "configs" / "demo.yaml", [f"simulation.world_seed={world}", *shares])
    policies = vectors(config)
    for name, policy in policies.items():
        if (world, name) not in truths:
            truths[world, name] = float(play(policy, config, seed=TRUTH_SEED, sessions=SESSIONS)[0].mean())
    steps = make_log(config, [policies["control"]], seed=seed, num_steps=lists)
    settings = Settings(limits=OFF, resamples=100)
    log = OffPolicy(steps, config, num_candidates=config.simulation.num_candidates, seed=seed, settings=settings)
    for name, policy in policies.items():
        value = log.value(policy, by_density=False)
        fqe, dr = (Estimate.of(value.estimates[estimator]) for estimator in ("fqe", "dr"))
        faults, explore = value.support.faults(SupportLimits()), int(log.lists.explored.sum())
        yield Row(world, lists, share, seed, name, truths[world, name], explore, log.earned, faults, fqe, dr, code)


def report(rows: Sequence[Row]) -> str:
    """Markdown."""
    supported, most = [r for r in rows if not r.faults], SupportLimits().max_width
    commits, worlds, seeds = (sorted({getattr(r, of) for r in rows}) for of in ("commit", "world", "seed"))
    num_logs = len({(r.world, r.lists, r.share, r.seed) for r in rows})
    text = [
        "# Which limit keeps broken estimates out",
        "",
        f"Written by `python -m benchmarks.support`; commits {', '.join(commits)}; worlds {worlds}, seeds {seeds}; logs of one round "
        f"around control, 600 gradient steps of the features, 100 resamples; real values from {SESSIONS:,} sessions. "
        f"{len(rows)} values of {num_logs} logs, {len(supported)} of them inside the other default limits: those count here. Wild: more "
        "than a third off the real value.",
        "",
        "| limit | fqe: let through | wild | worst error | dr: let through | wild | worst error |",
        "|---|---|---|---|---|---|---|",
        _line("none", supported, supported),
    ]
    for least in (1_500, 3_000, 6_000, 12_000):
        kept = [r for r in supported if r.explore_lists >= least]
        text.append(_line(f"explore lists at least {least:,}", kept, kept))
    for least in LISTS[1:]:
        kept = [r for r in supported if r.lists >= least]
        text.append(_line(f"lists at least {least:,}", kept, kept))
    for width in WIDTHS:
        by = [[r for r in supported if r.width(name) <= width] for name in ("fqe", "dr")]
        text.append(_line(f"**interval at most {width:g}**" if width == most else f"interval at most {width:g}", *by))
    text += [
        "",
        "The interval is that of 95 % over users, in root mean squares of what the log's sessions earn (`SupportLimits.max_width`).",
        "",
        "By size of the log, inside all limits: let through, and the worst error of those",
        "",
        "| lists | explore share | fqe | dr |",
        "|---|---|---|---|",
    ]
    for lists, share in itertools.product(LISTS, SHARES):
        mine = [r for r in rows if (r.lists, r.share) == (lists, share)]
        cells = [_cell([r for r in mine if not r.faults and r.width(n) <= most], len(mine), n) for n in ("fqe", "dr")]
        text.append(f"| {lists:,} | {share:.1%} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _line(limit: str, fqe: Sequence[Row], dr: Sequence[Row]) -> str:
    cells = []
    for name, rows in (("fqe", fqe), ("dr", dr)):
        errors = [r.error(name) for r in rows]
        cells += [str(len(rows)), str(sum(e > WILD for e in errors)), f"{max(errors, default=0):.0%}"]
    return f"| {limit} | {' | '.join(cells)} |"


def _cell(rows: Sequence[Row], of: int, name: str) -> str:
    return f"{len(rows)} of {of}" + (f", {max(r.error(name) for r in rows):.0%}" if rows else "")


def main() -> None:
    """Measure what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--out", type=Path, default=RESULTS / "support.jsonl", help="rows; the report stands beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    finished, code = {(r.world, r.lists, r.share, r.seed) for r in read_rows(options.out, Row)}, commit()
    truths: dict[tuple[int, str], float] = {}
    for key in itertools.product(options.worlds, LISTS, SHARES, options.seeds):
        if key not in finished:
            for row in list(measure(*key, truths, code=code)):
                append_row(options.out, row)
                print(f"{key} {row.policy}: {row.truth:.1f}, fqe {row.fqe.mean:.1f}, dr {row.dr.mean:.1f}", flush=True)
    options.out.with_suffix(".md").write_text(report(read_rows(options.out, Row)))


if __name__ == "__main__":
    main()
