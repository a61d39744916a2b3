"""`esrl evaluate`: what a log says about a policy, and about two of them; refused with the reason where it says too little."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from esrl_ray.cli.logged import read_log
from esrl_ray.config import load_config
from esrl_ray.errors import InputDataError, MethodError, SpecMismatch
from esrl_ray.evaluation.metrics import gauc_of_policies, label_of, shown_pairs
from esrl_ray.evaluation.offline import Estimate, OffPolicy, Settings, Value
from esrl_ray.policy.policy import Policy

FLATTERED = (
    "judged by all users of the log, also those that the policy may have been learnt from, which flatters it: hold some out with"
    " policy.held_out_share before learning"
)


@click.command()
@click.option("--log", required=True, help="As `esrl train --log` takes it; Parquet needs num_candidates too.")
@click.option("--policy", "folder", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of one policy version.")
@click.option(
    "--against", type=click.Path(path_type=Path, exists=True), help="Policy to compare with; default: the hand-made control policy."
)
@click.option("--config", "path", help="YAML of the deployment; without it the defaults.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")
@click.option("--label", help="Label of MTF-GAUC, e.g. 'watch_s>10'; default: the reward's first threshold, behaviour > number.")
@click.option("--context", help="Categorical feature for MTF-GAUC by user x context.")
@click.option("--plus-one/--reward-only", default=True, show_default=True, help="Weight of an exposure in MTF-GAUC: reward + 1, or reward.")
@click.option("--gamma", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Discount; 1 = reward per session.")
@click.option(
    "--updates", type=click.IntRange(0), default=600, show_default=True, help="Gradient steps of the features; 0 = inputs as they are."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of folds, features, resamples.")
@click.option("--all-users", is_flag=True, help="Judge by all users, also where policy.held_out_share left some out of learning.")
@click.option("--as-of", multiple=True, metavar="[WORKER=]N", help="Read the step log up to this commit of a worker, or of all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    *,
    log: str,
    folder: Path,
    against: Path | None,
    path: str | None,
    overrides: tuple[str, ...],
    label: str | None,
    context: str | None,
    plus_one: bool,
    gamma: float,
    updates: int,
    seed: int,
    all_users: bool,
    as_of: tuple[str, ...],
    as_json: bool,
) -> None:
    """Estimate a policy's reward per session from a log, beside another policy's, with support and 95 % intervals over users.

    Judges by the users whom policy.held_out_share left out of learning, if there are any; else by all, and says that this flatters what
    was learnt from them.

    Exits with 2 and the reasons when the log supports no estimate of --policy.
    """
    torch.set_num_threads(1)
    config = load_config(path, overrides, environment=os.environ)
    spec = config.spec.build()
    policies = {"policy": Policy.load(folder), "against": Policy.load(against) if against else Policy.static(spec)}
    for name, policy in policies.items():
        if policy.spec != spec:
            where = str(folder if name == "policy" else against)
            raise SpecMismatch(f"policy is for spec {policy.spec.digest}, this deployment's is {spec.digest}", where)
    read, warning = read_log(log, config, as_of), None
    if config.policy.held_out_share and not all_users:
        read = read.of_users(config, held_out=True)
    else:
        warning = FLATTERED
    steps = read.steps
    if "num_candidates" not in read.table.column_names:
        raise InputDataError("column 'num_candidates' is missing: how likely an unshown pair was logged", read.where, "add it")
    pairs = shown_pairs(steps, config, label=label_of(config, label), plus_one=plus_one, context=context)
    gauc = gauc_of_policies([policies["against"], policies["policy"]], pairs, seed=seed)
    asked = OffPolicy(
        steps,
        config,
        num_candidates=read.table["num_candidates"].to_numpy(),
        seed=seed,
        settings=Settings(gamma=gamma, num_updates=updates),
    )
    values = {name: asked.value(policy) for name, policy in policies.items()}
    report = {"warning": warning} | _report(values, {name: msgspec.to_builtins(entries) for name, entries in gauc.items()}, asked)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)
    if not values["policy"].estimates:
        reasons = sorted(set(values["policy"].refused.values()))
        raise MethodError(f"the log supports no estimate of this policy: {'; '.join(reasons)}", str(log), "explore more, or nearer to it")


def _report(values: Mapping[str, Value], gauc: Mapping[str, Any], asked: OffPolicy) -> dict[str, Any]:
    policy, against = values["policy"], values["against"]
    both = [name for name in policy.estimates if name in against.estimates]
    return {
        "digest": asked.digest,
        "settings": msgspec.to_builtins(asked.settings),
        "mtf_gauc": dict(gauc),
        **{
            name: {
                "support": msgspec.to_builtins(value.support),
                "effective_sessions": value.effective_sessions,
                "estimates": {n: msgspec.to_builtins(Estimate.of(draws)) for n, draws in value.estimates.items()},
                "refused": value.refused,
            }
            for name, value in values.items()
        },
        "difference": {n: msgspec.to_builtins(Estimate.of(policy.estimates[n].minus(against.estimates[n]))) for n in both},
    }


def _print(report: Mapping[str, Any]) -> None:
    console = Console()
    if report["warning"]:
        console.print(f"WARNING: {report['warning']}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="reward per session (ncis_list: per list), 95 % intervals over users", title_justify="left")
    for name in ("estimate", "policy", "against", "difference"):
        table.add_column(name)
    estimates = {name: report[name]["estimates"] for name in ("policy", "against")} | {"difference": report["difference"]}
    for estimate in sorted({n for found in estimates.values() for n in found}):
        table.add_row(estimate, *(_interval(estimates[column].get(estimate)) for column in ("policy", "against", "difference")))
    console.print(table)
    for grouping, entries in report["mtf_gauc"].items():
        for entry in entries:
            if entry["gauc"] is not None:
                text = f"{entry['gauc']:.4f} [{entry['ci_low']:.4f}, {entry['ci_high']:.4f}]"
                console.print(f"MTF-GAUC {grouping}: {entry['policy']} {text}", highlight=False)
    for name in ("policy", "against"):
        support = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in report[name]["support"].items())
        effective = report[name]["effective_sessions"]
        console.print(f"support of {name}: {support}, effective sessions of ncis {effective:.1f}", highlight=False)
        for estimate, reason in report[name]["refused"].items():
            console.print(f"refused {estimate} of {name}: {reason}", highlight=False)
    console.print(f"lists {report['digest']}", highlight=False)


def _interval(entry: Mapping[str, float] | None) -> str:
    return "refused" if entry is None else f"{entry['mean']:.3f} [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}]"
