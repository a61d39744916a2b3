"""`esrl train`: the learner on a running Ray cluster, usually under `ray job submit`; with `--log`, learning from a log."""

from __future__ import annotations

import os
import signal
import threading

import click

from esrl_ray.cli.offline import Offline, train_offline
from esrl_ray.config import Config, load_config


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set. Call after `ray.init`, which installs handlers of its own."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


@click.command()
@click.option("--config", "path", default="configs/online.yaml", show_default=True, help="YAML of the deployment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. learner.gamma=0.95.")
@click.option("--address", help="Ray cluster. Default: $RAY_ADDRESS; else, online, the one that runs here, and offline a local one.")
@click.option("--steps", "--gradient-steps", "gradient_steps", type=click.IntRange(min=1), help="Stop after so many gradient steps.")
@click.option("--log", help="Learn offline from this log: a run's folder, a step log, or Parquet.")
@click.option("--method", help="Offline: what learns.  [default: enhancedrl]")
@click.option("--seed", type=click.IntRange(min=0), help="Offline: of parameters and sampling.  [default: learner.seed]")
@click.option("--out", help="Offline: folder of checkpoints and policy.  [default: <run.dir>/offline/<method>]")
@click.option("--as-of", multiple=True, metavar="[WORKER=]N", help="Offline: read the step log up to this commit of a worker, or of all.")
@click.option("--resume", is_flag=True, help="Offline: go on from the newest checkpoint in the folder.")
@click.pass_context
def train(
    context: click.Context,
    *,
    path: str,
    overrides: tuple[str, ...],
    address: str | None,
    gradient_steps: int | None,
    log: str | None,
    method: str | None,
    seed: int | None,
    out: str | None,
    as_of: tuple[str, ...],
    resume: bool,
) -> None:
    """Learn: online from a running loop, or offline from a log.

    Online, without --log: learn from the replay shards and publish policies, until SIGTERM or --steps; resumes from the run's newest whole
    checkpoint.

    Offline, with --log PATH: train one method on a step log (a run's folder, or its log/<digest>) or on Parquet, and save a policy in
    OUT/policy. EnhancedRL and its variants learn through RLlib, on learner.num_learners learners, with checkpoints: after a kill the same
    command with --resume goes on to the same result. Without --steps there are replay.samples_per_insert x steps / learner.batch_size of
    them (cql: half as many). EnhancedRL's kin take whole learner.updates_per_call, RLlib's sac, cql and iql whole tens. unifiedrl has its
    published 24 critics a group, whatever the deployment says. Users whom policy.held_out_share leaves out are not learnt from:
    `esrl evaluate` judges by them.

    \b
    Parquet needs these columns; P = pairs of the step, lists flattened pair by pair:
      step_id, session_id, user_id  string
      event_time_ms                 int64         of the request; sessions need not stand together
      round                         int32         of progressive training, 0 if there are none
      arm                           string        explore, exploit or control
      ended                         string        has_next, terminated (the user left), truncated or open
      next_id                       string        step_id of the session's next list, else null
      shown                         list<bool>    P        the user saw the pair
      states                        list<float>   P x F    user | item | context features, in the order of the spec
      categorical                   list<int32>   P x C    codes; empty lists when there are none
      scores                        list<float>   P x k    upstream scores
      actions, anchor_actions       list<float>   P x 2k   what was done, and the anchor's, in [-1, 1]
      behaviours                    list<float>   P x number of reward.behaviours
      rewards                       list<float>   P x q    one per reward group
    and may have:
      candidate_means               list<float>   F + k    of features and of scores' logarithms over all candidates of the request; the
                                                           long-term value is noisier without them
      num_candidates                int32         of the request; `esrl evaluate` needs it
    """
    config = load_config(path, overrides, environment=os.environ)
    if log is not None:
        asked = Offline(log, method or "enhancedrl", as_of, seed, gradient_steps, out, resume, address)
        train_offline(config, asked, stop_on_signals=stop_on_signals)
        return
    given = {"--method": method, "--seed": seed, "--out": out, "--as-of": as_of, "--resume": resume}
    if offline_only := [name for name, value in given.items() if value not in (None, (), False)]:
        raise click.UsageError(f"{offline_only[0]} is for learning offline: name the log with --log", context)
    _online(config, address or "auto", gradient_steps)


def _online(config: Config, address: str, gradient_steps: int | None) -> None:
    from esrl_ray import actors  # with RLlib Ray takes seconds
    from esrl_ray.cli import learning
    from serve.deployment import policy_store

    actors.join(address)
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
