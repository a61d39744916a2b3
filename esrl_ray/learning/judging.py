"""The second tier of the gate beside a training loop: one judgement, in a process of its own, so that learning goes on meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable

import ray
import torch
from ray.exceptions import RayError

from esrl_ray import actors
from esrl_ray.config import Config
from esrl_ray.evaluation.second_tier import ReadNewest, Rule, SecondTierVerdict, abstained, judge_log
from esrl_ray.policy.policy import Policy

LIMIT_S = 600.0
"""A judgement that takes longer is given up: one of 60,000 lists takes 16 s of a core's time, and 40 s where the loop leaves little."""

NICE = 10
"""Priority of the process: it waits where the loop has no time."""

Judge = Callable[[bytes, bytes, Config, ReadNewest, int], SecondTierVerdict]


def judge_quietly(candidate: bytes, anchor: bytes, config: Config, read_newest: ReadNewest, seed: int) -> SecondTierVerdict:
    """Body of the process: `judge_log` on one thread, at low priority."""
    os.nice(NICE)
    torch.set_num_threads(1)
    return judge_log(Policy.from_bytes(candidate), Policy.from_bytes(anchor), config, read_newest, seed=seed)


class Judging:
    """A judgement under way. However it ends, there is a verdict: an error, a death or the time limit abstains.

    Args:
        candidate: To be promoted.
        anchor: What it would replace.
        config: Deployment.
        read_newest: Reads the step log.
        clock_ms: Wall clock, epoch milliseconds.
        judge: What the process runs.
    """

    def __init__(
        self,
        candidate: Policy,
        anchor: Policy,
        config: Config,
        read_newest: ReadNewest,
        *,
        clock_ms: Callable[[], int],
        judge: Judge = judge_quietly,
    ) -> None:
        self.candidate, self._anchor, self._rule = candidate, anchor, Rule.of(config)
        self._clock_ms, self._until_ms = clock_ms, clock_ms() + LIMIT_S * 1e3
        self._verdict: SecondTierVerdict | None = None
        self._ref = actors.run_once(judge, candidate.to_bytes(), anchor.to_bytes(), config, read_newest, config.learner.seed)

    def verdict(self) -> SecondTierVerdict | None:
        """What it says; None while it is under way."""
        if self._verdict is None:
            if ray.wait([self._ref], timeout=0)[0]:
                self._verdict = self._result()
            elif self._clock_ms() > self._until_ms:
                self.cancel()
                self._verdict = self._abstained(f"no verdict within {LIMIT_S:.0f} s")
        return self._verdict

    def cancel(self) -> None:
        """End the process, if it still runs."""
        ray.cancel(self._ref, force=True)

    def _result(self) -> SecondTierVerdict:
        try:
            verdict: SecondTierVerdict = ray.get(self._ref)
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return self._abstained(f"the judge ended: {type(error).__name__}: {lines[-1] if lines else 'without a word'}")
        return verdict

    def _abstained(self, why: str) -> SecondTierVerdict:
        return abstained(self.candidate, self._anchor, why, rule=self._rule)
