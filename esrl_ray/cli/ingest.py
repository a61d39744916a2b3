"""`esrl ingest`: the streaming ingestion workers on the cluster's Kafka and Ray."""

from __future__ import annotations

import os

import click
import ray

from esrl_ray import actors
from esrl_ray.actors import NAMESPACE
from esrl_ray.cli import learning, parts
from esrl_ray.cli.train import stop_on_signals
from esrl_ray.config import load_config
from esrl_ray.errors import ConfigError, LoopError
from streaming.broker import ensure_topics


@click.command()
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. ingest.num_workers=2.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster.")
def ingest(path: str, overrides: tuple[str, ...], address: str) -> None:
    """Read both topics, join sessions, commit to the step log, feed the replay shards, until SIGTERM.

    Resumes at the last commit of each worker's log. A worker that dies comes back by itself; a worker that cannot go on (fenced, a gap in
    the offsets, too many dead letters) ends this command with the reason.
    """
    config = load_config(path, overrides, environment=os.environ)
    if config.kafka.bootstrap_servers is None:
        raise ConfigError(
            "kafka.bootstrap_servers is not set", path, "name the cluster's brokers, e.g. --set kafka.bootstrap_servers=127.0.0.1:9092"
        )
    ensure_topics(config.kafka)
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    stop = stop_on_signals()
    workers = parts.spawn_ingest(config, learning.replay_shards(config))
    try:
        while not stop.wait(10.0):
            for name, worker in workers.items():
                status = actors.ask(worker.status.remote, otherwise={"error": None, "state": "restarting"})
                click.echo(f"{name} " + " ".join(f"{key}={value}" for key, value in status.items()))
                if status["error"]:
                    raise LoopError(f"{name} ended: {status['error']}")
        for worker in workers.values():
            actors.ask(worker.halt.remote, timeout_s=60.0)
        click.echo("stopped after the last commit")
    finally:
        actors.end(workers)
