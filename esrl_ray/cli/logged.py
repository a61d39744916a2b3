"""`--log PATH`: a log to learn from or to evaluate on, be it a run's folder, a step log, or Parquet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esrl_ray.cli.log import parse_as_of
from esrl_ray.config import Config
from esrl_ray.errors import InputDataError, LogError, SpecMismatch
from esrl_ray.evaluation.second_tier import Rule, held_out_rows
from esrl_ray.replay.logged import logged_steps, with_means
from esrl_ray.replay.steps import Steps
from streaming.recompute import check_rewards
from streaming.steplog import last_commits, list_workers, read_steps
from streaming.steptable import merge_steps, step_schema

_DIGEST = re.compile(r"[0-9a-f]{16}")
_WHAT = "name a run's folder, its log/<spec digest> with one Delta table per ingest worker, or a Parquet file of the same columns"


@dataclass(frozen=True, slots=True)
class ReadLog:
    """A log in memory, in order of event time.

    Attributes:
        steps: Its steps.
        table: Their rows, one whole row per step.
        where: Where it was.
        lineage: How far it was read, {worker: commit}; empty for Parquet.
    """

    steps: Steps
    table: pa.Table
    where: str
    lineage: dict[str, int]

    @property
    def num_sessions(self) -> int:
        """Sessions in it."""
        return len(set(self.steps.sessions.tolist()))

    def of_users(self, config: Config, *, held_out: bool) -> ReadLog:
        """The log of the users whom the deployment leaves out of learning, or of all others.

        Raises:
            LogError: there is nobody among them.
        """
        aside = held_out_rows(self.table, rule=Rule(held_out_share=config.policy.held_out_share))
        table = self.table.filter(pa.array(aside if held_out else ~aside))
        if not len(table):
            share, who = config.policy.held_out_share, "held out" if held_out else "left to learn from"
            raise LogError(
                f"of {len(self.table)} steps none is of a user {who} (policy.held_out_share {share:g})", self.where, "change the share"
            )
        return ReadLog(logged_steps(table, config, self.where), table, self.where, self.lineage)


def read_log(path: str, config: Config, as_of: Sequence[str] = ()) -> ReadLog:
    """Read a log.

    Args:
        path: A run's folder (`run.dir`), the folder of its step log, or a Parquet file or folder of `step_schema`'s columns.
        config: Deployment that it must be of.
        as_of: `N` or `worker=N` as in `esrl log show`; without it everything that is committed now.

    Raises:
        LogError: nothing there that is a log, a log without steps, or one of another reward.
        SpecMismatch: a step log of another spec.
        InputDataError: columns that do not fit the deployment.
        ConfigError: `as_of` is malformed or names an unknown worker.
    """
    found = Path(path)
    if "://" not in path and not found.exists():
        raise LogError("there is nothing there", path, _WHAT)
    if is_parquet(found):
        return _in_order(_read_parquet(path), config, path, str(found.resolve()), {})
    root = step_log_root(path, config.spec.build().digest)
    workers = list_workers(root)
    check_rewards(root, config.reward)
    lineage = parse_as_of(tuple(as_of), workers) if as_of else last_commits(root, workers)
    table = read_steps(root, as_of=lineage)
    if not len(table):
        cut = f" up to {' '.join(f'{w}@{n}' for w, n in sorted(lineage.items()))}" if as_of else ""
        raise LogError(f"the step log holds no steps{cut}", root, "wait until sessions have closed, or name another log")
    return _in_order(table, config, root, root if "://" in root else str(Path(root).resolve()), lineage)


def is_parquet(path: Path) -> bool:
    """Whether this is a file, or a folder of Parquet files that is no table of a step log."""
    return path.is_file() or (path.is_dir() and any(path.glob("*.parquet")) and not (path / "_delta_log").exists())


def step_log_root(path: str, digest: str) -> str:
    """The folder of the workers' tables of a spec, in a run's folder, in that of its step logs, or itself.

    Raises:
        LogError: there is no step log.
        SpecMismatch: there are logs of other specs only.
    """
    base = path.rstrip("/")
    for candidate in (base, f"{base}/{digest}", f"{base}/log/{digest}"):
        if list_workers(candidate):
            name = candidate.rsplit("/", 1)[-1]
            if _DIGEST.fullmatch(name) and name != digest:
                text = f"the step log is of spec {name}, the configuration's is {digest}"
                raise SpecMismatch(text, candidate, "give the configuration that it was written with, --config")
            return candidate
    if "://" not in base:
        folders = [f for parent in (Path(base), Path(base) / "log") if parent.is_dir() for f in parent.iterdir()]
        if others := sorted(f.name for f in folders if _DIGEST.fullmatch(f.name)):
            text = f"the step log is of spec {', '.join(others)}, the configuration's is {digest}"
            raise SpecMismatch(text, base, "give the configuration that it was written with, --config")
        if (Path(base) / "_delta_log").is_dir():
            raise LogError("this is the table of one ingest worker", base, "name the folder above it")
    raise LogError("there is no step log", base, _WHAT)


def _in_order(table: pa.Table, config: Config, path: str, where: str, lineage: dict[str, int]) -> ReadLog:
    if "event_time_ms" in table.column_names:  # else `logged_steps` says that it is missing
        table = table.sort_by("event_time_ms")
    return ReadLog(logged_steps(table, config, path), table, where, lineage)


def _read_parquet(path: str) -> pa.Table:
    """Rows of a Parquet file or folder, later revisions merged into their steps when there are any."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputDataError(f"not Parquet: {str(error).splitlines()[0]}", path, _WHAT) from error
    table = with_means(table)
    names = table.column_names
    whole = [name for name in step_schema().names if name not in names] == [] and len(table) > 0
    if whole and (table["states"].null_count or pc.count_distinct(table["step_id"]).as_py() < len(table)):
        try:
            return merge_steps(table.select(step_schema().names).cast(step_schema()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputDataError(f"columns have another type: {str(error).splitlines()[0]}", path, "see step_schema") from error
    return table
