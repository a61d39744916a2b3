"""`esrl ingest`: the streaming ingestion workers on the cluster's Kafka and Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from esrl_ray import actors
from esrl_ray.cli import learning, parts
from esrl_ray.cli.train import stop_on_signals
from esrl_ray.config import load_config
from esrl_ray.errors import ConfigError, LoopError
from streaming.broker import ensure_topics


@click.command()
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. ingest.num_workers=2.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster.")
@click.option("--drain", "drained", metavar="WORKER", help="Stop a running worker at a commit instead, e.g. ingest-1; `all` stops all.")
def ingest(path: str, overrides: tuple[str, ...], address: str, drained: str | None) -> None:
    """Read both topics, join sessions, commit to the step log, feed the replay shards, until SIGTERM.

    The number of workers may differ from the last run's: the state of a partition moves to the worker that owns it now. A drained worker
    has given its partitions away: nobody reads them until `esrl ingest` is started again, which deals all of them.

    Resumes at the last commit of each worker's log. A worker that dies comes back by itself; a worker that cannot go on (fenced, a gap in
    the offsets, too many dead letters) ends this command with the reason.
    """
    config = load_config(path, overrides, environment=os.environ)
    if config.kafka.bootstrap_servers is None:
        raise ConfigError(
            "kafka.bootstrap_servers is not set", path, "name the cluster's brokers, e.g. --set kafka.bootstrap_servers=127.0.0.1:9092"
        )
    if drained is None:
        ensure_topics(config.kafka)
    actors.join(address)
    if drained is not None:
        drain(parts.worker_names(config) if drained == "all" else [drained])
        return
    stop = stop_on_signals()
    workers = parts.spawn_ingest(config, learning.replay_shards(config))
    running = dict.fromkeys(workers, True)
    try:
        while not stop.wait(10.0):
            for name, worker in workers.items():
                status = actors.ask(worker.status.remote, otherwise={"error": None, "state": "restarting"})
                click.echo(f"{name} " + " ".join(f"{key}={value}" for key, value in status.items()))
                if status["error"]:
                    raise LoopError(f"{name} ended: {status['error']}")
                running[name] = not status.get("released", False)
            if not any(running.values()):
                click.echo("all workers are drained")
                return
        for worker in workers.values():
            actors.ask(worker.halt.remote, timeout_s=60.0)
        click.echo("stopped after the last commit")
    finally:
        actors.end(workers)


def drain(workers: Sequence[str]) -> None:
    """Stop running workers at a commit, with their partitions given away.

    Raises:
        LoopError: one is not running, or does not answer.
    """
    for name in workers:
        try:
            worker = actors.find(name)
        except ValueError as error:
            fix = "there is nothing to drain: its partitions go to whom they are dealt at the next start"
            raise LoopError(f"no worker {name!r} is running", "--drain", fix) from error
        status = actors.insist(worker.release.remote)
        click.echo(f"{name} is drained at commit {status['commit']}, partitions {sorted(status['watermarks_ms'])}")
