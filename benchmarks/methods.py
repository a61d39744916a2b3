"""All methods in simulated worlds: one row per finished (method, world, seed), then tables and plots. `make bench-methods`

A row is written when it is finished, into `benchmarks/results/methods.jsonl`; a later call goes on with the rows that are missing. Every
method serves the same traffic of a (world, seed): `NUM_STEPS` list requests in rounds, then plays frozen on unseen sessions with common
random numbers. Worlds 0 and 3 were tuned on; results are reported on the others.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.methods_report import write_report
from benchmarks.methods_rows import CONTROL, METHODS, Point, Row
from benchmarks.rows import RESULTS, ROOT, append_row, commit, read_rows
from esrl_ray.config import Config, load_config
from esrl_ray.evaluation.arms import clustered_mean
from esrl_ray.evaluation.frozen import UNSEEN, play
from esrl_ray.methods.catalogue import create_method
from esrl_ray.methods.method import Exploration, Method
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.simulation.oracle import ORACLES, create_oracle
from esrl_ray.simulation.rounds import learn_online

NUM_STEPS, ROUND_STEPS = 60_000, 10_000


def configure(name: str, world: int) -> Config:
    """The demo's deployment in a world, all users exploring unless the method says otherwise."""
    fixed = ["exploration.explore_share=1", "exploration.exploit_share=0", f"exploration.round_steps={ROUND_STEPS}"]
    return load_config(ROOT / "configs" / "demo.yaml", [*fixed, f"simulation.world_seed={world}", *METHODS[name].overrides])


@dataclass(frozen=True)
class Forgetful:
    """A method that does not see all that a log says."""

    method: Method
    forget: Callable[[Steps], None]

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    def exploration(self) -> Exploration:
        """The method's."""
        return self.method.exploration()

    def fit(self, steps: Steps) -> Policy:
        """Forgets in `steps` itself."""
        self.forget(steps)
        return self.method.fit(steps)


def measure(name: str, world: int, seed: int, *, num_steps: int, sessions: int, commit: str) -> Row:
    """Train one method and play it.

    Args:
        name: In `METHODS` or `ORACLES`.
        world: Seed of users and items.
        seed: Of traffic, noise and parameters.
        num_steps: List requests.
        sessions: Played frozen; half as many for each point of the curve.
        commit: Of the code, noted in the row.
    """
    torch.set_num_threads(1)
    config = configure(CONTROL if name in ORACLES else name, world)
    users = (np.arange(sessions) % config.simulation.num_users).astype(str)
    started = time.perf_counter()
    curve: list[Point] = []
    gradient_steps = 0
    if name in ORACLES:
        ranked = create_oracle(name, config, seed=seed)
    else:
        ranked = Policy.static(config.spec.build())
        method = create_method(METHODS[name].method, config, seed=seed)
        if (forget := METHODS[name].forget) is not None:
            method = Forgetful(method, forget)
        for steps, policy in learn_online(method, config, seed=seed, num_steps=num_steps):
            rewards, _, _ = play(policy, config, seed=seed + UNSEEN, sessions=sessions // 2)
            curve.append(Point(steps, float(rewards.mean())))
            ranked, gradient_steps = policy, policy.manifest.gradient_steps
    seconds = time.perf_counter() - started
    rewards, pages, watch_s = play(ranked, config, seed=seed + UNSEEN, sessions=sessions)
    mean, low, high = clustered_mean(rewards, users)
    return Row(
        name,
        world,
        seed,
        num_steps,
        reward=mean,
        ci_low=low,
        ci_high=high,
        pages=float(pages.mean()),
        watch_s=float(watch_s.mean()),
        gradient_steps=gradient_steps,
        seconds=seconds,
        curve=tuple(curve),
        commit=commit,
        machine=f"{os.cpu_count()} cores {platform.machine()}",
        sessions=sessions,
    )


def _missing(
    rows: Sequence[Row], names: Sequence[str], worlds: Sequence[int], seeds: Sequence[int], num_steps: int
) -> Iterator[tuple[str, int, int]]:
    finished = {(row.method, row.world, row.seed) for row in rows if row.num_steps == num_steps}
    for seed, world, name in itertools.product(seeds, worlds, names):  # seed by seed: an early end leaves whole comparisons
        if (name, world, seed) not in finished:
            yield name, world, seed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join([*METHODS, *ORACLES]), help="names, comma-separated")
    parser.add_argument("--worlds", default="1,2,4", help="world seeds, comma-separated")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds, comma-separated")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="list requests per run")
    parser.add_argument("--sessions", type=int, default=2000, help="unseen sessions that a policy is played on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no run later than this")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.jsonl", help="rows; the report stands beside it")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    names = options.methods.split(",")
    worlds, seeds = ([int(x) for x in text.split(",")] for text in (options.worlds, options.seeds))
    if unknown := sorted(set(names) - {*METHODS, *ORACLES}):
        parser.error(f"no methods {unknown}; there are {', '.join([*METHODS, *ORACLES])}")
    rows, started = read_rows(options.out, Row), time.monotonic()
    wanted = [] if options.report_only else list(_missing(rows, names, worlds, seeds, options.steps))
    print(f"{len(rows)} rows are there, {len(wanted)} are missing", flush=True)
    queue, failed = iter(wanted), list[str]()
    job = partial(measure, num_steps=options.steps, sessions=options.sessions, commit=commit())
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(job, *key): key for key in itertools.islice(queue, options.jobs)}
        while running:
            future = next(as_completed(running))
            name, world, seed = running.pop(future)
            if (error := future.exception()) is not None:
                failed.append(f"{name} world {world} seed {seed}: {error!r}")
                print(f"FAILED {failed[-1]}", flush=True)
            else:
                rows.append(row := future.result())
                append_row(options.out, row)
                write_report([row for row in rows if row.num_steps == options.steps], options.out.with_suffix(""))
                print(f"{time.monotonic() - started:6.0f} s  {row}", flush=True)
            if time.monotonic() - started < options.limit_s and (key := next(queue, None)) is not None:
                running[pool.submit(job, *key)] = key
    write_report([row for row in rows if row.num_steps == options.steps], options.out.with_suffix(""))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, see above")


if __name__ == "__main__":
    main()
