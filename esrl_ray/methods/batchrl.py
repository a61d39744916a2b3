"""BatchRL-MTF (arXiv 2208.04560, KDD 2022): batch-constrained Q-learning of request-level fusion weights.

Published, as reading notes of the paper have it: a conditional VAE that generates actions like the logged ones, a perturbation network
(rho .15), twin critics, `y = r + gamma max_i min_n Q'_n(s', a'_i)` with candidates of the target networks, acting by the best of n
perturbed candidates, gamma .95, learning rates 1e-3 / 1e-4 / 2e-4 for 300,000 steps, soft updates of .05 every 10, retraining on the last
three days, Gaussian exploration. Ours: the order of the rates (VAE, perturbation, critics); n, latent size and KL weight, which are BCQ's;
sizes, which are the deployment's; biases learnt beside the weights, as for all peers here; a day is a round; actions are standardised, for
a VAE of actions this close together would ignore its latent; exploration with N(0, .2^2) around the policy, without a half at random. The
rates were tuned on one simulated world: with the published ones (and uniform exploration of +-.15) 6,000 steps end at 10.1 reward per
session (control 17.0, every action component half-way to its limit), with these at 19.6 after half of the steps. In worlds 1, 2
and 4 it ends where control does (15.1 and 15.0, benchmarks/results/methods.md), in two of them lower after the last round than after the
first: its own actions become the log that it must stay close to.

A served policy is a deterministic network, so that the argmax over sampled candidates cannot be served. Ours: after each `fit` an
`Actor(level="request")` is trained by regression on the chosen actions; `distillation_error` and the policy's note say how far it is off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from esrl_ray.algo import bcq, td3
from esrl_ray.algo.actor import START_SCALE, Actor
from esrl_ray.algo.device import moved
from esrl_ray.algo.losses import soft_update
from esrl_ray.algo.networks import Critics
from esrl_ray.config import Config
from esrl_ray.methods.method import Exploration, require
from esrl_ray.methods.request_level import RequestBatch, RequestRounds, Requests, minimise
from esrl_ray.methods.satisfaction import behaviour_terms, satisfaction_weights
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Indices, Steps
from esrl_ray.vocabulary import Floats

NUM_CRITICS = 2


@dataclass(frozen=True, slots=True)
class BatchRLSettings:
    """Hyper-parameters; sizes and batch size are the learner's."""

    gamma: float = 0.95
    rho: float = 0.15  # largest perturbation, in units of actions
    generator_lr: float = 1e-3  # Adam
    perturbation_lr: float = 3e-5  # Adam; published 1e-4
    critic_lr: float = 1e-3  # Adam; published 2e-4
    soft_update: float = 0.05  # Polyak step of the targets
    soft_update_every: int = 10  # gradient steps
    num_candidates: int = 10  # n
    kl_weight: float = 0.5
    latent_clip: float = 0.5  # sampled latents are cut here
    recent_rounds: int | None = 3  # rounds that are learnt from; None = all
    reward: Literal["deployment", "satisfaction"] = "deployment"
    dwell: str = "watch_s"  # behaviour that counts time, for the satisfaction reward
    distil_requests: int = 8192  # the newest ones; an eighth is held out
    distil_steps: int = 400
    distil_lr: float = 1e-3  # Adam
    explore_std: float | None = 0.2  # of Gaussian exploration; None = uniform in the deployment's bounds


SATISFACTION = BatchRLSettings(reward="satisfaction")
"""With the paper's own reward."""


class BatchRLResult(NamedTuple):
    """What one gradient step did."""

    generator_loss: torch.Tensor
    critic_loss: torch.Tensor
    perturbation_loss: torch.Tensor


class BatchRL:
    """BatchRL-MTF by rounds, or on a log by one call of `fit`.

    Args:
        name: As in the catalogue.
        config: Deployment.
        seed: Of parameters, sampling and latents.
        settings: Hyper-parameters.

    Attributes:
        distillation_error: Root mean squared distance of the served actor to the chosen actions, on requests that it was not trained on.
        satisfaction: (terms,) weights of the satisfaction reward, fitted at the first call of `fit`; None with the deployment's reward.
    """

    def __init__(self, name: str, config: Config, *, seed: int, settings: BatchRLSettings | None = None) -> None:
        self.name, self.settings, self._config = name, settings or BatchRLSettings(), config
        self._rounds = RequestRounds(name, config, seed=seed)
        self._noise = torch.Generator().manual_seed(seed)
        width, device = self._rounds.spec.num_actions, self._rounds.device
        self._mean, self._std = torch.zeros(width, device=device), torch.ones(width, device=device)
        self.distillation_error = float("nan")
        self.satisfaction: Floats | None = None
        spec, learner = self._rounds.spec, config.learner
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = bcq.Generator(spec, learner.hidden_sizes, embedding_size=learner.embedding_size)
            self.perturbation = bcq.RequestNetwork(
                spec, spec.num_actions, learner.hidden_sizes, embedding_size=learner.embedding_size, num_outputs=spec.num_actions
            )
            self.critics = Critics(spec, 1, NUM_CRITICS, hidden_sizes=learner.hidden_sizes, embedding_size=learner.embedding_size)
            self.actor = Actor(spec, learner.hidden_sizes, learner.embedding_size, level="request")
        for network in (self.generator, self.perturbation, self.critics, self.actor):
            network.to(self._rounds.device)
        with torch.no_grad():
            for parameter in self.perturbation.layers[-1].parameters():
                parameter.mul_(START_SCALE)
        self.target_generator = copy.deepcopy(self.generator).requires_grad_(False)
        self.target_perturbation = copy.deepcopy(self.perturbation).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self._generator_optimiser = torch.optim.Adam(self.generator.parameters(), lr=self.settings.generator_lr, fused=True)
        self._perturbation_optimiser = torch.optim.Adam(self.perturbation.parameters(), lr=self.settings.perturbation_lr, fused=True)
        self._critic_optimiser = torch.optim.Adam(self.critics.parameters(), lr=self.settings.critic_lr, fused=True)
        self._actor_optimiser = torch.optim.Adam(self.actor.parameters(), lr=self.settings.distil_lr, fused=True)

    def exploration(self) -> Exploration:
        """Around the newest policy, one draw per request."""
        return self._rounds.exploration(self.settings.explore_std)

    def fit(self, steps: Steps) -> Policy:
        """The gradient steps that the new steps allow, on the recent rounds; then `distil_steps` of the served actor, not counted.

        Raises:
            MethodError: no step has a known next list or end; the satisfaction reward has nothing to be fitted on.
        """
        require(steps, self._rounds.spec, self.name)
        requests, num_updates = self._rounds.begin(steps, rewards=self._rewards(steps))
        if self._rounds.gradient_steps == 0:
            mean, std = requests.actions.mean(0), requests.actions.std(0, correction=0).clamp_min(1e-3)
            self._mean, self._std = mean.to(self._rounds.device), std.to(self._rounds.device)
        recent = self._recent(requests.samplable, steps)
        for _ in range(num_updates):
            self.update(requests.batch(self._rounds.draw(recent)).on(self._rounds.device))
        self._distil(requests, recent)
        return self._rounds.publish(self.actor, note=f"{self.name}: distilled, {self.distillation_error:.4f} off the chosen actions")

    def update(self, batch: RequestBatch) -> BatchRLResult:
        """One gradient step: generator, critics, perturbation; every `soft_update_every` steps the targets. On the device."""
        settings, numeric, codes = self.settings, batch.numeric, batch.categorical
        logged = (batch.actions - self._mean) / self._std
        mean, log_std = self.generator.encode(numeric, codes, logged)
        latents = mean + log_std.exp() * self._drawn(mean.shape)
        decoded = self.generator.decode(numeric, codes, latents)
        generator_loss = bcq.generator_loss(decoded, logged, mean=mean, log_std=log_std, kl_weight=settings.kl_weight)
        minimise(generator_loss, self._generator_optimiser)
        with torch.no_grad():
            n = settings.num_candidates
            following = self._candidates(self.target_generator, self.target_perturbation, batch.next_numeric, batch.next_categorical, n=n)
            next_values = self.values(self.target_critics, batch.next_numeric, batch.next_categorical, following)  # (m, B, n)
            target = bcq.bcq_target(batch.rewards, next_values, batch.has_next, gamma=settings.gamma)
        critic_loss = td3.td_loss(self.values(self.critics, numeric, codes, batch.actions.unsqueeze(1))[..., 0], target)
        minimise(critic_loss, self._critic_optimiser)
        actions = self._candidates(self.generator, self.perturbation, numeric, codes, n=1)
        perturbation_loss = td3.actor_loss(self.values(self.critics, numeric, codes, actions)[..., 0])
        minimise(perturbation_loss, self._perturbation_optimiser)
        self._rounds.gradient_steps += 1
        if self._rounds.gradient_steps % settings.soft_update_every == 0:
            for target_network, network in (
                (self.target_critics, self.critics),
                (self.target_perturbation, self.perturbation),
                (self.target_generator, self.generator),
            ):
                soft_update(list(target_network.parameters()), list(network.parameters()), tau=settings.soft_update)
        return BatchRLResult(generator_loss.detach(), critic_loss.detach(), perturbation_loss.detach())

    def values(self, critics: Critics, numeric: torch.Tensor, categorical: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q_n of n actions of each request, (m, B, n).

        Args:
            critics: The twins or their targets.
            numeric: (B, F + k).
            categorical: (B, C).
            actions: (B, n, A).
        """
        b, n, _ = actions.shape
        standard = (actions - self._mean) / self._std
        values: torch.Tensor = critics(numeric.repeat_interleave(n, 0), categorical.repeat_interleave(n, 0), standard.flatten(0, 1))
        return values.view(NUM_CRITICS, b, n)

    @torch.no_grad()
    def act(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        """What the method would do, (B, A): the best of n perturbed candidates by the first critic, as in BCQ."""
        candidates = self._candidates(self.generator, self.perturbation, numeric, categorical, n=self.settings.num_candidates)
        return bcq.chosen_actions(self.values(self.critics, numeric, categorical, candidates)[0], candidates)

    def _candidates(
        self, generator: bcq.Generator, perturbation: bcq.RequestNetwork, numeric: torch.Tensor, categorical: torch.Tensor, *, n: int
    ) -> torch.Tensor:
        """(B, n, A) perturbed actions of sampled latents; only the perturbation is differentiated."""
        numeric, categorical = (x.unsqueeze(1).expand(-1, n, -1) for x in (numeric, categorical))
        clip = self.settings.latent_clip
        latents = self._drawn((len(numeric), n, generator.num_latent)).clamp(-clip, clip)
        with torch.no_grad():
            standard = generator.decode(numeric, categorical, latents)
            actions = (self._mean + self._std * standard).clamp(-1.0, 1.0)
        return bcq.perturbed_actions(actions, perturbation(numeric, categorical, standard), rho=self.settings.rho)

    def _drawn(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, the same on every device."""
        return moved(torch.randn(*shape, generator=self._noise), self._rounds.device)

    def _rewards(self, steps: Steps) -> Floats | None:
        if self.settings.reward == "deployment":
            return None
        if self.satisfaction is None:
            self.satisfaction = satisfaction_weights(steps, self._config, dwell=self.settings.dwell)
        rewards: Floats = behaviour_terms(steps, self._config.reward) @ self.satisfaction
        return rewards

    def _recent(self, samplable: Indices, steps: Steps) -> Indices:
        if self.settings.recent_rounds is None:
            return samplable
        rounds = steps.rounds[samplable]
        recent: Indices = samplable[rounds > rounds.max() - self.settings.recent_rounds]
        return recent

    def _distil(self, requests: Requests, recent: Indices) -> None:
        """Train the served actor on the chosen actions of the newest requests."""
        newest = torch.from_numpy(recent[-self.settings.distil_requests :])
        numeric, codes = (moved(column[newest], self._rounds.device) for column in (requests.numeric, requests.categorical))
        chosen, held_out = self.act(numeric, codes), np.arange(len(newest)) % 8 == 0
        taught = np.flatnonzero(~held_out) if len(newest) > 1 else np.arange(1)
        for _ in range(self.settings.distil_steps):
            some = torch.from_numpy(self._rounds.draw(taught))
            minimise(bcq.distillation_loss(self.actor(numeric[some], codes[some]), chosen[some]), self._actor_optimiser)
        with torch.no_grad():
            kept = torch.from_numpy(np.flatnonzero(held_out))
            self.distillation_error = float(bcq.distillation_loss(self.actor(numeric[kept], codes[kept]), chosen[kept]).sqrt())
