"""`esrl log forget`: one user out of log and replay, and which policies learnt from that user."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import click
from deltalake.exceptions import CommitFailedError

from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, LogError
from esrl_ray.policy.store import read_manifests
from esrl_ray.secret import pseudonym
from streaming.erase import Erased, erase_user
from streaming.erase_rejects import erase_rejects
from streaming.steplog import list_workers


@click.command("forget")
@click.option("--user-id", required=True, help="As in requests; where the deployment has ESRL_USER_KEY its hash is erased as well.")
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/other.")
@click.option("--dry-run", is_flag=True, help="Only count, and name the policies.")
@click.option(
    "--rejects",
    "elsewhere",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of refused rows that is not in <run.dir>/rejects; may be given again.",
)
@click.option("--address", default="auto", show_default=True, help="Ray cluster whose replay shards are refilled; `none`: the log alone.")
def forget(*, user_id: str, path: str, overrides: tuple[str, ...], dry_run: bool, elsewhere: tuple[Path, ...], address: str) -> None:
    """Erase a user from the step log, the replay and files of rejects, and name the policies that were trained on the user's data.

    Workers may run meanwhile. What is in no row yet, an open session, is not reached: the command says so and ends with an error; run it
    again when the session is over. What it does not reach at all: the Kafka topics and dead letters (their retention), a replica's spool,
    files that were imported, copies of the log, checkpoints and policies. Keep the printed versions: once the rows are gone nothing can
    name them again.
    """
    config = load_config(path, overrides, environment=os.environ)
    root, names = config.log_root, {user_id, pseudonym(user_id, config.serve.user_key)}  # rows of before the key have the id itself
    if not (workers := list_workers(root)):
        raise ConfigError("there is no step log of this configuration's spec", root, "name the run's folder with --set run.dir=...")
    cluster = not dry_run and _connect(address)
    found = _erase(root, workers, names, dry_run=True)
    versions = trained_on(config, found)  # before anything is gone: a crash must not take the only list of them along
    click.echo(f"policies trained on them: {', '.join(map(str, versions)) or 'none'}")
    if not dry_run:
        found = _erase(root, workers, names, dry_run=False)
        if more := sorted(set(trained_on(config, found)) - set(versions)):
            click.echo(f"policies trained on what came meanwhile: {', '.join(map(str, more))}")
        if cluster:
            _refill(config)
        else:
            click.echo("no Ray cluster runs here: there is no replay to refill")
    unclear = _erase_rejects([*sorted((config.run.path / "rejects").glob("*.jsonl")), *elsewhere], names, dry_run=dry_run)
    if named := [erased.worker for erased in found if erased.open_sessions]:
        what = f"the state of {', '.join(named)} still names the user, whose session is open or has just ended"
        raise LogError(what, root, "run this again some hundred commits later")
    if young := [erased.worker for erased in found if erased.unsettled]:
        what = f"the folder of {', '.join(young)} has files that hold the user or cannot be read, and are in no commit, or not yet"
        raise LogError(what, root, "run this again in an hour, when no commit can be waiting for them")
    if unclear:
        what = f"the user's id is in {sum(unclear.values())} lines that are no refused rows: cut off by a crash, or something else's"
        raise LogError(what, " ".join(map(str, unclear)), "let the import end, or remove the lines or files, then run this again")


def _erase(root: str, workers: Sequence[str], names: Collection[str], *, dry_run: bool) -> list[Erased]:
    found = []
    for worker in workers:
        try:
            erased = erase_user(root, worker, names, now_ms=clock_ms(), dry_run=dry_run)
        except (CommitFailedError, FileNotFoundError) as error:
            what = f"{worker} is rewritten by others again and again: {str(error).splitlines()[0]}"
            raise LogError(what, root, "run this again, what is erased already stays erased") from error
        where = f" in commits {erased.commits[0]} to {erased.commits[-1]}" if erased.commits else ""
        click.echo(f"{erased.worker}: {erased.rows:,} rows of {erased.num_steps:,} steps{where} {'found' if dry_run else 'erased'}")
        found.append(erased)
    return found


def _erase_rejects(files: Sequence[Path], names: Collection[str], *, dry_run: bool) -> dict[Path, int]:
    """Files with lines that have the id in them and are not known, and how many."""
    unclear: dict[Path, int] = {}
    for file in files:
        num_rows, num_unclear = erase_rejects(file, names, dry_run=dry_run)
        click.echo(f"{file}: {num_rows:,} refused rows that quote the user {'found' if dry_run else 'blanked'}")
        unclear |= {file: num_unclear} if num_unclear else {}
    return unclear


def trained_on(config: Config, found: Sequence[Erased]) -> list[int]:
    """Versions of the run whose training could draw from the user's rows."""
    first = {erased.worker: erased.commits[0] for erased in found if erased.commits}
    manifests = read_manifests(config.run.path / "policies")
    return [m.version for m in manifests if any(m.lineage.get(worker, -1) >= n for worker, n in first.items())]


def _connect(address: str) -> bool:
    """Join the cluster before anything is erased: a wrong address must not leave a replay that still has the user."""
    from esrl_ray import actors  # Ray takes seconds

    if address in ("auto", "none"):
        return actors.connect(address)
    actors.join(address)
    return True


def _refill(config: Config) -> None:
    from esrl_ray import actors

    for name, shard in actors.present(f"replay-{i}" for i in range(config.replay.num_shards)).items():
        click.echo(f"{name}: refilled from the log, {actors.insist(shard.refill.remote, timeout_s=600.0):,} steps")
