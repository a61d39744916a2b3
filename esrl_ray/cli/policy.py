"""`esrl policy`: which versions there are, which one serves, and how that changes: publish brings one from elsewhere, rollback, pin and
unpin are the ways back. `pin static` is the kill switch.

`list` and `show` read the files. The others change them, through the store's actor when one owns them, else directly; `judge` changes
nothing that serves.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import pyarrow as pa
import ray
import torch

from esrl_ray import actors
from esrl_ray.cli.logged import is_parquet, read_log, step_log_root
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, EsrlError, InputDataError, PolicyRejected
from esrl_ray.evaluation.second_tier import KeepRows, ReadNewest, judge_log, load_verdict
from esrl_ray.learning.rounds import next_round
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.policy.store import CURRENT_FILE, Current, PolicyStore, read_current, read_manifests, version_folder
from esrl_ray.policy.store_actor import own, owner_address, wall_clock_ms
from esrl_ray.vocabulary import cut_lineage
from streaming.steplog import read_newest

ANSWER_S = 30.0


@click.group("policy")
def policy_group() -> None:
    """See and steer which policy serves."""


def _deployment(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which deployment; the command gets its configuration."""

    @click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. run.dir=runs/demo.")
    @functools.wraps(command)
    def with_config(path: str, overrides: tuple[str, ...], **options: object) -> None:
        command(load_config(path, overrides, environment=os.environ), **options)

    return with_config


_address = click.option("--address", help="Ray cluster of the running store; default: the one that owns the files, if any.")


@policy_group.command("list")
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="How many, newest first.")
@_deployment
def list_versions(config: Config, *, last: int) -> None:
    """Versions, newest first; `*` serves, `a` is the anchor of exploration."""
    current = _current(config)
    for manifest in reversed(read_manifests(_folder(config))[-last:]):
        marks = ("*" if manifest.version == current.version else " ") + ("a" if manifest.version == current.round.anchor_version else " ")
        click.echo(
            f"{marks} {manifest.version:6d}  {manifest.kind.value:6}  round {manifest.round:3d}  "
            f"{manifest.gradient_steps:8d} gradient steps  {manifest.digest[:12]}  {manifest.note or manifest.verdict}"
        )
    click.echo(f"round {current.round.number}, {'PINNED' if current.pinned else 'not pinned'}")


@policy_group.command()
@click.argument("version", type=click.IntRange(min=1))
@_deployment
def show(config: Config, *, version: int) -> None:
    """The manifest of one version as JSON, after checking the sha256 of its tensors; then what the second tier said of it."""
    folder = version_folder(_folder(config), version)
    manifest = Policy.load(folder).manifest
    click.echo(msgspec.json.format(msgspec.json.encode(manifest), indent=1).decode())
    click.echo(f"whole; trained on {cut_lineage(manifest.lineage) or 'nothing'}", err=True)
    verdict = load_verdict(folder)
    click.echo(f"{verdict.text}; against version {verdict.against}" if verdict else "second tier: not judged", err=True)


@policy_group.command()
@click.argument("version", type=click.IntRange(min=1))
@click.option("--against", type=click.IntRange(min=1), help="Version to compare with; default: the anchor of the round.")
@click.option(
    "--log",
    type=click.Path(path_type=Path, exists=True),
    help="As `esrl train --log` takes it; Parquet needs index and num_candidates too. Default: the run's own.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of folds, features, resamples.")
@_address
@_deployment
def judge(config: Config, *, address: str | None, version: int, against: int | None, log: Path | None, seed: int) -> None:
    """Ask the second tier about VERSION, by off-policy estimates on held-out explore users, and keep the verdict beside it."""
    torch.set_num_threads(1)
    anchor = against or _current(config).round.anchor_version
    if anchor == version:
        raise click.UsageError(f"version {version} is the anchor: name another one with --against")
    policies = [Policy.load(version_folder(_folder(config), number)) for number in (version, anchor)]
    verdict = judge_log(policies[0], policies[1], config, _reader(log, config), seed=seed)
    _change(config, address, "keep_verdict", version, verdict)
    click.echo(f"{verdict.text}; against version {anchor}")


@policy_group.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_address
@_deployment
def publish(config: Config, *, address: str | None, folder: Path) -> None:
    """Serve the policy in FOLDER, e.g. of `esrl train --log`, and explore around it from now on, where the learner goes on, running or not.

    A policy that scores pairs by itself has no actions to explore around: it serves, and the anchor stays.
    """
    policy, learner = Policy.load(folder), config.learner
    made, kind = policy.manifest, policy.manifest.kind
    actor = kind.value, made.hidden_sizes, made.embedding_size, made.actor
    wanted = learner.level, learner.hidden_sizes, learner.embedding_size, learner.actor
    if kind not in (PolicyKind.STATIC, PolicyKind.SCORE) and actor != wanted:
        fix = "name the configuration that it was trained with"
        raise PolicyRejected(f"its actor is {actor}, a learner of this deployment has {wanted}", str(folder), fix)
    if not config.run.path.is_dir():
        raise PolicyRejected("there is no such run", str(config.run.path), "name it with --config or --set run.dir=...")
    if (current := read_current(_folder(config))) is not None and current.pinned:
        raise PolicyRejected(f"version {current.version} is pinned", str(_folder(config)), "unpin first")
    version = int(_change(config, address, "publish", policy.to_bytes(), None, new=True))
    if kind is PolicyKind.SCORE:
        click.echo(f"version {version} serves; version {_current(config).round.anchor_version} stays the anchor")
        return
    turn = next_round(_current(config).round.number + 1, version, config, started_ms=wall_clock_ms())
    _change(config, address, "start_round", turn)
    click.echo(f"version {version} serves, and is the anchor of round {turn.number}")


@policy_group.command()
@click.argument("version", type=click.IntRange(min=1))
@_address
@_deployment
def rollback(config: Config, *, address: str | None, version: int) -> None:
    """Serve an old version's parameters under a new number, until the learner publishes again. To hold it, pin it."""
    new = _change(config, address, "rollback", version)
    click.echo(f"version {new} serves the parameters of {version}")


@policy_group.command()
@click.argument("version")
@_address
@_deployment
def pin(config: Config, *, address: str | None, version: str) -> None:
    """Serve VERSION to everyone, without exploration, until `unpin`; `static` is the hand-made control policy: the kill switch."""
    if version != "static" and not version.isdigit():
        raise click.BadParameter(f"{version!r} is neither a number nor 'static'")
    new = _change(config, address, "pin", version if version == "static" else int(version))
    click.echo(
        f"version {new} is pinned: it serves {'the control policy' if version == 'static' else f'the parameters of {version}'} to everyone"
    )


@policy_group.command()
@_address
@_deployment
def unpin(config: Config, *, address: str | None) -> None:
    """End a pin: the newest version serves again."""
    _change(config, address, "unpin")
    click.echo(f"not pinned; version {_current(config).version} serves")


def _reader(log: Path | None, config: Config) -> ReadNewest:
    """Reader of a step log's newest steps, or of Parquet."""
    if log is None:
        return functools.partial(read_newest, config.log_root)
    if not is_parquet(log):
        return functools.partial(read_newest, step_log_root(str(log), config.spec.build().digest))

    def of_parquet(num_steps: int, keep: KeepRows) -> pa.Table:
        rows = read_log(str(log), config).table
        if missing := [name for name in ("index", "num_candidates") if name not in rows.column_names]:
            text = f"column {missing[0]!r} is missing: a verdict needs where a step stands in its session, and how many candidates it had"
            raise InputDataError(text, str(log), "add it")
        kept = rows.filter(pa.array(keep(rows)))
        return kept.slice(max(0, len(kept) - num_steps))

    return of_parquet


def _folder(config: Config) -> Path:
    return config.run.path / "policies"


def _current(config: Config) -> Current:
    current = read_current(_folder(config))
    if current is None:
        raise PolicyRejected(
            "no policy has been published", str(_folder(config) / CURRENT_FILE), "name the run with --config or --set run.dir=..."
        )
    return current


def _change(config: Config, address: str | None, method: str, *args: object, new: bool = False) -> Any:
    """Call one method of the store: of its actor when an address is named or a process owns the files, else on the files."""
    if not new:
        _current(config)  # a wrong folder is an error here, not a new store there
    if address is None:
        with own(_folder(config)) as owned:
            if owned:
                return getattr(PolicyStore(_folder(config), config, clock_ms=wall_clock_ms), method)(*args)
        address = owner_address(_folder(config)) or "auto"
    try:
        actors.join(address)
        store = actors.find(actors.POLICY_STORE)
    except (ConfigError, ValueError) as error:
        raise EsrlError(f"no policy store answers: {str(error).splitlines()[0]}", address, "name the cluster with --address") from error
    try:
        if (theirs := ray.get(store.folder.remote(), timeout=ANSWER_S)) != _folder(config):
            raise EsrlError(f"that cluster's policy store is for {theirs}", str(_folder(config)), "name the right cluster with --address")
        return ray.get(getattr(store, method).remote(*args), timeout=ANSWER_S)
    finally:
        ray.shutdown()
