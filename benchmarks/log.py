"""The step log after many commits: `make bench-log` writes benchmarks/results/log.md.

A table with `--commits` commits and one with a hundredth of them are then committed to, opened and restored in turns, so that both have the
same machine; the ratio is what counts. Rows are small, so that what is measured is the log and not Parquet. What the clean-up looks at, the
times of files and commits, is as if the commits had come at `ingest.commit_interval_s` and ended now.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.rows import commit as code_version
from benchmarks.timing import Table
from esrl_ray.config import Config, LogConfig, load_config
from esrl_ray.vocabulary import Ended, StepRow
from streaming.logfiles import list_files
from streaming.steplog import StepLog, WorkerState, read_commits, rows_to_table

RESULTS = Path(__file__).parent / "results" / "log.md"
CONFIG = load_config("configs/demo.yaml")
INTERVAL_MS = round(1000 * CONFIG.ingest.commit_interval_s)
BUDGET_MS = INTERVAL_MS // 2
TABLES = 500
STATE_BYTES = 10_000
START_MS = 1_790_000_000_000


def rows(n: int, config: Config, count: int = 20, pairs: int = 3) -> pa.Table:
    """Some steps of commit n."""
    spec, rng = config.spec.build(), np.random.default_rng(n)

    def numbers(width: int) -> np.ndarray:
        return rng.normal(size=(pairs, width)).astype(np.float32)

    return rows_to_table(
        [
            StepRow(
                step_id=f"{n}-{i}", revision=0, session_id=f"s{i}", user_id=f"u{i}", index=n, partition=0, offset=n,
                event_time_ms=START_MS + n, closed_ms=START_MS + n, arm="explore", policy_version=1, round=0, num_candidates=50,
                shown=np.ones(pairs, np.bool_),
                behaviours=numbers(len(config.reward.behaviours)), rewards=numbers(config.reward.num_groups), next_id=None,
                ended=Ended.TERMINATED, item_ids=tuple(map(str, range(pairs))), positions=np.arange(pairs, dtype=np.int32),
                states=numbers(spec.num_features), categorical=np.zeros((pairs, spec.num_categorical), np.int32),
                scores=numbers(spec.num_scores), actions=numbers(spec.num_actions), anchor_actions=numbers(spec.num_actions),
                fused_scores=numbers(1)[:, 0], candidate_means=np.ones(spec.num_features + spec.num_scores, np.float32),
            )
            for i in range(count)
        ]
    )  # fmt: skip


def clock_ms() -> int:
    """Wall clock."""
    return time.time_ns() // 1_000_000


class Log:
    """A table that is committed to."""

    def __init__(self, root: Path, care: LogConfig, num_commits: int) -> None:
        self._root, self._care, self.committed, self._tables = root, care, 0, [rows(n, CONFIG) for n in range(TABLES)]
        self._began_ms, self._aged = clock_ms() - num_commits * INTERVAL_MS, set[Path]()
        self._log = self._open()
        self.tidy_s: list[float] = []

    def _open(self) -> StepLog:
        return StepLog(self._root, "w", "bench", CONFIG.spec.build(), self._care)

    def commit(self) -> float:
        """One more; its time in seconds, without the care after it."""
        n = self.committed
        joiners = {0: [b"x" * STATE_BYTES]}
        state = WorkerState(commit=n, incarnation="bench", positions={"decisions/0": n}, joiners=joiners, committed_ms=self._clock_ms())
        start = time.perf_counter()
        self._log.commit(state, self._tables[n % len(self._tables)])
        took = time.perf_counter() - start
        self.committed, start = n + 1, time.perf_counter()
        if self._log.tidy(self._clock_ms, BUDGET_MS):
            self.tidy_s.append(time.perf_counter() - start)
            self._age()
        return took

    def _clock_ms(self) -> int:
        return self._began_ms + self.committed * INTERVAL_MS

    def _age(self) -> None:
        """Give the log's entries the times that they would have."""
        entries = set((self._root / "w" / "_delta_log").glob("*.json"))
        for path in sorted(entries - self._aged):
            os.utime(path, (self._clock_ms() / 1e3,) * 2)
        self._aged = entries

    def restart(self) -> float:
        """Open and restore, as a worker that comes back; seconds."""
        start = time.perf_counter()
        self._log = self._open()
        if self._log.restore() is None:
            raise RuntimeError("nothing was restored")
        return time.perf_counter() - start

    def read_last(self) -> float:
        """Read the last ten commits, as a replay shard closes a gap; seconds."""
        start = time.perf_counter()
        if len(list(read_commits(self._root, "w", self.committed - 11))) != 10:
            raise RuntimeError("there are not ten commits")
        return time.perf_counter() - start

    def facts(self) -> tuple[int, int, float]:
        """Files of the table, entries of its log, and its megabytes on disk."""
        folder = self._root / "w"
        on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return len(list_files(self._log._table)), len(list((folder / "_delta_log").glob("*.json"))), on_disk / 1e6


def compare(num_commits: int, care: LogConfig, rounds: int) -> Table:
    """A long table beside a fresh one."""
    with tempfile.TemporaryDirectory() as folder:
        long, fresh = Log(Path(folder, "long"), care, num_commits), Log(Path(folder, "fresh"), care, num_commits // 100)
        for table, count in ((fresh, num_commits // 100), (long, num_commits)):
            while table.committed < count:
                table.commit()
        calls: dict[str, Callable[[Log], float]] = {
            "commit": Log.commit, "restart: open and restore": Log.restart, "read the last 10 commits": Log.read_last
        }  # fmt: skip
        lines: list[tuple[str, ...]] = []
        for name, call in calls.items():
            times: dict[Log, list[float]] = {fresh: [], long: []}
            for _ in range(rounds if name == "commit" else max(10, rounds // 5)):
                for table, own in times.items():
                    own.append(call(table))
            before, after = (1e3 * statistics.median(own) for own in times.values())
            lines.append((name, f"{before:.1f} ms", f"{after:.1f} ms", f"{after / before:.2f}"))
        for name, place, form in (("files", 0, "{:,}"), ("entries of the log", 1, "{:,}"), ("on disk [MB]", 2, "{:.1f}")):
            lines.append((name, *(form.format(table.facts()[place]) for table in (fresh, long)), ""))
    title = f"{num_commits:,} commits, {INTERVAL_MS / 1000:g} s apart"
    notes = [
        f"Care every {care.tidy_every} commits: median {1e3 * statistics.median(long.tidy_s):.0f} ms, "
        f"95th percentile {1e3 * float(np.percentile(long.tidy_s, 95)):.0f} ms, at most {1e3 * max(long.tidy_s):.0f} ms."
    ]
    columns = ("", f"{num_commits // 100:,} commits", f"{num_commits:,} commits", "ratio")
    return Table(title, "at most 1.5 times a fresh table", columns, lines, notes)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    table = compare(arguments.commits, LogConfig(), arguments.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    head = [
        "# The step log after many commits",
        f"`make bench-log` at {code_version()}, one process of a shared machine; its memory at the end {peak:.0f} MB at most.",
        "Both tables are committed to in turns; medians of wall time. 20 small steps a commit, 10 kB of state.",
    ]
    text = "\n".join([*head, "", table.markdown(), ""])
    print(text)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
