"""Three layers on a KuaiRand log: real data, planted controls, placebos; with leak guards and thresholds. `make bench-kuairand`

One row per finished (layer, method, seed) goes into `benchmarks/results/kuairand.jsonl`; a later call goes on with those that are missing.
The upstream models are fitted once (minutes) and cached.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from benchmarks.kuairand_methods import (
    PERMUTED_ACTIONS,
    PERMUTED_REWARDS,
    RL,
    SETTINGS,
    WIDTH,
    Gain,
    cem,
    compare,
    fixed,
    supervised,
)
from benchmarks.kuairand_report import Row, checks, warnings, write_report
from benchmarks.rows import RESULTS, ROOT, append_row, commit, read_rows
from esrl_ray.config import load_config
from esrl_ray.evaluation.metrics import LabelledPairs, policy_scores
from esrl_ray.methods.enhancedrl import EnhancedRL
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.simulation.kuairand_bench import Bench, learn_rounds, permute_rewards, plant, read_bench, with_control
from esrl_ray.simulation.kuairand_replay import default_cache
from esrl_ray.vocabulary import Floats

FIXED = ("control", "click", "long_view", "rank-sum-7", "rank-sum-4", "tab", "user-only")
SUPERVISED = {
    "supervised": (PolicyKind.PAIR, WIDTH),
    "supervised-full": (PolicyKind.PAIR, 1.0),
    "supervised-user": (PolicyKind.REQUEST, 1.0),
}
LIST_SUM, SPLIT, PRINTED, PER_PAIR = RL
LEARNT = (LIST_SUM, SPLIT, PER_PAIR, *(method + PERMUTED_REWARDS for method in (LIST_SUM, SPLIT, PER_PAIR)))
DIAGNOSTICS = (LIST_SUM + PERMUTED_ACTIONS, PRINTED)
"""Run with the first seed only."""
LAYERS = {
    "real": (*FIXED, "cem", *SUPERVISED, *LEARNT),
    "item": ("control", "cem", *SUPERVISED, *LEARNT, *DIAGNOSTICS),
    "user": ("control", "cem", *SUPERVISED, *LEARNT, *DIAGNOSTICS),
}
QUICK_LAYERS = {
    "real": ("control", "user-only", "cem", LIST_SUM),
    "item": ("cem", "supervised", LIST_SUM, SPLIT, LIST_SUM + PERMUTED_REWARDS),
}
PLANT_SEED = 0


class Effort(msgspec.Struct, frozen=True):
    """How much is spent on one run."""

    rounds: int = 6
    steps: int = 300  # per round
    supervised_steps: int = 600
    cem_rounds: int = 10


QUICK = Effort(rounds=2, steps=30, supervised_steps=60, cem_rounds=1)


def measure(world: Bench, bench: Bench, layer: str, method: str, seed: int, *, effort: Effort, commit: str) -> Row:
    """Train one method and judge it.

    Args:
        world: The layer, with the deployment's control.
        bench: The same, its control is the CEM vector of this seed.
        layer: Noted in the row.
        method: Of `LAYERS`.
        seed: Of everything random in training.
        effort: Rounds and steps.
        commit: Of the code, noted in the row.
    """
    started, vector = time.perf_counter(), Policy.static(bench.config.spec.build())
    control = Policy.static(world.config.spec.build())
    policies: list[Policy] = []
    if method in FIXED:
        scorer = fixed(method, world)
    elif method == "cem":
        scorer = fixed("control", bench)
    elif method in SUPERVISED:
        level, width = SUPERVISED[method]
        policies = [supervised(bench, level=level, width=width, seed=seed, steps=effort.supervised_steps)]
    else:
        policies = list(_learn(bench, method, seed, effort))
    seconds = time.perf_counter() - started

    def scores(policy: Policy | None, pairs: LabelledPairs) -> Floats:
        return scorer(pairs) if policy is None else policy_scores(policy, pairs)

    def against(policy: Policy | None, pairs: LabelledPairs, grouping: str = "user_block") -> tuple[Gain, Gain]:
        return compare(scores(policy, pairs), policy_scores(vector, pairs), pairs, grouping=grouping)

    last = policies[-1] if policies else None
    gated_round: int | None = None
    if len(policies) > 1:
        bounds = [0.0, *(against(p, bench.dev)[1].low for p in policies)]
        gated_round = int(np.argmax(bounds))
    (gauc, gain), (gauc_tab, gain_tab) = against(last, bench.test), against(last, bench.test, "user_tab")
    return Row(
        layer,
        method,
        seed,
        effort == QUICK,
        gauc=gauc,
        gauc_tab=gauc_tab,
        gain=gain,
        gain_tab=gain_tab,
        gain_control=compare(scores(last, bench.test), policy_scores(control, bench.test), bench.test)[1],
        gain_random=None if bench.random is None else against(last, bench.random)[1],
        gated_round=gated_round,
        gated_gain=None if gated_round is None else against([vector, *policies][gated_round], bench.test)[1],
        gradient_steps=effort.rounds * effort.steps if len(policies) > 1 else 0,
        seconds=seconds,
        commit=commit,
        machine=f"{os.cpu_count()} cores {platform.machine()}",
    )


def _learn(bench: Bench, method: str, seed: int, effort: Effort) -> Iterator[Policy]:
    name, _, placebo = method.partition("/")
    count = len(bench.lists)
    budget = effort.steps * 128 / count
    settings = [
        *SETTINGS,
        *RL[name],
        f"replay.samples_per_insert={budget}",
        f"exploration.round_steps={count}",
        "exploration.warmup_steps=1",
    ]
    configured = load_config(ROOT / "configs" / "kuairand.yaml", settings)
    bench = replace(bench, config=configured.model_copy(update={"spec": bench.config.spec}))
    if f"/{placebo}" == PERMUTED_REWARDS:
        bench = permute_rewards(bench, seed=seed)
    learner = EnhancedRL(name, bench.config, seed=seed)
    return learn_rounds(learner, bench, rounds=effort.rounds, seed=seed, permute_actions=f"/{placebo}" == PERMUTED_ACTIONS)


def run(
    real: Bench, path: Path, *, layers: Mapping[str, Sequence[str]], seeds: Sequence[int], effort: Effort, commit: str, limit_s: float
) -> list[Row]:
    """Measure what is missing in a file of rows, a row at a time; seed by seed, so that an early end leaves whole comparisons.

    Args:
        real: The real log.
        path: File of rows; grows.
        layers: Methods of each layer.
        seeds: Of training; the first one also runs what needs one seed only.
        effort: Rounds and steps.
        commit: Noted in new rows.
        limit_s: Start no run later than this.

    Returns:
        All rows.
    """
    rows, started = read_rows(path, Row), time.monotonic()
    for seed, layer in itertools.product(seeds, layers):
        finished = {r.method for r in rows if r.layer == layer and (r.seed == seed or r.method in (*FIXED, *DIAGNOSTICS))}
        missing = [m for m in layers[layer] if m not in finished]
        if not missing or time.monotonic() - started > limit_s:
            continue
        world = real if layer == "real" else plant(real, "item" if layer == "item" else "user", seed=PLANT_SEED)
        bench = with_control(world, cem(world, seed=seed, rounds=effort.cem_rounds))
        for method in missing:
            if (spent := time.monotonic() - started) > limit_s:
                break
            row = measure(world, bench, layer, method, seed, effort=effort, commit=commit)
            rows.append(row)
            append_row(path, row)
            found = f"{row.gauc.mean:.4f}, {row.gain.mean:+.4f} over CEM"
            print(f"{spent:6.0f} s  {layer:5} seed {seed} {method:42} {found}", flush=True)
    return rows


def main() -> None:
    """Measure what is missing, print every threshold, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "kuairand", help="folder of KuaiRand files")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, into runs/kuairand-quick.jsonl: plumbing only")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no run later than this")
    parser.add_argument("--out", type=Path, help="rows; the report stands beside it")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out or (ROOT / "runs" / "kuairand-quick.jsonl" if options.quick else RESULTS / "kuairand.jsonl")
    if options.report_only:
        rows = read_rows(path, Row)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        if options.quick:
            path.unlink(missing_ok=True)
        config = load_config(ROOT / "configs" / "kuairand.yaml", [])
        real = read_bench(config, options.data, cache=default_cache(), say=lambda line: print(line, flush=True))
        seeds = [0] if options.quick else [int(s) for s in options.seeds.split(",")]
        layers, effort = (QUICK_LAYERS, QUICK) if options.quick else (LAYERS, Effort())
        rows = run(real, path, layers=layers, seeds=seeds, effort=effort, commit=commit(), limit_s=options.limit_s)
    if rows:
        print(*checks(rows), *warnings(rows), sep="\n")
        write_report(rows, path.with_suffix(".md"))


if __name__ == "__main__":
    main()
