"""`esrl chaos`: kills the parts of a deployment under load and compares what is left with a run without faults."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import msgspec

from esrl_ray.cli.chaos.compare import Report
from esrl_ray.cli.chaos.faults import KINDS, Kind, plan
from esrl_ray.cli.chaos.fleet import Fleet
from esrl_ray.cli.chaos.load import generate
from esrl_ray.cli.chaos.processes import ProcessFleet
from esrl_ray.cli.chaos.run import chaos_config, run_chaos
from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.demo import LOOPBACK
from esrl_ray.errors import ConfigError, LoopError
from streaming.broker import EmbeddedBroker

FAULT_S = 7.0
"""Seconds of the run per fault."""
PHASE_EVENTS = 15_000
"""Events between two barriers, at most: 150 s of event time, so that some of it is forgotten at the next barrier."""


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> list[Kind]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise ConfigError("no part is named", "--kill", f"name some of {', '.join(KINDS)}; for a run without faults give --faults 0")
    if unknown := sorted(set(names) - set(KINDS)):
        raise ConfigError(f"unknown part {unknown[0]!r}", "--kill", f"expected some of {', '.join(KINDS)}")
    if {"learner", "zombie"} <= set(names):
        raise ConfigError("a zombie is a plain process, with learner the parts are Ray's actors", "--kill", "leave out zombie or learner")
    return [kind for kind in KINDS if kind in names]


@click.command()
@click.option("--seconds", type=click.FloatRange(min=5.0), default=300.0, show_default=True, help="Length of the load.")
@click.option("--events", type=click.IntRange(min=1_000), default=100_000, show_default=True, help="Records to send, at least.")
@click.option(
    "--kill",
    "kinds",
    callback=_kinds,
    default="ingest,replay,broker,zombie,deal",
    show_default=True,
    help="What dies. With `learner` the parts are Ray actors as deployed, restarted by Ray; else plain processes, which restart faster.",
)
@click.option("--faults", type=click.IntRange(min=0), help="How many faults.  [default: one per 7 s]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of events, victims and moments.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep everything in this folder, which must be new.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as the last line of stdout.")
def chaos(*, seconds: float, events: int, kinds: list[Kind], faults: int | None, seed: int, out: Path | None, as_json: bool) -> None:
    """Kill parts under load, and show that every event has its effect once.

    Sends generated events (20 % out of order, 5 % duplicates, 0.5 % poison of every kind, too late ones, idle partitions, abandoned
    sessions) through an embedded broker of its own, while ingest workers, replay shards and the broker are killed at random moments and
    at every named point of the commit sequence, workers are paused and replaced (zombies) or give way to another number of them (deal).
    Then compares steps, links, rewards, ledger, dead letters and replay shards with a run without faults on the same records. Exit code 2
    when anything differs or a fault found no moment; the folder is kept then.
    """
    if out is not None and out.exists():
        raise ConfigError("the folder exists", str(out), "name a new one with --out")
    os.environ.update(LOOPBACK)
    from esrl_ray.cli.local import local_run, own_folder

    folder = (out or Path(tempfile.mkdtemp(prefix="esrl-chaos-"))).resolve()
    planned = plan(kinds, round(seconds / FAULT_S) if faults is None else faults, seed=seed)
    kept = True
    try:
        with (
            own_folder(folder) as lock,
            local_run(folder, lock) as run,
            EmbeddedBroker.start(folder / "broker", say=say) as broker,
            ExitStack() as stack,
        ):
            config = chaos_config(folder, broker.bootstrap_servers, capacity=max(100, events // 25))
            fleet: Fleet
            if "learner" in kinds:
                from esrl_ray.cli.chaos.actor_fleet import ActorFleet
                from esrl_ray.cli.local import start_ray
                from serve.app import serve_environment

                start_ray(run, serve_environment(run.temporary / "ha"))
                fleet = ActorFleet(config, folder, with_learner=True)
            else:
                fleet = ProcessFleet(config, folder)
            stack.callback(fleet.end)
            phases = max(2, -(-events // PHASE_EVENTS))
            load = generate(config, seed=seed, num_events=events, num_phases=phases, start_ms=clock_ms())
            say(f"{load.count().total() // 2:,} records in {phases} phases, {len(planned)} faults, seed {seed}")
            report = run_chaos(load, planned, broker, fleet, seconds=seconds, seed=seed, say=say)
        kept = bool(report.problems)
    except KeyboardInterrupt:
        kept = False
        raise
    finally:
        if out is None and not kept:
            shutil.rmtree(folder)
        elif out is None:
            say(f"logs of all parts, the step log and the broker's data are kept in {folder}")
    _tell(report)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    if report.problems:
        raise LoopError(f"{len(report.problems)} things are not as they must be: {'; '.join(report.problems)}", str(folder))


def say(text: str) -> None:
    """One line for people on stderr."""
    click.echo(text, err=True)


def _tell(report: Report) -> None:
    """The report for people."""
    say(f"{report.num_kills} faults: " + ", ".join(f"{name} {n}" for name, n in sorted(report.kills.items())))
    say("back after at most: " + ", ".join(f"{part} {seconds} s" for part, seconds in report.recovery_s.items()))
    steps, letters = report.steps, report.dead_letters
    say(
        f"{steps.steps} steps: lost {len(steps.lost)}, added {len(steps.added)}, doubled {len(steps.doubled)}, changed {len(steps.changed)}"
    )
    for topic, buckets in report.ledger.items():
        say(f"{topic}: " + ", ".join(f"{bucket} {n}" for bucket, n in buckets.items() if n))
    say(f"dead letters: sent {letters['sent']}, unique {letters['unique']}, further copies {letters['copies']}")
    for problem in report.problems:
        say(f"PROBLEM  {problem}")
