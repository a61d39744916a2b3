"""Frozen policies against each other on the same users, without noise: common random numbers, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from esrl_ray.config import Config
from esrl_ray.evaluation.arms import clustered_mean
from esrl_ray.evaluation.report import Interval
from esrl_ray.policy.policy import Policy
from esrl_ray.reward import rewards_of
from esrl_ray.simulation.draws import Doubles
from esrl_ray.simulation.users import Page, Sessions, World

MAX_PAGES = 300
"""A session that is still running then is cut off: about one in a million under control."""
UNSEEN = 1_000_003
"""Added to the traffic's seed, so that no session of the run is met again."""


class Scorer(Protocol):
    """Ranks pages by whatever it likes, the truth included: an oracle."""

    def score(self, page: Page, sessions: Sessions) -> Doubles:
        """(n, N) scores of the candidates of n sessions; the largest are shown."""
        ...


@dataclass(frozen=True, slots=True)
class FrozenResult:
    """One policy on the common sessions."""

    version: int  # 0 for a scorer
    reward: Interval  # per session
    difference: Interval  # to the first policy, paired
    pages: float  # per session
    watch_s: float  # per session


def scores_of(policy: Policy | Scorer, page: Page, sessions: Sessions) -> Doubles:
    """(n, N) what orders the candidates of n sessions: the fused scores of a policy, or those of a scorer."""
    if not isinstance(policy, Policy):
        return policy.score(page, sessions)
    return policy.fuse(page.states(), np.zeros((*page.items.shape, 0), np.int32), page.scores)[1].astype(np.float64)


def play(policy: Policy | Scorer, config: Config, *, seed: int, sessions: int) -> tuple[Doubles, Doubles, Doubles]:
    """Let one policy serve sessions to their end.

    Args:
        policy: Serves every list, without noise; or an oracle.
        config: World, reward, list size.
        seed: Of the sessions' draws.
        sessions: How many.

    Returns:
        Reward, pages and watch seconds of each session, (sessions,) each.
    """
    world = World(config, seed=seed)
    running = world.start(np.arange(sessions), np.arange(sessions) % world.num_users)
    reward, pages, watch = np.zeros(sessions), np.zeros(sessions), np.zeros(sessions)
    alive = np.arange(sessions)
    for _ in range(MAX_PAGES):
        part = running.take(alive)
        page = world.candidates(part)
        top = np.argsort(-scores_of(policy, page, part), axis=1, kind="stable")[:, : config.serve.list_size]
        behaviours, left = world.respond(part, np.take_along_axis(page.items, top, axis=1))
        running.put(alive, part)
        reward[alive] += rewards_of(behaviours, config.reward).sum((1, 2))
        pages[alive] += 1
        watch[alive] += behaviours[..., 1].sum(1)
        alive = alive[~left]
        if not len(alive):
            break
    return reward, pages, watch


def evaluate_frozen(policies: Sequence[Policy | Scorer], config: Config, *, seed: int, sessions: int) -> list[FrozenResult]:
    """Play every policy on the same sessions.

    Args:
        policies: The first one is what the others are compared with.
        config: World, reward, list size.
        seed: Of the traffic; the sessions here are others.
        sessions: Per policy.

    Returns:
        One result per policy, intervals of 95 % clustered by user.
    """
    results, first = [], None
    users = (np.arange(sessions) % config.simulation.num_users).astype(str)
    for policy in policies:
        reward, pages, watch = play(policy, config, seed=seed + UNSEEN, sessions=sessions)
        first = reward if first is None else first
        mean = Interval.of(*clustered_mean(reward, users), sessions)
        difference = Interval.of(*clustered_mean(reward - first, users), sessions)
        version = policy.version if isinstance(policy, Policy) else 0
        results.append(FrozenResult(version, mean, difference, float(pages.mean()), float(watch.mean())))
    return results
