"""`esrl train`: the learner on a running Ray cluster, usually under `ray job submit`."""

from __future__ import annotations

import os
import signal
import threading

import click
import ray

from esrl_ray.actors import NAMESPACE
from esrl_ray.cli import learning
from esrl_ray.config import load_config
from serve.deployment import policy_store


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set. Call after `ray.init`, which installs handlers of its own."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


@click.command()
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. learner.gamma=0.95.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster.")
@click.option("--gradient-steps", type=click.IntRange(min=1), help="Stop after so many; default: until a signal.")
def train(path: str, overrides: tuple[str, ...], address: str, gradient_steps: int | None) -> None:
    """Learn from the replay shards and publish policies, until SIGTERM.

    Resumes from the run's newest whole checkpoint.
    """
    config = load_config(path, overrides, environment=os.environ)
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    stop = stop_on_signals()
    loop = learning.training_loop(config, policy_store(config), learning.replay_shards(config))

    def report() -> None:
        while not stop.wait(10.0):
            status = loop.status()
            click.echo(" ".join(f"{key}={value}" for key, value in status.items()))
            if gradient_steps is not None and status["gradient_steps"] >= gradient_steps:
                stop.set()

    threading.Thread(target=report, daemon=True).start()
    loop.run(stop)
    click.echo(f"stopped: {loop.status()}")
