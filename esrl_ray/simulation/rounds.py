"""Simulated users served in process, round by round: how methods are compared without topics, log and shards between them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from esrl_ray.config import Config
from esrl_ray.exploration import arm_of
from esrl_ray.fusion import fused_scores
from esrl_ray.methods.method import Exploration, Method
from esrl_ray.normaliser import numeric_input
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, LEFT, UNKNOWN, Indices, Steps
from esrl_ray.reward import rewards_of
from esrl_ray.simulation.draws import normal, uniform
from esrl_ray.simulation.users import Page, Sessions, World
from esrl_ray.vocabulary import Arm, Floats, Ints

NUM_RUNNING = 250
"""Concurrent sessions, as many as the demo's traffic has."""
_NOISE, _UNSHOWN, _USER = 200, 201, 202


class SimulatedTraffic:
    """Users who come one after the other, get lists by their arm, and leave; every list becomes a step.

    Args:
        config: World, arms, list size, unshown pairs, rewards.
        seed: Of traffic and noise.
        capacity: Largest number of steps, and `NUM_RUNNING` more.

    Attributes:
        steps: All steps so far.
    """

    def __init__(self, config: Config, *, seed: int, capacity: int) -> None:
        self._config, self._seed, self._spec = config, seed, config.spec.build()
        self._world = World(config, seed=seed)
        self.steps = Steps(config, capacity + NUM_RUNNING)
        self._num_sessions = 0
        self._arms = np.array([ARMS.index(arm_of(f"u{u}", config.exploration)) for u in range(self._world.num_users)])
        self._explorations: list[Exploration] = []
        self._begun = np.zeros(NUM_RUNNING, np.int64)  # with which of them each running session began
        self._running = self._begin(NUM_RUNNING)
        self._before = np.full(NUM_RUNNING, UNKNOWN)

    def serve(self, exploration: Exploration, current: Policy, *, until: int, number: int) -> Iterator[int]:
        """Serve pages until there are `until` steps; yields the number of steps after each page of all running sessions.

        Args:
            exploration: Of the arm `explore`.
            current: Serves the arm `exploit`.
            until: Steps in all.
            number: Of the round, noted in the steps.
        """
        self._explorations.append(exploration)
        while len(self.steps) < until:
            page = self._world.candidates(self._running)
            numbers, left = self._turn(page, current, number)
            known = self._before != UNKNOWN
            self.steps.follow(self._before[known], numbers[known])
            self.steps.follow(numbers[left], LEFT)
            self._before = np.where(left, UNKNOWN, numbers)
            if left.any():
                self._running.put(np.flatnonzero(left), self._begin(int(left.sum())))
            yield len(self.steps)

    def _begin(self, count: int) -> Sessions:
        ids = np.arange(self._num_sessions, self._num_sessions + count)
        self._num_sessions += count
        return self._world.start(ids, (uniform(self._seed, ids, _USER) * self._world.num_users).astype(np.int64))

    def _explored(self, page: Page, states: Floats, codes: Ints) -> tuple[Floats, Floats]:
        """Anchors and actions of the arm `explore`, (n, N, A); noise of a session stays around the centre that the session began with."""
        newest = len(self._explorations) - 1
        self._begun[self._running.page == 0] = newest
        begun = self._begun if self._explorations[newest].scope == "session" else np.full_like(self._begun, newest)
        anchors = np.empty((*page.scores.shape[:2], self._spec.num_actions), np.float32)
        actions = np.empty_like(anchors)
        for number in np.unique(begun):
            exploration, mine = self._explorations[number], begun == number
            anchors[mine] = exploration.centre.act(states[mine], codes[mine], page.scores[mine])
            noise = np.broadcast_to(self._noise(exploration, page), anchors.shape)
            actions[mine] = np.clip(anchors[mine] + noise[mine], -1, 1)
        return anchors, actions

    def _turn(self, page: Page, current: Policy, number: int) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """One page of every running session: the numbers of its steps, and who leaves."""
        running, config = self._running, self._config
        states, arms = page.states(), self._arms[self._running.users]
        codes = np.zeros((*page.items.shape, 0), np.int32)
        anchors, actions = self._explored(page, states, codes)
        fused = fused_scores(torch.from_numpy(page.scores), torch.from_numpy(actions), self._spec).numpy()
        for arm, policy in ((Arm.EXPLOIT, current), (Arm.CONTROL, Policy.static(self._spec))):
            if (chosen := arms == ARMS.index(arm)).any():
                actions[chosen], fused[chosen] = policy.fuse(states[chosen], codes[chosen], page.scores[chosen])
        list_size, num_pairs = config.serve.list_size, config.max_pairs
        order = np.argsort(-fused, axis=1, kind="stable")
        rest = np.argsort(uniform(self._seed, running.ids[:, None], running.page[:, None], np.arange(order.shape[1] - list_size), _UNSHOWN))
        unshown = np.take_along_axis(order[:, list_size:], rest[:, : num_pairs - list_size], axis=1)
        logged = np.concatenate([order[:, :list_size], unshown], axis=1)  # (n, G)
        users, sessions = running.users, running.ids
        outcome, left = self._world.respond(running, np.take_along_axis(page.items, logged[:, :list_size], axis=1))
        behaviours = np.zeros((*logged.shape, outcome.shape[-1]), np.float32)
        behaviours[:, :list_size] = outcome
        shown = np.broadcast_to((np.arange(num_pairs) < list_size).astype(np.float32), logged.shape)
        wide = {"states": states, "scores": page.scores, "actions": actions, "anchor_actions": anchors, "categorical": codes}
        columns = {name: np.take_along_axis(column, logged[..., None], axis=1) for name, column in wide.items()}
        numbers = self.steps.add(
            {"sessions": sessions, "users": users, "rounds": number, "arms": arms},
            {
                **columns,
                "behaviours": behaviours,
                "rewards": rewards_of(behaviours, config.reward) * shown[..., None],
                "shown": shown,
                "valid": np.ones_like(shown),
                "candidate_means": numeric_input(states, page.scores).mean(1, dtype=np.float64),
            },
        )
        return numbers, left

    def _noise(self, exploration: Exploration, page: Page) -> Floats:
        """(n, N, A), or broadcastable to it."""
        ids, pages = self._running.ids[:, None, None], self._running.page[:, None, None]
        if exploration.scope == "session":
            pages = np.zeros_like(pages)
        items = page.items[..., None] if exploration.scope == "pair" else np.zeros((1, 1, 1), np.int64)
        keys = self._seed, ids, pages, items, np.arange(self._spec.num_actions), _NOISE
        if exploration.std is not None:
            return (exploration.std * normal(*keys)).astype(np.float32)
        return (exploration.low + (exploration.high - exploration.low) * uniform(*keys)).astype(np.float32)


def learn_online(method: Method, config: Config, *, seed: int, num_steps: int) -> Iterator[tuple[int, Policy]]:
    """Serve and learn by rounds of `exploration.round_steps`; yields the number of steps and the policy after each round.

    Args:
        method: Learns; its exploration serves the arm `explore`, its newest policy the arm `exploit`.
        config: World, arms, rounds.
        seed: Of the traffic.
        num_steps: In all.
    """
    traffic = SimulatedTraffic(config, seed=seed, capacity=num_steps)
    current = Policy.static(config.spec.build())
    for number, start in enumerate(range(0, num_steps, config.exploration.round_steps)):
        until = min(num_steps, start + config.exploration.round_steps)
        for _ in traffic.serve(method.exploration(), current, until=until, number=number):
            pass
        current = method.fit(traffic.steps)
        yield len(traffic.steps), current
