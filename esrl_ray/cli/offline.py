"""`esrl train --log`: learn a policy from a log that is there, by any method. RLlib is imported when it is needed: it takes seconds."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from esrl_ray.cli.clock import clock_ms
from esrl_ray.cli.logged import ReadLog, read_log
from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.learning.offline_run import POLICY, OfflineRun, begin, read_run, save_policy, settings_digest
from esrl_ray.methods.catalogue import ENHANCEDRL, NAMES, RLLIB_PEERS, WITHOUT_GRADIENTS, create_method
from esrl_ray.methods.method import Method
from esrl_ray.policy.policy import Policy


@dataclass(frozen=True, slots=True)
class Offline:
    """What the command line asks for."""

    log: str
    method: str
    as_of: Sequence[str]
    seed: int | None
    gradient_steps: int | None
    out: str | None
    resume: bool
    address: str | None


def train_offline(config: Config, asked: Offline, *, stop_on_signals: Callable[[], threading.Event]) -> None:
    """Read the log, learn, save the policy and say what happened.

    Raises:
        EsrlError: no such method, a log that does not fit, a folder that holds another run, or learning that failed.
    """
    if asked.method not in NAMES:
        near = difflib.get_close_matches(asked.method, NAMES, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise MethodError(f"there is no method {asked.method!r}{hint}", "--method", f"take one of {', '.join(NAMES)}")
    if asked.gradient_steps and asked.method in WITHOUT_GRADIENTS:
        raise MethodError(f"{asked.method} takes no gradient steps", "--steps", "leave it out")
    if asked.resume and asked.method not in ENHANCEDRL:
        raise MethodError(f"{asked.method} keeps no checkpoints", "--resume", "start it without --resume")
    folder = Path(asked.out).expanduser().resolve() if asked.out else config.run.path / "offline" / asked.method
    as_of = asked.as_of
    if asked.resume and not as_of:
        as_of = [f"{worker}={commit}" for worker, commit in read_run(folder).lineage.items()]
    seed = config.learner.seed if asked.seed is None else asked.seed
    log = read_log(asked.log, config, as_of)
    click.echo(f"log             {log.where}")
    if config.policy.held_out_share:
        whole, log = len(log.steps), log.of_users(config, held_out=False)
        click.echo(f"held out        {whole - len(log.steps):,} steps, for `esrl evaluate`")
    without_next = config.replay.sample_without_next and asked.method in (*ENHANCEDRL, *RLLIB_PEERS)  # td3 has its own discount
    known = len(log.steps.samplable(without_next=without_next))
    click.echo(f"steps           {len(log.steps):,} in {log.num_sessions:,} sessions, {known:,} to learn from")
    started = time.monotonic()
    learn = _with_checkpoints if asked.method in ENHANCEDRL else _without_checkpoints
    policy, losses = learn(config, asked, log, folder, seed, stop_on_signals)
    path = save_policy(policy, folder)
    click.echo(f"method          {asked.method}, seed {seed}")
    click.echo(f"gradient steps  {policy.manifest.gradient_steps:,}")
    if losses:
        parts = (f"{name.removesuffix('_loss')} {losses[name]:.4g}" for name in ("critic_loss", "actor_loss"))
        click.echo(f"losses          {', '.join(parts)}")
    click.echo(f"seconds         {time.monotonic() - started:.1f}")
    click.echo(f"policy          {path}")


Learnt = tuple[Policy, dict[str, float]]


def _with_checkpoints(
    config: Config, asked: Offline, log: ReadLog, folder: Path, seed: int, stop_on_signals: Callable[[], threading.Event]
) -> Learnt:
    """EnhancedRL and its kin through RLlib, on local or remote learners."""
    from esrl_ray import actors
    from esrl_ray.learning.algorithm import EnhancedRLConfig
    from esrl_ray.learning.offline import OfflineTraining

    wanted = EnhancedRLConfig().training(deployment=config, seed=seed, **ENHANCEDRL[asked.method]).debugging(log_level="ERROR")
    for name in ("ray.rllib", "ray.tune", "ray._common.deprecation"):  # they warn of what RLlib itself does
        logging.getLogger(name).setLevel(logging.ERROR)
    if config.learner.num_learners > 0:
        address = asked.address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it leaves a token file that later breaks `ray job submit`
        actors.join(address)
    checked = wanted.copy()
    checked.validate()
    deployment: Config = checked.deployment
    run = OfflineRun(asked.method, log.where, len(log.steps), log.lineage, seed, settings_digest(deployment))
    begin(folder, run, resume=asked.resume)
    allowed = round(len(log.steps) * deployment.replay.samples_per_insert / deployment.learner.batch_size)
    training = OfflineTraining(
        wanted,
        run,
        log.steps,
        folder=folder,
        num_gradient_steps=asked.gradient_steps or max(1, allowed),
        clock_ms=clock_ms,
        say=click.echo,
    )
    result = training.run(stop_on_signals())
    if result.policy is None:
        click.echo(f"stopped at gradient step {result.gradient_steps:,}; the same command with --resume goes on")
        sys.exit(130)
    return result.policy, result.losses


def _without_checkpoints(
    config: Config, asked: Offline, log: ReadLog, folder: Path, seed: int, stop_on_signals: Callable[[], threading.Event]
) -> Learnt:
    """Any other method: one call of `fit`."""
    if (folder / POLICY).exists():
        raise MethodError("the folder holds a policy", str(folder), "name another folder with --out")
    policy = _method_of(config, asked, len(log.steps), seed).fit(log.steps)
    folder.mkdir(parents=True, exist_ok=True)
    return policy, {}


def _method_of(config: Config, asked: Offline, num_steps: int, seed: int) -> Method:
    """The method, with the number of gradient steps that was asked for: RLlib's peers take it as such, others as samples per insert."""
    if not asked.gradient_steps:
        return create_method(asked.method, config, seed=seed)
    if asked.method in RLLIB_PEERS:
        from esrl_ray.learning.rllib_peers import RLlibPeer

        return RLlibPeer(asked.method, config, seed=seed, gradient_steps=asked.gradient_steps)
    ratio = asked.gradient_steps * config.learner.batch_size / num_steps
    replay = config.replay.model_copy(update={"samples_per_insert": ratio})
    return create_method(asked.method, config.model_copy(update={"replay": replay}), seed=seed)
