"""The training loop: warm up, learn, publish, end rounds, keep checkpoints, and survive the death of any other part.

Where truth lives: policies and the current round in the policy store, parameters in the newest checkpoint, data in the step log. The
loop's own process may be killed at any time: it resumes from the newest checkpoint and takes over the store's round when that is ahead.
Gradient steps after the checkpoint are lost; the shards get the sampling budget of that moment again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from esrl_ray import actors
from esrl_ray.config import Config
from esrl_ray.errors import LearnersLost, LoopError, PolicyRejected
from esrl_ray.evaluation.second_tier import ReadNewest, SecondTierVerdict
from esrl_ray.learning.algorithm import EnhancedRL, learner_results
from esrl_ray.learning.checkpoint import Progress, restore_checkpoint, save_checkpoint, set_aside_other_reward
from esrl_ray.learning.judging import Judging
from esrl_ray.learning.learner import GRADIENT_STEPS
from esrl_ray.learning.rounds import fit_scales, next_round
from esrl_ray.learning.shards import Shards
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.policy.store import ROLLBACK, PolicySnapshot
from esrl_ray.telemetry import Telemetry, log_change
from esrl_ray.vocabulary import Round, cut_lineage

PROBE_LISTS = 64
"""Recent lists that the gate judges a policy on."""

WATCH_MS = 500
"""Clock time between looks at the shards' counts."""

PAUSE_S = 0.2
STORE_TIMEOUT_S = 30.0
MAX_REBUILDS = 5
"""The loop gives up when the learners died this often in a row without a new checkpoint."""

_logger = logging.getLogger(__name__)


class TrainingLoop:
    """Trains EnhancedRL from replay shards and publishes policies.

    `run` blocks its thread; `status` may be called from another thread meanwhile. In an actor that means: `run` in a thread of its own, or
    `max_concurrency` of at least 2.

    Args:
        config: Deployment.
        store: Actor of the policy store.
        shards: Actors of the replay shards.
        checkpoint_dir: Folder of the checkpoints; belongs to this loop alone.
        clock_ms: Wall clock, epoch milliseconds.
        read_newest: Reads the step log for the second tier of the gate; needed unless that is off.

    Raises:
        LoopError: the second tier has no log to read.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: ActorHandle,
        shards: Sequence[ActorHandle],
        checkpoint_dir: Path,
        clock_ms: Callable[[], int],
        read_newest: ReadNewest | None = None,
    ) -> None:
        if config.policy.second_tier != "off" and read_newest is None:
            raise LoopError(f"policy.second_tier {config.policy.second_tier} has no log to read", "training loop", "pass read_newest")
        self._read_newest = read_newest
        self._config, self._spec = config, config.spec.build()
        self._store, self._shards = store, Shards(shards)
        self._checkpoints, self._clock_ms = checkpoint_dir, clock_ms
        self._config_digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
        self._progress = Progress(self._spec.digest, config.reward.digest)
        self._results: dict[str, float] = {}
        self._gradient_steps = self._published_steps = 0
        self._first: tuple[int, int] | None = None  # (clock, gradient steps) of the first call in this process
        self._last = {"publish": 0, "checkpoint": 0, "watch": 0}  # clock of each
        self._rebuilds = 0
        self._learner_pids: list[int] = []
        self._state = "starting"
        self._lineage: Mapping[str, int] = {}
        self._judging: Judging | None = None  # the round's candidate, while it is under way
        self._judged: tuple[int, SecondTierVerdict] | None = None  # its version and verdict, until the round ends or goes on
        self._last_verdict = ""

    def run(self, stop: threading.Event) -> None:
        """Train until `stop` is set, then write a last checkpoint.

        Raises:
            LoopError: the learners died again and again, or no checkpoint fits.
        """
        torch.set_num_threads(1)
        self._telemetry = Telemetry()
        while not stop.is_set():
            algorithm: EnhancedRL | None = None
            try:
                algorithm = EnhancedRL.of(self._config)
                self._resume(algorithm, stop)
                self._learn(algorithm, stop)
            except (RayError, LearnersLost) as error:
                self._rebuilds += 1
                if self._rebuilds > MAX_REBUILDS:
                    raise LoopError(
                        f"the learners ended {self._rebuilds} times in a row: {error}", "training loop", "read the learners' logs"
                    ) from error
                log_change(_logger, "learners lost, rebuilding", {"rebuilds": self._rebuilds, "why": str(error).splitlines()[0]})
                self._state = "rebuilding"
                stop.wait(1.0)
            finally:
                self._forget_verdict()  # a loop that comes back judges again
                if algorithm is not None:
                    _close(algorithm)
        self._state = "stopped"

    def status(self) -> dict[str, Any]:
        """Counts, losses of the last call, round, newest accepted version and lineage."""
        clock, steps = self._first or (0, 0)
        seconds = (self._progress.learnt_ms - clock) / 1e3
        return {
            "state": self._state,
            "gradient_steps": self._gradient_steps,
            "samples": self._gradient_steps * self._config.learner.batch_size,
            "steps_per_s": (self._gradient_steps - steps) / seconds if seconds > 0 else 0.0,
            **{name: self._results.get(name) for name in ("critic_loss", "actor_loss", "outside_share", "phi_mean")},
            "round": self._progress.round,
            "version": self._progress.version,
            "published": self._progress.published,
            "rejected": self._progress.rejected,
            "second_tier": self._last_verdict or self._config.policy.second_tier,
            "rebuilds": self._rebuilds,
            "learner_pids": self._learner_pids,
            "lineage": dict(self._lineage),
        }

    def _resume(self, algorithm: EnhancedRL, stop: threading.Event) -> None:
        """Newest checkpoint, then whatever the store knows better."""
        aside = set_aside_other_reward(self._checkpoints, self._config)
        restored = restore_checkpoint(algorithm, self._checkpoints, self._config)
        self._progress = restored or Progress(self._spec.digest, self._config.reward.digest)
        self._gradient_steps = self._published_steps = algorithm.published()[2]
        self._first, self._lineage = None, algorithm.lineage
        self._learner_pids = algorithm.each_learner(lambda _: os.getpid())
        if aside is None:
            self._shards.resume(self._progress.limiters)
        else:
            log_change(_logger, "checkpoints have learnt another reward, learning begins anew", {"aside": aside})
            self._shards.start_anew()
        algorithm.draw_from(self._shards.handles)
        while not stop.is_set():
            self._shards.watch(self._telemetry)
            if (snapshot := self._snapshot()) is not None and (not self._progress.fitted or self._adopt(algorithm, snapshot)):
                return
            stop.wait(PAUSE_S)

    def _learn(self, algorithm: EnhancedRL, stop: threading.Event) -> None:
        while not stop.is_set():
            if self._due("watch", WATCH_MS):
                self._shards.watch(self._telemetry)
                self._progress.round_from = self._shards.at_most(self._progress.round_from)  # or the round would not end for long
                if self._progress.fitted:
                    self._take_over(algorithm)
            if not self._progress.fitted:
                self._state = "warming up"
                if not self._warm_up(algorithm):
                    stop.wait(PAUSE_S)
                    continue
            self._state = "learning"
            self._train(algorithm)
            if self._gradient_steps > self._published_steps and self._due("publish", self._config.policy.publish_interval_s * 1e3):
                self._publish(algorithm)
            if self._shards.inserted - self._progress.round_from >= self._config.exploration.round_steps:
                self._end_round(algorithm)
            if self._due("checkpoint", self._config.learner.checkpoint_interval_s * 1e3):
                self._save(algorithm)
        if self._progress.fitted:
            self._save(algorithm)

    def _train(self, algorithm: EnhancedRL) -> None:
        results = learner_results(algorithm.train())
        if not results or (steps := int(results[GRADIENT_STEPS])) <= self._gradient_steps:
            return
        now = self._clock_ms()
        batch = self._config.learner.batch_size
        self._telemetry.count("esrl_learner_gradient_steps_total", steps - self._gradient_steps)
        self._telemetry.count("esrl_learner_samples_total", (steps - self._gradient_steps) * batch)
        for name in ("critic_loss", "actor_loss", "outside_share"):
            self._telemetry.gauge(f"esrl_learner_{name}", results[name])
        self._first = self._first or (now, steps)
        self._results, self._gradient_steps, self._lineage = results, steps, algorithm.lineage
        self._progress.learnt_ms = now

    def _warm_up(self, algorithm: EnhancedRL) -> bool:
        """Fit the first normaliser once enough lists are in; control serves until the first policy is accepted."""
        wanted = self._config.exploration.warmup_steps
        if self._shards.inserted < wanted or (lists := self._shards.recent(wanted)) is None or (snapshot := self._snapshot()) is None:
            return False
        algorithm.set_scales(*fit_scales(lists), fold=False)
        anchor = Policy.from_bytes(snapshot.anchor)
        algorithm.set_anchor(anchor)
        if anchor.manifest.kind is not PolicyKind.STATIC or anchor.parameters["action"].any():  # policies came before
            algorithm.start_from_anchor()
        self._enter(snapshot, round_from=0 if snapshot.round.number == 0 else self._shards.inserted)
        self._progress.fitted = True
        log_change(_logger, "normaliser fitted, learning starts", {"steps": self._shards.inserted, "round": snapshot.round.number})
        self._save(algorithm)
        return True

    def _publish(self, algorithm: EnhancedRL) -> None:
        parameters, normaliser, steps = algorithm.published()
        progress, learner = self._progress, self._config.learner
        manifest = Manifest(
            version=0,
            digest="",
            kind=PolicyKind(learner.level),
            spec=self._spec,
            hidden_sizes=learner.hidden_sizes,
            embedding_size=learner.embedding_size,
            actor=learner.actor,
            lineage=dict(algorithm.lineage),
            parent=progress.version or progress.anchor_version,
            round=progress.round,
            gradient_steps=steps,
            config_digest=self._config_digest,
            created_ms=self._clock_ms(),
            learnt_ms=progress.learnt_ms,
        )
        blob = Policy.of(manifest, parameters, normaliser).to_bytes()
        try:
            progress.version = ray.get(self._store.publish.remote(blob, self._shards.recent(PROBE_LISTS)), timeout=STORE_TIMEOUT_S)
        except PolicyRejected as error:
            progress.rejected += 1
            self._telemetry.count("esrl_policy_rejected_total")
            _logger.warning("policy rejected gradient_steps=%d: %s", steps, error)
        except (RayActorError, GetTimeoutError) as error:
            _logger.warning("policy store does not answer, trying again: %s", str(error).splitlines()[0])
            return
        except RayTaskError as error:  # a full disk, say: the learners are well
            _logger.warning("policy store failed: %r, trying again", error.cause)
            return
        else:
            progress.published += 1
            self._telemetry.count("esrl_policy_published_total")
            facts = {"version": progress.version, "round": progress.round, "gradient_steps": steps}
            log_change(_logger, "policy published", {**facts, "lineage": cut_lineage(algorithm.lineage)})
        self._published_steps = steps

    def _end_round(self, algorithm: EnhancedRL) -> None:
        """Make the store's current policy, or the one that was judged, the next anchor; learning goes on while it is being judged."""
        if self._under_way() or (snapshot := self._snapshot()) is None:
            return
        if self._is_ours(snapshot.round):
            if (version := self._next_anchor(snapshot)) is None:
                return
            turn = next_round(snapshot.round.number + 1, version, self._config, started_ms=self._clock_ms())
            try:
                ray.get(self._store.start_round.remote(turn), timeout=STORE_TIMEOUT_S)
            except (RayActorError, GetTimeoutError, PolicyRejected) as error:
                _logger.warning("the store did not start round %d, trying again: %s", turn.number, str(error).splitlines()[0])
                if isinstance(error, PolicyRejected):  # that version is no good: judge what serves by then
                    self._forget_verdict()
                return
            except RayTaskError as error:
                _logger.warning("policy store failed: %r, trying again to start round %d", error.cause, turn.number)
                return
            by = self._judged[1].text if self._judged else "first tier only"
            log_change(_logger, "policy promoted", {"version": version, "round": turn.number, "by": by})
            if (snapshot := self._snapshot()) is None:
                return
        if self._adopt(algorithm, snapshot):
            self._save(algorithm)

    def _take_over(self, algorithm: EnhancedRL) -> None:
        """Enter a round that someone else started, at once: until then the gate measures what is learnt from an anchor that is not ours."""
        if (snapshot := self._snapshot()) is not None and not self._is_ours(snapshot.round) and self._adopt(algorithm, snapshot):
            self._save(algorithm)

    def _is_ours(self, turn: Round) -> bool:
        return (self._progress.round, self._progress.anchor_version) == (turn.number, turn.anchor_version)

    def _next_anchor(self, snapshot: PolicySnapshot) -> int | None:
        """Version that becomes the next anchor. None while it is being judged, and when the round goes on: none is new, or may be."""
        turn, mode = snapshot.round, self._config.policy.second_tier
        current = Policy.from_bytes(snapshot.current)
        if snapshot.pinned:
            self._go_on(turn.number, "a policy is pinned")
        elif self._judged is not None:
            version, verdict = self._judged
            if (rolled_back := self._rolled_back(version)) is None:
                return None
            if rolled_back:
                self._go_on(turn.number, f"version {version} is not promoted: it was rolled back while it was judged")
            elif verdict.passed if mode == "require" else verdict.outcome != "block":
                return version
            else:
                self._go_on(turn.number, f"version {version} is not promoted: {verdict.text}")
        elif current.version == turn.anchor_version or current.manifest.kind is PolicyKind.SCORE:  # no actions to explore around
            self._go_on(turn.number, "no new policy")
        elif mode == "off" or self._read_newest is None:
            return current.version
        else:
            anchor = Policy.from_bytes(snapshot.anchor)
            self._judging = Judging(current, anchor, self._config, self._read_newest, clock_ms=self._clock_ms)
        return None

    def _rolled_back(self, version: int) -> bool | None:
        """Whether a rollback followed a version: whoever did it does not want that version. None: the store does not answer."""
        manifests: list[Manifest] | None = actors.ask(self._store.manifests.remote)
        return None if manifests is None else any(m.version > version and m.note.startswith(ROLLBACK) for m in manifests)

    def _under_way(self) -> bool:
        """Whether a judgement is. One that has ended is kept beside its policy, counted, and decides about the round."""
        if self._judging is None:
            return False
        if (verdict := self._judging.verdict()) is None:
            return True
        version = self._judging.candidate.version
        try:
            ray.get(self._store.keep_verdict.remote(version, verdict), timeout=STORE_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            _logger.warning("the store did not keep a verdict, trying again: %s", str(error).splitlines()[0])
            return True
        except (PolicyRejected, RayTaskError) as error:  # it is no less a verdict
            _logger.warning("the verdict on version %d is not kept: %s", version, error)
        self._telemetry.count("esrl_policy_judged_total", outcome=verdict.outcome)
        log_change(_logger, "policy judged", {"version": version, "against": verdict.against, "verdict": verdict.text})
        self._judging, self._judged, self._last_verdict = None, (version, verdict), f"version {version}: {verdict.text}"
        return False

    def _go_on(self, number: int, why: str) -> None:
        """Let the round last for as many steps again."""
        _logger.info("round goes on number=%d: %s", number, why)
        self._progress.round_from = self._shards.inserted
        self._forget_verdict()

    def _forget_verdict(self) -> None:
        if self._judging is not None:
            self._judging.cancel()
        self._judging = self._judged = None

    def _adopt(self, algorithm: EnhancedRL, snapshot: PolicySnapshot) -> bool:
        """Take over the store's round when it is not ours: its anchor, and scales refitted on recent lists. False: try again later."""
        if self._is_ours(snapshot.round):
            return True
        if (lists := self._shards.recent(self._config.exploration.warmup_steps)) is None:
            return False
        algorithm.set_scales(*fit_scales(lists), fold=True)
        anchor = Policy.from_bytes(snapshot.anchor)
        algorithm.set_anchor(anchor)
        if anchor.manifest.config_digest != self._config_digest:  # from elsewhere: our actor may be far outside the bounds around it
            algorithm.start_from_anchor()
        self._enter(snapshot, round_from=self._shards.inserted)
        return True

    def _enter(self, snapshot: PolicySnapshot, *, round_from: int) -> None:
        self._forget_verdict()
        turn = snapshot.round
        self._progress.round, self._progress.anchor_version, self._progress.round_from = turn.number, turn.anchor_version, round_from
        log_change(_logger, "round entered", {"number": turn.number, "anchor": turn.anchor_version, "inserted": self._shards.inserted})

    def _save(self, algorithm: EnhancedRL) -> None:
        self._shards.watch(self._telemetry)
        self._progress.limiters = self._shards.limiters
        save_checkpoint(algorithm, self._checkpoints, self._progress)
        self._last["checkpoint"] = self._clock_ms()
        self._rebuilds = 0

    def _snapshot(self) -> PolicySnapshot | None:
        snapshot: PolicySnapshot | None = actors.ask(self._store.snapshot.remote)
        return snapshot

    def _due(self, what: str, interval_ms: float) -> bool:
        now = self._clock_ms()
        if now - self._last[what] < interval_ms:
            return False
        self._last[what] = now
        return True


def _close(algorithm: EnhancedRL) -> None:
    try:
        algorithm.stop()
    except RayError as error:  # its learners are dead already
        _logger.warning("learners did not stop cleanly: %s", str(error).splitlines()[0])
