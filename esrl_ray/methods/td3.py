"""TD3 and TD3+BC at the level of requests: the off-policy peers that a plain reading of the literature gives.

Published: twin critics, the smaller of both in the target, target smoothing, delayed policy updates (arXiv 1802.09477); the behaviour
cloning term with its normalised weight (arXiv 2106.06860); Gaussian exploration, N(0, .2^2) before UnifiedRL bounded it. Ours: the unit of
actions in critics and cloning term; smoothing noise of a size that fits it; an actor that starts at the control policy; step sizes and
alpha, tuned on one simulated world: with 3e-4 the actor of TD3 saturates within a round (11.4 reward per session, control 17.0), with
uniform exploration of +-.15 it ends at 16.5, with these settings at 19.4. In worlds 1, 2 and 4 it ends below control
(benchmarks/results/methods.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch

from esrl_ray.algo import td3
from esrl_ray.algo.actor import Actor
from esrl_ray.algo.device import moved
from esrl_ray.algo.losses import soft_update
from esrl_ray.algo.networks import Critics
from esrl_ray.config import Config
from esrl_ray.methods.method import Exploration
from esrl_ray.methods.request_level import RequestBatch, RequestRounds, minimise
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps

NUM_CRITICS = 2
ACTION_UNIT = 0.3
"""Unit of actions in critics and the cloning term: the width of UnifiedRL's published bounds."""


@dataclass(frozen=True, slots=True)
class Td3Settings:
    """Hyper-parameters; sizes and batch size are the learner's."""

    gamma: float = 0.9
    critic_lr: float = 1e-3  # Adam
    actor_lr: float = 3e-5  # Adam; nothing else holds the actor of TD3 back
    policy_delay: int = 2  # critic steps per actor step and per soft update
    target_noise: float = 0.05  # standard deviation of the smoothing noise, in units of actions
    noise_clip: float = 0.1  # largest smoothing noise
    soft_update: float = 0.01  # Polyak step of the targets, every `policy_delay` steps
    cloning_alpha: float | None = None  # TD3+BC's alpha; None = TD3
    explore_std: float | None = 0.2  # of Gaussian exploration; None = uniform in the deployment's bounds


TD3_BC = Td3Settings(actor_lr=3e-4, cloning_alpha=10.0)


class Td3Result(NamedTuple):
    """What one gradient step did; `actor_loss` is None where the actor waited."""

    critic_loss: torch.Tensor
    actor_loss: torch.Tensor | None


class Td3:
    """TD3 or TD3+BC by rounds, or on a log by one call of `fit`.

    Args:
        name: As in the catalogue.
        config: Deployment.
        seed: Of parameters, sampling and smoothing noise.
        settings: Hyper-parameters.
    """

    def __init__(self, name: str, config: Config, *, seed: int, settings: Td3Settings | None = None) -> None:
        self.name, self.settings, learner = name, settings or Td3Settings(), config.learner
        self._rounds = RequestRounds(name, config, seed=seed)
        self._noise = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            actor = Actor(self._rounds.spec, learner.hidden_sizes, learner.embedding_size, level="request")
            critics = Critics(self._rounds.spec, 1, NUM_CRITICS, hidden_sizes=learner.hidden_sizes, embedding_size=learner.embedding_size)
        self.actor, self.critics = actor.to(self._rounds.device), critics.to(self._rounds.device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self._actor_optimiser = torch.optim.Adam(list(self.actor.parameters()), lr=self.settings.actor_lr, fused=True)
        self._critic_optimiser = torch.optim.Adam(list(self.critics.parameters()), lr=self.settings.critic_lr, fused=True)

    def exploration(self) -> Exploration:
        """Around the newest policy, one draw per request."""
        return self._rounds.exploration(self.settings.explore_std)

    def fit(self, steps: Steps) -> Policy:
        """The gradient steps that the new steps allow, on batches of all steps.

        Raises:
            MethodError: no step has a known next list or end.
        """
        requests, num_updates = self._rounds.begin(steps)
        for _ in range(num_updates):
            self.update(requests.batch(self._rounds.draw(requests.samplable)).on(self._rounds.device))
        return self._rounds.publish(self.actor)

    def update(self, batch: RequestBatch) -> Td3Result:
        """One gradient step of the critics; every `policy_delay` of them one of the actor and of the targets. On the device."""
        settings = self.settings
        with torch.no_grad():
            noise = settings.target_noise * moved(torch.randn(batch.actions.shape, generator=self._noise), batch.actions.device)
            following = self.target_actor(batch.next_numeric, batch.next_categorical)
            following = td3.smoothed_actions(following, noise, noise_clip=settings.noise_clip)
            next_values = self.values(self.target_critics, batch.next_numeric, batch.next_categorical, following)
            target = td3.clipped_double_target(batch.rewards, next_values, batch.has_next, gamma=settings.gamma)
        critic_loss = td3.td_loss(self.values(self.critics, batch.numeric, batch.categorical, batch.actions), target)
        minimise(critic_loss, self._critic_optimiser)
        self._rounds.gradient_steps += 1
        if self._rounds.gradient_steps % settings.policy_delay:
            return Td3Result(critic_loss.detach(), None)
        actions = self.actor(batch.numeric, batch.categorical)
        values = self.values(self.critics, batch.numeric, batch.categorical, actions)
        if settings.cloning_alpha is None:
            actor_loss = td3.actor_loss(values)
        else:
            scaled = actions / ACTION_UNIT, batch.actions / ACTION_UNIT
            actor_loss = td3.behaviour_cloning_actor_loss(values, *scaled, alpha=settings.cloning_alpha)
        minimise(actor_loss, self._actor_optimiser)
        for target_network, network in ((self.target_critics, self.critics), (self.target_actor, self.actor)):
            soft_update(list(target_network.parameters()), list(network.parameters()), tau=settings.soft_update)
        return Td3Result(critic_loss.detach(), actor_loss.detach())

    def values(self, critics: Critics, numeric: torch.Tensor, categorical: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q_n(s, a) of the twins, (m, B), with the action in `ACTION_UNIT`s."""
        values: torch.Tensor = critics(numeric, categorical, actions / ACTION_UNIT)[0]
        return values
