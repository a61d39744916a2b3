"""`esrl config`: the schema of a deployment's configuration, and the values that are in effect."""

from __future__ import annotations

import json
import os

import click
import yaml

from esrl_ray.config import Config, load_config


@click.group("config")
def config_group() -> None:
    """Show the configuration's schema or its effective values."""


@config_group.command("schema")
def schema() -> None:
    """Print the JSON schema: every key with its default, bounds, unit and symbol."""
    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@config_group.command("show")
@click.option("--config", "path", help="YAML of the deployment; without it the defaults.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. learner.gamma=0.95.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def show(*, path: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the effective values after file, overrides and environment; secrets are masked. Comments tell the digests."""
    config = load_config(path, overrides, environment=os.environ)
    values = config.shown()
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    click.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120).rstrip())
    click.echo(f"# spec {config.spec.build().digest}, reward {config.reward.digest}")
    for g, group in enumerate(config.reward.groups):
        low, high = config.reward.bounds(g)
        click.echo(f"# reward of a pair in group {group.name}: {low:.4g} to {high:.4g}")
