"""Replay: sampling against other buffers, insertion, memory; and the step log's commits and reads. `python -m benchmarks.replay`

Times are of the processor (one thread), because machines are shared; wall time stands beside them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from benchmarks.buffers import sampling
from esrl_ray.config import Config, LogConfig, load_config
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.vocabulary import Ended, Floats, StepRow
from streaming.steplog import StepLog, WorkerState, read_commits, read_steps
from streaming.steptable import rows_to_table

LISTS_PER_SESSION = 10
STEPS_PER_COMMIT = 250


def make_rows(config: Config, num_steps: int) -> list[StepRow]:
    """Whole sessions of random lists."""
    spec, g, rng = config.spec.build(), config.max_pairs, np.random.default_rng(0)

    def draw(width: int) -> Floats:
        return rng.random((g, width), dtype=np.float32)

    rows = []
    for i in range(num_steps):
        last = i % LISTS_PER_SESSION == LISTS_PER_SESSION - 1
        rows.append(
            StepRow(
                step_id=f"{i:032x}",
                revision=0,
                session_id=f"s{i // LISTS_PER_SESSION}",
                user_id="u",
                index=i % LISTS_PER_SESSION,
                partition=0,
                offset=i,
                event_time_ms=i,
                closed_ms=i,
                arm="explore",
                policy_version=1,
                round=0,
                num_candidates=50,
                shown=np.arange(g) < config.serve.list_size,
                behaviours=draw(len(config.reward.behaviours)),
                rewards=draw(config.reward.num_groups),
                next_id=None if last else f"{i + 1:032x}",
                ended=Ended.TERMINATED if last else Ended.HAS_NEXT,
                item_ids=tuple(f"item{j}" for j in range(g)),
                positions=np.arange(g, dtype=np.int32),
                states=draw(spec.num_features),
                categorical=np.zeros((g, spec.num_categorical), np.int32),
                scores=draw(spec.num_scores),
                actions=draw(spec.num_actions),
                anchor_actions=draw(spec.num_actions),
                fused_scores=draw(1)[:, 0],
                candidate_means=np.ones(spec.num_features + spec.num_scores, np.float32),
            )
        )
    return rows


def timed(what: str, call: Callable[[], object], units: int) -> None:
    """Print the time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"{what:32} {cpu:7.3f} s cpu {wall:7.3f} s wall  {cpu / units * 1e6:8.1f} us each")


def make_tables(config: Config, num_steps: int) -> list[pa.Table]:
    """The same as tables of the step log, one per commit."""
    rows = make_rows(config, num_steps)
    return [rows_to_table(rows[i : i + STEPS_PER_COMMIT]) for i in range(0, num_steps, STEPS_PER_COMMIT)]


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--no-peers", action="store_true", help="sampling without RLlib's and TorchRL's buffers")
    arguments = parser.parse_args()
    num_steps = arguments.steps
    config = load_config("configs/demo.yaml", [f"replay.capacity={num_steps}", "replay.samples_per_insert=1e12"])
    tables: list[pa.Table] = []
    timed("rows and their tables, per step", lambda: tables.extend(make_tables(config, num_steps)), num_steps)

    def commit_all(log: StepLog, first: int, until: int) -> None:
        for n in range(first, until):
            log.commit(WorkerState(commit=n, incarnation="one", positions={}, joiners={0: [b"x" * 100_000]}, committed_ms=n), tables[n])

    with tempfile.TemporaryDirectory() as root:
        count = len(tables)
        log = StepLog(root, "w", "one", config.spec.build(), LogConfig(tidy_every=count))
        for first in range(0, count, max(1, count // 4)):
            until = min(count, first + max(1, count // 4))
            timed(f"commits {first}..{until - 1}, per commit", partial(commit_all, log, first, until), until - first)
        timed("open and restore", lambda: StepLog(root, "w", "two", config.spec.build()).restore(), 1)
        timed("read all commits, per step", lambda: [len(r) for _, r in read_commits(root, "w")], num_steps)
        timed("read the last commit", lambda: [len(r) for _, r in read_commits(root, "w", count - 2)], 1)
        timed("read merged steps, per step", lambda: read_steps(root), num_steps)
        refilled = ReplayBuffer(config, seed=0, read_log=lambda worker, after: read_commits(root, worker, after))
        timed("refill from the log, per step", lambda: refilled.refill(["w"]), num_steps)
        timed("merge small files", lambda: log.tidy(lambda: 0, 1), 1)
        timed("read merged steps, per step", lambda: read_steps(root), num_steps)

    buffer = ReplayBuffer(config, seed=0, read_log=lambda worker, after: [])

    def insert_all() -> None:
        for n, table in enumerate(tables):
            buffer.apply("w", n, table, inserted_ms=0)

    timed("insert, per step", insert_all, num_steps)
    print(f"memory of the columns            {buffer.num_bytes / 1e6:.1f} MB, {buffer.num_bytes / num_steps:.0f} bytes per step")
    torch.set_num_threads(1)
    print(sampling(config, tables, session_length=LISTS_PER_SESSION, rounds=50, peers=not arguments.no_peers).markdown())


if __name__ == "__main__":
    main()
