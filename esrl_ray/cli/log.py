"""`esrl log`: what the step log holds, commit by commit, and its rewards anew."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.table import Table

from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.forget import forget
from esrl_ray.cli.importing import import_files
from esrl_ray.config import load_config
from esrl_ray.errors import ConfigError
from streaming.recompute import recompute_rewards
from streaming.steplog import StepLog, commit_history, list_workers, read_commits, read_steps

COLUMNS = ("step_id", "revision", "session_id", "index", "arm", "policy_version", "event_time_ms", "ended", "next_id")


@click.group("log")
def log_group() -> None:
    """Look at the step log, fill it from files, apply another reward to it."""


log_group.add_command(forget)


@log_group.command("show")
@click.option("--config", "path", help="YAML of the deployment; without it the defaults.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/other.")
@click.option("--worker", help="Only this ingest worker, e.g. ingest-0.")
@click.option("--commit", type=click.IntRange(min=0), help="Read this commit's rows back; needs --worker when there are several.")
@click.option("--as-of", multiple=True, metavar="[WORKER=]N", help="Read the steps as they were after commit N of a worker, or of all.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Lines to print, the newest.")
def show(
    *, path: str | None, overrides: tuple[str, ...], worker: str | None, commit: int | None, as_of: tuple[str, ...], limit: int
) -> None:
    """List commits with rows and offsets, read one commit back, or read the steps as of a commit."""
    config = load_config(path, overrides, environment=os.environ)
    root = config.log_root
    found = list_workers(root)
    if not found:
        raise ConfigError("there is no step log of this configuration's spec", root, "name the run's folder with --set run.dir=...")
    workers = [worker] if worker is not None else found
    if unknown := set(workers) - set(found):
        raise ConfigError(f"unknown worker {sorted(unknown)[0]!r}, this log has {found}", "--worker")
    console = Console()
    if commit is not None:
        if len(workers) > 1:
            raise ConfigError(f"this log has the workers {workers}", "--commit", "name one with --worker")
        console.print(_rows(read_commit(root, workers[0], commit), f"commit {commit} of {workers[0]}", limit))
    elif as_of:
        at = parse_as_of(as_of, workers)
        steps = read_steps(root, as_of=at)
        console.print(_rows(steps, "steps as of " + " ".join(f"{w}@{n}" for w, n in sorted(at.items())), limit))
        console.print(_counts(steps), highlight=False)
    else:
        console.print(_commits(root, workers, limit))


@log_group.command("recompute-rewards")
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment, with the new reward.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/other.")
def recompute(path: str, overrides: tuple[str, ...]) -> None:
    """Apply the configured reward to all steps of the log, while `esrl ingest` and `esrl train` are stopped.

    What users did stays in the log: each worker's table is rewritten from that, in one commit. After a crash run it again. The workers and
    replay shards that start then have the new rewards; a learner's checkpoint of the old ones is refused and says what to do.
    """
    config = load_config(path, overrides, environment=os.environ)
    root = config.log_root
    if not (workers := list_workers(root)):
        raise ConfigError("there is no step log of this configuration's spec", root, "name the run's folder with --set run.dir=...")
    for worker in workers:
        done = recompute_rewards(
            StepLog(root, worker, uuid.uuid4().hex, config.spec.build(), config.log), config.reward, committed_ms=clock_ms()
        )
        what = (
            f"commit {done[1]}, reward {done[0] or 'unknown'} -> {config.reward.digest}" if done else f"has reward {config.reward.digest}"
        )
        click.echo(f"{worker}: {what}")


@log_group.command("import")
@click.option("--decisions", required=True, type=click.Path(exists=True, path_type=Path), help="File or folder: Parquet or JSON lines.")
@click.option("--feedback", required=True, type=click.Path(exists=True, path_type=Path), help="File or folder: Parquet or JSON lines.")
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/other.")
@click.option("--worker", default="import-0", show_default=True, help="Name of the table in the step log; one for each set of files.")
@click.option("--rejects", type=click.Path(path_type=Path), help="File for refused rows.  [default: <run.dir>/rejects/<worker>.jsonl]")
@click.option("--hashed-users", is_flag=True, help="User ids in the files are pseudonyms of this deployment already (ESRL_USER_KEY).")
def import_log(
    *,
    decisions: Path,
    feedback: Path,
    path: str,
    overrides: tuple[str, ...],
    worker: str,
    rejects: Path | None,
    hashed_users: bool,
) -> None:
    """Read old decisions and feedback into the step log, through the join of the live path.

    Rows have the fields of the two events on the wire (docs/data.md), in order of event time within each file and over the names of the
    files. A call that was killed goes on where its last commit was; a call on what is imported adds nothing. Where the deployment has
    ESRL_USER_KEY, user ids are hashed as serving hashes them.
    """
    config = load_config(path, overrides, environment=os.environ)
    rejects = rejects or config.run.path / "rejects" / f"{worker}.jsonl"
    import_files(
        config,
        config.log_root,
        decisions,
        feedback,
        worker=worker,
        rejects=rejects,
        say=click.echo,
        hashed_users=hashed_users,
    )


@log_group.command("export-kuairand")
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Folder of a KuaiRand log.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for decisions.jsonl and feedback.jsonl.")
@click.option("--config", "path", default="configs/kuairand.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")
def export_kuairand(*, data: Path, out: Path, path: str, overrides: tuple[str, ...]) -> None:
    """Write the lists of a KuaiRand log and the feedback that was logged for them as files for `esrl log import`."""
    from esrl_ray.cli.kuairand_files import write_files  # with the upstream models it takes seconds

    decisions, feedback = write_files(load_config(path, overrides, environment=os.environ), data, out, say=click.echo)
    click.echo(f"{decisions:,} decisions and {feedback:,} feedback events in {out}")


def read_commit(root: str, worker: str, commit: int) -> pa.Table:
    """Rows of one commit.

    Raises:
        ConfigError: the worker has no such commit.
    """
    for number, rows in read_commits(root, worker, after=commit - 1):
        if number == commit:
            return rows
        break
    raise ConfigError(f"{worker} has no commit {commit}", root, "list the commits without --commit")


def parse_as_of(texts: tuple[str, ...], workers: list[str]) -> dict[str, int]:
    """`N` for all workers, or `worker=N` for one; a worker that is not named is read to nothing.

    Raises:
        ConfigError: not of this form, or an unknown worker.
    """
    at: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise ConfigError(f"{text!r} is not of the form N or worker=N", "--as-of")
        if name and name not in workers:
            raise ConfigError(f"unknown worker {name!r}, expected one of {workers}", "--as-of")
        at |= dict.fromkeys([name] if name else workers, int(number))
    return at


def _commits(root: str, workers: list[str], limit: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=root, title_justify="left", title_style="bright_black")
    for name in ("worker", "commit", "committed (UTC)"):
        table.add_column(name, no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("incarnation", overflow="fold")
    table.add_column("next offsets, of the newest commits", overflow="fold")
    for worker in workers:
        history = commit_history(root, worker, limit)
        for info in history:
            offsets = "-" if info.positions is None else _offsets(info.positions)
            table.add_row(worker, str(info.commit), _time(info.committed_ms), f"{info.rows:,}", info.incarnation, offsets)
        if history:
            table.caption = f"{table.caption or 'reward section:'} {worker}={history[-1].reward or 'unknown'}"
    return table


def _rows(rows: pa.Table, title: str, limit: int) -> Table:
    shown = rows.slice(max(0, len(rows) - limit))
    names = [name for name in COLUMNS if name in rows.column_names]
    heading = f"{title}: {len(rows):,} rows, {len(shown):,} shown"
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bright_black")
    for name in names:
        table.add_column(name.removesuffix("_ms"), overflow="fold")
    for row in shown.select(names).to_pylist():
        table.add_row(*(_time(v) if name.endswith("_ms") else "" if v is None else str(v) for name, v in row.items()))
    return table


def _counts(steps: pa.Table) -> str:
    ended = {entry["values"]: entry["counts"] for entry in pc.value_counts(steps["ended"]).to_pylist()}
    sessions = pc.count_distinct(steps["session_id"]).as_py()
    return f"{len(steps):,} steps in {sessions:,} sessions: " + ", ".join(f"{n:,} {what}" for what, n in sorted(ended.items()))


def _offsets(positions: Mapping[str, int]) -> str:
    return " ".join(f"{where}@{offset}" for where, offset in sorted(positions.items()))


def _time(epoch_ms: int) -> str:
    return datetime.fromtimestamp(epoch_ms / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
