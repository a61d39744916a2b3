"""The loop without its plumbing: simulated users, the core's `update`, and a list of steps in memory instead of topics, log and shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from esrl_ray.algo.update import LearnState, UpdateResult, prepare, update
from esrl_ray.config import Config
from esrl_ray.exploration import arm_of
from esrl_ray.fusion import fused_scores
from esrl_ray.learning.rounds import fit_scales
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.reward import rewards_of
from esrl_ray.simulation.draws import uniform
from esrl_ray.simulation.users import Page, Sessions, World
from esrl_ray.vocabulary import Arm, Floats, TransitionBatch

Indices = npt.NDArray[np.int64]
NUM_RUNNING = 250
"""Concurrent sessions, as many as the demo's traffic has."""
_NOISE, _UNSHOWN, _USER = 200, 201, 202
_UNKNOWN, _LEFT = -1, -2


class Steps:
    """Every step so far, in columns, and what follows each."""

    def __init__(self, config: Config, capacity: int, *, seed: int) -> None:
        spec, g = config.spec.build(), config.max_pairs
        self._rng = np.random.default_rng(seed)
        self._columns = {
            name: np.zeros((capacity, g, width), np.float32)
            for name, width in (
                ("states", spec.num_features),
                ("scores", spec.num_scores),
                ("actions", spec.num_actions),
                ("anchor_actions", spec.num_actions),
                ("rewards", config.reward.num_groups),
            )
        }
        self._shown = (np.arange(g) < config.serve.list_size).astype(np.float32)
        self._next = np.full(capacity, _UNKNOWN, np.int64)
        self.size = 0

    def add(self, **columns: Floats) -> Indices:
        """Append n steps, shown pairs first; returns their numbers."""
        n = len(columns["states"])
        numbers = np.arange(self.size, self.size + n)
        for name, column in columns.items():
            self._columns[name][numbers] = column
        self.size += n
        return numbers

    def follow(self, steps: Indices, by: Indices | int) -> None:
        """Set what follows steps: other steps, or `_LEFT`."""
        self._next[steps] = by

    def sample(self, num_steps: int) -> TransitionBatch:
        """Steps drawn uniformly from those whose end or next list is known."""
        return self._batch(self._rng.choice(np.flatnonzero(self._next[: self.size] != _UNKNOWN), num_steps))

    def newest(self, num_steps: int) -> TransitionBatch:
        """The newest steps."""
        return self._batch(np.arange(max(0, self.size - num_steps), self.size))

    def _batch(self, chosen: Indices) -> TransitionBatch:
        c, following = self._columns, self._next[chosen]
        has_next = (following >= 0).astype(np.float32)
        after, shown = np.maximum(following, 0), np.tile(self._shown, (len(chosen), 1))
        codes = np.zeros((*shown.shape, 0), np.int32)
        return TransitionBatch(
            states=c["states"][chosen],
            categorical=codes,
            scores=c["scores"][chosen],
            actions=c["actions"][chosen],
            anchor_actions=c["anchor_actions"][chosen],
            rewards=c["rewards"][chosen],
            shown=shown,
            valid=np.ones_like(shown),
            next_states=c["states"][after],
            next_categorical=codes,
            next_scores=c["scores"][after],
            next_shown=shown * has_next[:, None],
            has_next=has_next,
            terminated=(following == _LEFT).astype(np.float32),
        )


@dataclass(frozen=True, slots=True)
class Learnt:
    """The learner after some steps."""

    num_steps: int
    policy: Policy
    result: UpdateResult | None  # of the last gradient step


class InProcessLoop:
    """Decide, join and learn in one process, with the demo's arms, rounds and samples per insert.

    Args:
        config: Deployment; only `learner`, `exploration`, `serve`, `reward` and `simulation` matter.
        seed: Of traffic, noise and sampling.
        capacity: Largest number of steps.
    """

    def __init__(self, config: Config, *, seed: int, capacity: int) -> None:
        self._config, self._seed, self._spec = config, seed, config.spec.build()
        self._world = World(config, seed=seed)
        self._steps = Steps(config, capacity, seed=seed)
        self._state = LearnState.create(config, device="cpu")
        self._anchor = Policy.static(self._spec)
        self._current = self._anchor
        self._round, self._round_from = 0, 0
        self._fitted = False
        self._budget = 0.0
        self._num_sessions = 0
        self._arms = np.array([arm_of(f"u{u}", config.exploration) for u in range(self._world.num_users)])

    def run(self, *, until: tuple[int, ...]) -> Iterator[Learnt]:
        """Play and learn; yields at each of these numbers of steps."""
        running = self._begin(NUM_RUNNING)
        before = np.full(NUM_RUNNING, _UNKNOWN)
        result = None
        for stop in until:
            while self._steps.size < stop:
                page = self._world.candidates(running)
                numbers, left = self._turn(running, page)
                known = before != _UNKNOWN
                self._steps.follow(before[known], numbers[known])
                self._steps.follow(numbers[left], _LEFT)
                before = np.where(left, _UNKNOWN, numbers)
                if left.any():
                    running.put(np.flatnonzero(left), self._begin(int(left.sum())))
                result = self._learn(len(numbers)) or result
            yield Learnt(self._steps.size, self._current, result)

    def _begin(self, count: int) -> Sessions:
        ids = np.arange(self._num_sessions, self._num_sessions + count)
        self._num_sessions += count
        return self._world.start(ids, (uniform(self._seed, ids, _USER) * self._world.num_users).astype(np.int64))

    def _turn(self, running: Sessions, page: Page) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """One page of every running session."""
        states, arms = page.states(), self._arms[running.users]
        codes = np.zeros((*page.items.shape, 0), np.int32)
        anchors = self._anchor.act(states, codes, page.scores)
        low, high = self._config.exploration.low, self._config.exploration.high
        keys = running.ids[:, None, None], running.page[:, None, None], page.items[..., None], np.arange(self._spec.num_actions)
        noise = low + (high - low) * uniform(self._seed, *keys, _NOISE)
        actions = np.clip(anchors + noise.astype(np.float32), -1, 1)
        for arm, policy in ((Arm.EXPLOIT, self._current), (Arm.CONTROL, Policy.static(self._spec))):
            chosen = arms == arm
            actions[chosen] = policy.act(states[chosen], codes[chosen], page.scores[chosen])
        fused = fused_scores(torch.from_numpy(page.scores), torch.from_numpy(actions), self._spec).numpy()
        list_size, num_pairs = self._config.serve.list_size, self._config.max_pairs
        order = np.argsort(-fused, axis=1, kind="stable")
        rest = np.argsort(uniform(self._seed, running.ids[:, None], running.page[:, None], np.arange(order.shape[1] - list_size), _UNSHOWN))
        unshown = np.take_along_axis(order[:, list_size:], rest[:, : num_pairs - list_size], axis=1)
        logged = np.concatenate([order[:, :list_size], unshown], axis=1)  # (n, G)
        behaviours, left = self._world.respond(running, np.take_along_axis(page.items, logged[:, :list_size], axis=1))
        rewards = np.zeros((*logged.shape, self._config.reward.num_groups), np.float32)
        rewards[:, :list_size] = rewards_of(behaviours, self._config.reward)
        wide = logged[..., None]
        numbers = self._steps.add(
            states=np.take_along_axis(states, wide, axis=1),
            scores=np.take_along_axis(page.scores, wide, axis=1),
            actions=np.take_along_axis(actions, wide, axis=1),
            anchor_actions=np.take_along_axis(anchors, wide, axis=1),
            rewards=rewards,
        )
        return numbers, left

    def _learn(self, num_new: int) -> UpdateResult | None:
        """The gradient steps that new steps allow, and the end of a round."""
        config, networks = self._config, self._state.networks
        if self._steps.size < max(config.exploration.warmup_steps, config.replay.min_size):
            return None
        if not self._fitted:
            networks.set_scales(*fit_scales(self._steps.newest(config.exploration.warmup_steps)), fold=False)
            self._fitted = True
        per_call = config.learner.batch_size * config.learner.updates_per_call
        self._budget += num_new * config.replay.samples_per_insert
        result = None
        while self._budget >= per_call:
            self._budget -= per_call
            for part in prepare(self._state, self._steps.sample(per_call)).split(config.learner.updates_per_call):
                result = update(self._state, part)
        self._current = self._policy()
        if self._steps.size - self._round_from >= config.exploration.round_steps:
            networks.set_scales(*fit_scales(self._steps.newest(config.exploration.warmup_steps)), fold=True)
            self._anchor = self._current
            networks.set_anchor(self._anchor.parameters, self._anchor.normaliser)
            self._round, self._round_from = self._round + 1, self._steps.size
        return result

    def _policy(self) -> Policy:
        learner, networks = self._config.learner, self._state.networks
        manifest = Manifest(
            version=self._state.gradient_steps,
            digest="",
            kind=PolicyKind.PAIR,
            spec=self._spec,
            hidden_sizes=learner.hidden_sizes,
            embedding_size=learner.embedding_size,
            round=self._round,
            gradient_steps=self._state.gradient_steps,
        )
        return Policy.of(manifest, {k: v.numpy().copy() for k, v in networks.actor.state_dict().items()}, networks.normaliser)
