"""`esrl demo`: the whole loop on one machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from esrl_ray.config import load_config
from esrl_ray.errors import LoopError

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray use 127.0.0.1 for all its sockets. Ray reads it when it is imported, so nothing above imports Ray."""


@click.command()
@click.option("--config", "path", help="YAML of the deployment; default configs/demo.yaml, or configs/kuairand.yaml with --data.")
@click.option("--seconds", type=float, help="Length of the run, from the first served decision.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of a KuaiRand log: real input instead of the simulator.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder of everything that the run writes."
)
@click.option("--bootstrap-servers", help="Use this broker instead of an embedded one.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. learner.gamma=0.95.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as the last line of stdout.")
def demo(
    path: str | None,
    seconds: float | None,
    data: Path | None,
    out: Path,
    bootstrap_servers: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run the whole loop on this machine: decide, log, join, replay, learn, publish."""
    changes = [*overrides, f"run.dir={json.dumps(str(out.resolve()))}"]
    if seconds is not None:
        changes.append(f"demo.seconds={seconds}")
    if bootstrap_servers is not None:
        changes.append(f"kafka.bootstrap_servers={bootstrap_servers}")
    config = load_config(path or ("configs/demo.yaml" if data is None else "configs/kuairand.yaml"), changes, environment=os.environ)
    os.environ.update(LOOPBACK)
    from esrl_ray.cli.loop import run_demo
    from esrl_ray.evaluation.report import promises

    report = run_demo(config, data)
    if as_json:
        click.echo(report.json_line())
    if broken := [promise.text for promise in promises(report) if not promise.kept and not promise.timed]:
        raise LoopError(f"{len(broken)} promises are broken: {'; '.join(broken)}")
