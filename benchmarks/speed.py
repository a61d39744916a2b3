"""Every speed benchmark of learning and replay in one run, written down: `make bench-speed ARGS=--quick`

Calls take turns in one process with one thread, so that only ratios mean anything on a machine that others use too.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.buffers import sampling
from benchmarks.learner import ensemble, through_rllib
from benchmarks.pipelines import pipelines
from benchmarks.replay import LISTS_PER_SESSION, make_tables
from benchmarks.rows import RESULTS, ROOT, commit
from benchmarks.timing import Table
from esrl_ray.config import Config, load_config

MACHINE = "2 cores x86_64, shared"


def run(config: Config, *, quick: bool, stock: bool, num_steps: int) -> list[Table]:
    """All tables, printed as they are made.

    Args:
        config: Deployment.
        quick: A few rounds of each: under three minutes.
        stock: Also SAC with RLlib's own reading of the log, which starts Ray.
        num_steps: In replay buffers.
    """
    compiled = config.model_copy(update={"learner": config.learner.model_copy(update={"compile": True})})
    full = config.model_copy(
        update={"replay": config.replay.model_copy(update={"capacity": num_steps, "samples_per_insert": 1e12, "min_size": 1})}
    )
    makers: tuple[Callable[[], Table], ...] = (
        lambda: through_rllib(config, compiled=None if quick else compiled, rounds=15 if quick else 60),
        lambda: ensemble(config, rounds=15 if quick else 60),
        lambda: pipelines(config, num_steps=5_000, rounds=10 if quick else 40, stock=stock),
        lambda: sampling(full, make_tables(full, num_steps), session_length=LISTS_PER_SESSION, rounds=5 if quick else 20),
    )
    tables = []
    for make in makers:
        tables.append(make())
        print(tables[-1].markdown(), "\n", flush=True)
    return tables


def main() -> None:
    """Write benchmarks/results/speed.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="a few rounds of each: under three minutes")
    parser.add_argument("--no-stock", action="store_true", help="without RLlib's own reading of the log, which starts Ray")
    parser.add_argument("--steps", type=int, default=20_000, help="in replay buffers")
    parser.add_argument("--machine", default=MACHINE)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a local Ray leaves a token file in the home folder
    config = load_config(arguments.config, arguments.overrides)
    tables = run(config, quick=arguments.quick, stock=not arguments.no_stock, num_steps=arguments.steps)
    head = (
        f"Commit {commit()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {arguments.machine}; {'quick' if arguments.quick else 'full'} "
        "run, calls in turns in one process, one thread; medians. Made by `make bench-speed`."
    )
    arguments.out.write_text("\n\n".join(["# Speed of learning and replay", head, *(table.markdown() for table in tables)]) + "\n")


if __name__ == "__main__":
    main()
