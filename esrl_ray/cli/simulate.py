"""`esrl simulate`: play policies in the in-process simulator, on common random numbers."""

from __future__ import annotations

import os

import click
import torch
from rich.console import Console
from rich.table import Table

from esrl_ray.config import load_config
from esrl_ray.evaluation.frozen import evaluate_frozen
from esrl_ray.evaluation.report import interval_text
from esrl_ray.policy.policy import Policy
from esrl_ray.policy.store import read_manifests, version_folder


@click.command()
@click.option("--config", "path", default="configs/demo.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. simulation.world_seed=1.")
@click.option("--version", "versions", type=int, multiple=True, help="Policy versions of the run's folder; default: the newest.")
@click.option("--sessions", type=click.IntRange(min=10), default=2000, show_default=True, help="Sessions per policy.")
def simulate(path: str, overrides: tuple[str, ...], versions: tuple[int, ...], sessions: int) -> None:
    """Reward per session of control and of policies of a run, with paired differences to control."""
    torch.set_num_threads(1)
    config = load_config(path, overrides, environment=os.environ)
    folder = config.run.path / "policies"
    newest = [manifest.version for manifest in read_manifests(folder)[-1:]]
    policies = [Policy.static(config.spec.build())] + [Policy.load(version_folder(folder, v)) for v in versions or newest]
    table = Table("policy", "reward per session", "difference to control", "pages", "watch (s)")
    for policy, result in zip(policies, evaluate_frozen(policies, config, seed=config.demo.seed, sessions=sessions), strict=True):
        name = str(policy.version) if policy.version else "control"
        difference = interval_text(result.difference) if policy.version else ""
        table.add_row(name, interval_text(result.reward, form=".2f"), difference, f"{result.pages:.1f}", f"{result.watch_s:.0f}")
    Console().print(table)
