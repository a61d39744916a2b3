"""`esrl log forget`: one user out of log and replay, and which policies learnt from that user."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, LogError
from esrl_ray.policy.store import read_manifests
from esrl_ray.secret import pseudonym
from streaming.erase import Erased, erase_user
from streaming.steplog import list_workers


@click.command("forget")
@click.option("--user-id", required=True, help="As in requests; hashed first where the deployment has ESRL_USER_KEY.")
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/other.")
@click.option("--dry-run", is_flag=True, help="Only count, and name the policies.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster whose replay shards are refilled.")
def forget(*, user_id: str, path: str, overrides: tuple[str, ...], dry_run: bool, address: str) -> None:
    """Erase a user from the step log and the replay, and name the policies that were trained on the user's data.

    Workers may run meanwhile. What is in no row yet, an open session, is not reached: the command says so and ends with an error; run it
    again when the session is over. What it does not reach at all: the Kafka topics and dead letters (their retention), a replica's spool,
    copies of the log, checkpoints and policies. Keep the printed versions: once the rows are gone nothing can name them again.
    """
    config = load_config(path, overrides, environment=os.environ)
    root, name = config.log_root, pseudonym(user_id, config.serve.user_key)
    if not (workers := list_workers(root)):
        raise ConfigError("there is no step log of this configuration's spec", root, "name the run's folder with --set run.dir=...")
    found = [erase_user(root, worker, name, now_ms=clock_ms(), dry_run=dry_run) for worker in workers]
    for erased in found:
        where = f" in commits {erased.commits[0]} to {erased.commits[-1]}" if erased.commits else ""
        click.echo(f"{erased.worker}: {erased.rows:,} rows of {erased.num_steps:,} steps{where} {'found' if dry_run else 'erased'}")
    versions = trained_on(config, found)
    click.echo(f"policies trained on them: {', '.join(map(str, versions)) or 'none'}")
    if not dry_run:
        _refill(config, address)
    if names := [erased.worker for erased in found if erased.open_sessions]:
        what = f"the state of {', '.join(names)} still names the user, whose session is open or has just ended"
        raise LogError(what, root, "run this again some hundred commits later")


def trained_on(config: Config, found: Sequence[Erased]) -> list[int]:
    """Versions of the run whose training could draw from the user's rows."""
    first = {erased.worker: erased.commits[0] for erased in found if erased.commits}
    manifests = read_manifests(config.run.path / "policies")
    return [m.version for m in manifests if any(m.lineage.get(worker, -1) >= n for worker, n in first.items())]


def _refill(config: Config, address: str) -> None:
    from esrl_ray import actors  # Ray takes seconds

    if not actors.connect(address):
        click.echo("no Ray cluster runs here: there is no replay to refill")
        return
    for name, shard in actors.present(f"replay-{i}" for i in range(config.replay.num_shards)).items():
        click.echo(f"{name}: refilled from the log, {actors.insist(shard.refill.remote, timeout_s=600.0):,} steps")
