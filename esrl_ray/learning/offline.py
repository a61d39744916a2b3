"""Offline training of EnhancedRL through RLlib: a log in memory, progress, checkpoints, resumption, and learners that may die.

A run may be killed at any time: what comes after the newest checkpoint is computed again, and as each learner call draws by its number,
to the same result.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from ray.exceptions import RayError

from esrl_ray.config import Config
from esrl_ray.errors import Diverged, LearnersLost, LoopError, MethodError
from esrl_ray.learning.algorithm import EnhancedRL, EnhancedRLConfig, learner_results
from esrl_ray.learning.checkpoint import Progress, restore_checkpoint, save_checkpoint
from esrl_ray.learning.learner import GRADIENT_STEPS
from esrl_ray.learning.logged_anchor import logged_anchor
from esrl_ray.learning.offline_run import CHECKPOINTS, OfflineRun
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.replay.steps import Steps
from esrl_ray.telemetry import log_change

PROGRESS_MS = 10_000
"""Clock time between progress lines."""

MAX_REBUILDS = 5
"""The run gives up when the learners died this often in a row without a new checkpoint."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OfflineResult:
    """How a run ended: `policy` is None when it was stopped before its last gradient step."""

    policy: Policy | None
    gradient_steps: int
    losses: dict[str, float] = field(default_factory=dict)


class OfflineTraining:
    """Trains on a log, on as many learners as configured, until a number of gradient steps is done.

    `run` blocks its thread; `learner_pids` may be read from another one.

    Args:
        config: RLlib's configuration: deployment, settings, learners.
        run: What is being done, for the policy's manifest.
        steps: The log.
        folder: Of the run.
        num_gradient_steps: In all; rounded up to whole learner calls.
        clock_ms: Wall clock, epoch milliseconds.
        say: Takes progress lines.
    """

    def __init__(
        self,
        config: EnhancedRLConfig,
        run: OfflineRun,
        steps: Steps,
        *,
        folder: Path,
        num_gradient_steps: int,
        clock_ms: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._run, self._steps, self._folder = config, run, steps, folder
        self._wanted, self._clock_ms, self._say = num_gradient_steps, clock_ms, say
        self._checkpoints = folder / CHECKPOINTS
        self._rebuilds = 0
        self._anchors: list[Policy | None] = []
        self.learner_pids: list[int] = []

    def run(self, stop: threading.Event) -> OfflineResult:
        """Train until all gradient steps are done or `stop` is set; the newest checkpoint, if any, is where it begins.

        Raises:
            LoopError: the learners died again and again, or no checkpoint fits.
            MethodError: the log has nothing to learn from, or learning diverged.
        """
        torch.set_num_threads(1)  # OpenMP threads that spin on shared cores cost 9x
        while True:
            algorithm: EnhancedRL | None = None
            try:
                algorithm = self._build()
                return self._learn(algorithm, stop)
            except Diverged as error:  # the same draws would lead there again
                raise MethodError(error.what, self._run.method, error.fix) from error
            except (RayError, LearnersLost) as error:
                self._rebuilds += 1
                why = str(error).splitlines()[0]
                if self._rebuilds > MAX_REBUILDS:
                    raise LoopError(f"the learners ended {self._rebuilds} times in a row: {why}", "training", "read their logs") from error
                self._say(f"learners lost, going on from the newest checkpoint: {why}")
            finally:
                self.learner_pids = []
                if algorithm is not None:
                    with contextlib.suppress(RayError):  # its learners may be dead already
                        algorithm.stop()

    def _build(self) -> EnhancedRL:
        algorithm = self._config.build_algo()
        assert isinstance(algorithm, EnhancedRL)
        deployment = algorithm.config.deployment
        num_calls = math.ceil(self._wanted / deployment.learner.updates_per_call)
        algorithm.draw_from_steps(self._steps, num_calls=num_calls)
        if (anchor := self._anchor(deployment)) is not None:
            algorithm.set_anchor(anchor)
            algorithm.start_from_anchor()
        restore_checkpoint(algorithm, self._checkpoints, deployment)
        self.learner_pids = algorithm.each_learner(lambda _: os.getpid())
        return algorithm

    def _anchor(self, deployment: Config) -> Policy | None:
        """The log's anchor; found once, also when learners are rebuilt."""
        if not self._anchors:
            self._anchors.append(logged_anchor(self._steps, deployment))
            if (anchor := self._anchors[0]) is not None:
                self._say(anchor.manifest.note)
        return self._anchors[0]

    def _learn(self, algorithm: EnhancedRL, stop: threading.Event) -> OfflineResult:
        deployment: Config = algorithm.config.deployment
        learner, digests = deployment.learner, (deployment.spec.build().digest, deployment.reward.digest)
        target = math.ceil(self._wanted / learner.updates_per_call) * learner.updates_per_call
        first = done = algorithm.published()[2]
        begun = said = saved = self._clock_ms()
        result = OfflineResult(None, done)
        log_change(_logger, "offline training", {"from": done, "to": target, "learners": max(1, learner.num_learners)})
        while done < target and not stop.is_set():
            numbers = learner_results(algorithm.train())
            result.losses, done, now = numbers, int(numbers[GRADIENT_STEPS]), self._clock_ms()
            if now - said >= PROGRESS_MS:
                self._say(progress_line(numbers, target, per_s=1e3 * (done - first) / max(1, now - begun)))
                said = now
            if now - saved >= 1e3 * learner.checkpoint_interval_s:
                save_checkpoint(algorithm, self._checkpoints, Progress(*digests, fitted=True, learnt_ms=now))
                saved, self._rebuilds = now, 0
        if done > first:
            save_checkpoint(algorithm, self._checkpoints, Progress(*digests, fitted=True, learnt_ms=self._clock_ms()))
        result.gradient_steps = done
        if done >= target:
            result.policy = self._policy(algorithm)
        return result

    def _policy(self, algorithm: EnhancedRL) -> Policy:
        learner, now = algorithm.config.deployment.learner, self._clock_ms()
        parameters, normaliser, steps = algorithm.published()
        if not all(np.isfinite(values).all() for values in parameters.values()):  # in a checkpoint that an older version wrote
            raise MethodError(f"parameters at gradient step {steps} are not finite", str(self._checkpoints), "delete it to learn anew")
        manifest = Manifest(
            version=0,
            digest="",
            kind=PolicyKind(learner.level),
            spec=algorithm.config.deployment.spec.build(),
            hidden_sizes=learner.hidden_sizes,
            embedding_size=learner.embedding_size,
            actor=learner.actor,
            lineage=self._run.lineage,
            gradient_steps=steps,
            config_digest=self._run.settings,
            created_ms=now,
            learnt_ms=now,
            note=f"{self._run.method}, offline",
        )
        return Policy.of(manifest, parameters, normaliser)


def progress_line(numbers: dict[str, float], target: int, *, per_s: float) -> str:
    """`gradient step 1,200 of 5,000 (85.0/s, 45 s left)  critic loss ...`."""
    done = numbers[GRADIENT_STEPS]
    left = f"{(target - done) / per_s:.0f} s left" if per_s > 0 else "time left unknown"
    losses = "  ".join(f"{name.replace('_', ' ')} {numbers[name]:.4g}" for name in ("critic_loss", "actor_loss", "outside_share"))
    return f"gradient step {done:,.0f} of {target:,} ({per_s:.1f}/s, {left})  {losses}"
