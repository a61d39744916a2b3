"""Supervised peers: is reinforcement needed, or do the enhanced state and the instant reward do?

`supervised` predicts the reward of a pair and ranks by it, past the fusion formula. `supervised-weights` gives each pair its own fusion
weights, trained so that the lists that they would show earn more. Neither looks further than the list (gamma 0).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from esrl_ray.algo import losses
from esrl_ray.algo.actor import Actor, PairNetwork
from esrl_ray.algo.device import moved, pick_device
from esrl_ray.algo.losses import Bounds
from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.fusion import fused_scores
from esrl_ray.methods.method import Exploration, require
from esrl_ray.methods.request_level import minimise
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.replay.steps import Indices, Steps
from esrl_ray.vocabulary import Floats

PREDICTOR_LR = 1e-3
"""Adam step of the reward predictor, that of the critics of EnhancedRL."""
WEIGHTS_LR = 1e-3
"""Adam step of the actor."""


class Lists(NamedTuple):
    """B lists with their shown pairs, padded to the L of the longest."""

    numeric: torch.Tensor  # (B, L, F + k) normalised
    categorical: torch.Tensor  # (B, L, C) int64
    scores: torch.Tensor  # (B, L, k) raw
    rewards: torch.Tensor  # (B, L) groups summed with their weights, in standard deviations of a shown pair's reward
    shown: torch.Tensor  # (B, L) 0 in padding


class ListRounds:
    """What both share: normaliser and scale of the first call, the budget of gradient steps, the sampling of lists.

    Args:
        name: Of the method.
        config: Deployment.
        seed: Of the sampling.
    """

    def __init__(self, name: str, config: Config, *, seed: int) -> None:
        self.name, self.config, self.spec = name, config, config.spec.build()
        self.device = pick_device(config.learner.device)
        self.gradient_steps = self.round = 0
        self._rng, self._seen = np.random.default_rng(seed), 0
        self._normaliser: Normaliser | None = None
        self._scale = 1.0
        self._group_weights = np.array(config.learner.group_weights or [1.0] * config.reward.num_groups, np.float32)

    def exploration(self, centre: Policy) -> Exploration:
        """Uniform in the configured bounds around a policy, in the configured scope."""
        exploration, width = self.config.exploration, self.spec.num_actions
        low, high = (np.full(width, bound, np.float32) for bound in (exploration.low, exploration.high))
        return Exploration(centre, low, high, scope=exploration.scope)

    def begin(self, steps: Steps) -> tuple[Indices, int]:
        """Numbers of the lists that were shown, and the gradient steps that the new ones allow: `num_new samples_per_insert / batch_size`.

        Raises:
            MethodError: no list was shown, or the steps are of another width.
        """
        require(steps, self.spec, self.name)
        c = steps.columns
        if not len(lists := np.flatnonzero(c["shown"].any(1))):
            raise MethodError(f"none of {len(steps)} steps has a shown pair", self.name, "log what was shown")
        if self._normaliser is None:
            self._normaliser = Normaliser.fit(c["states"], c["scores"], c["valid"] > 0)
            self._scale = max(1e-6, float((c["rewards"] @ self._group_weights)[c["shown"] > 0].std()))
        num_updates = round((len(steps) - self._seen) * self.config.replay.samples_per_insert / self.config.learner.batch_size)
        self._seen = len(steps)
        return lists, num_updates

    def draw(self, steps: Steps, lists: Indices) -> Lists:
        """A batch of these lists, drawn with replacement."""
        assert self._normaliser is not None, "draw comes after begin"
        c, drawn = steps.columns, self._rng.choice(lists, self.config.learner.batch_size)
        masks = c["shown"][drawn]
        pairs = np.argsort(-masks, axis=1, kind="stable")[:, : int(masks.sum(1).max())]  # (B, L)
        names = ("states", "categorical", "scores", "rewards", "shown")
        states, codes, scores, rewards, shown = (c[name][drawn[:, None], pairs] for name in names)
        numeric = (numeric_input(states, scores) - self._normaliser.mean) / self._normaliser.std
        worth = rewards @ self._group_weights / np.float32(self._scale)
        columns = (numeric, codes.astype(np.int64), scores, worth, shown)
        return Lists(*(moved(torch.from_numpy(column), self.device) for column in columns))

    def publish(self, network: PairNetwork, kind: PolicyKind) -> Policy:
        """The network as a policy."""
        assert self._normaliser is not None, "publish comes after begin"
        manifest = Manifest(
            version=0,
            digest="",
            kind=kind,
            spec=self.spec,
            hidden_sizes=self.config.learner.hidden_sizes,
            embedding_size=self.config.learner.embedding_size,
            round=self.round,
            gradient_steps=self.gradient_steps,
            note=self.name,
        )
        self.round += 1
        parameters: dict[str, Floats] = {k: v.detach().cpu().numpy().copy() for k, v in network.state_dict().items()}
        return Policy.of(manifest, parameters, self._normaliser)


class Supervised:
    """An MLP that predicts a pair's reward from its enhanced state, fitted on all shown pairs; it ranks by the prediction.

    Args:
        name: As in the catalogue.
        config: Deployment.
        seed: Of parameters and sampling.
    """

    def __init__(self, name: str, config: Config, *, seed: int) -> None:
        self.name, self._rounds, learner = name, ListRounds(name, config, seed=seed), config.learner
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = PairNetwork(self._rounds.spec, learner.hidden_sizes, learner.embedding_size, num_outputs=1)
        self.network = network.to(self._rounds.device)
        self._optimiser = torch.optim.Adam(self.network.parameters(), lr=PREDICTOR_LR, foreach=True)

    def exploration(self) -> Exploration:
        """Uniform around the control policy: a policy that scores by itself has no action to explore around."""
        return self._rounds.exploration(Policy.static(self._rounds.spec))

    def fit(self, steps: Steps) -> Policy:
        """The gradient steps that the new steps allow.

        Raises:
            MethodError: no list was shown, or the steps are of another width.
        """
        lists, num_updates = self._rounds.begin(steps)
        for _ in range(num_updates):
            self.update(self._rounds.draw(steps, lists))
        return self._rounds.publish(self.network, PolicyKind.SCORE)

    def update(self, batch: Lists) -> torch.Tensor:
        """One gradient step; the loss before it, on the device."""
        loss = reward_loss(self.network(batch.numeric, batch.categorical)[..., 0], batch.rewards, batch.shown)
        minimise(loss, self._optimiser)
        self._rounds.gradient_steps += 1
        return loss.detach()


class SupervisedWeights:
    """An actor on the enhanced state of a pair, trained on the rewards of shown pairs alone, by rounds with bounds as EnhancedRL.

    Args:
        name: As in the catalogue.
        config: Deployment.
        seed: Of parameters and sampling.
    """

    def __init__(self, name: str, config: Config, *, seed: int) -> None:
        self.name, self._rounds, self._learner = name, ListRounds(name, config, seed=seed), config.learner
        self._bounds = Bounds(config.exploration.low, config.exploration.high)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            actor = Actor(self._rounds.spec, self._learner.hidden_sizes, self._learner.embedding_size)
        self.actor = actor.to(self._rounds.device)
        self._optimiser = torch.optim.Adam(self.actor.parameters(), lr=WEIGHTS_LR, foreach=True)
        self._anchor = Policy.static(self._rounds.spec)

    def exploration(self) -> Exploration:
        """Uniform in the bounds around the newest policy."""
        return self._rounds.exploration(self._anchor)

    def fit(self, steps: Steps) -> Policy:
        """The gradient steps that the new steps allow; then the policy becomes the next anchor.

        Raises:
            MethodError: no list was shown, or the steps are of another width.
        """
        lists, num_updates = self._rounds.begin(steps)
        static = self._anchor.manifest.kind is PolicyKind.STATIC
        anchor = None if static else copy.deepcopy(self._anchor.network).to(self._rounds.device)
        for _ in range(num_updates):
            self.update(self._rounds.draw(steps, lists), anchor)
        self._anchor = self._rounds.publish(self.actor, PolicyKind.PAIR)
        return self._anchor

    def update(self, batch: Lists, anchor: nn.Module | None) -> torch.Tensor:
        """One gradient step; the loss before it, on the device. `anchor` gives the anchor's actions there; None: they are 0."""
        learner, actions = self._learner, self.actor(batch.numeric, batch.categorical)
        with torch.no_grad():
            anchors = torch.zeros_like(actions) if anchor is None else anchor(batch.numeric, batch.categorical)
        over = losses.excess(actions, anchors, self._bounds)
        loss = losses.listwise_actor_loss(
            fused_scores(batch.scores, actions, self._rounds.spec),
            losses.advantages(batch.rewards, batch.shown),
            losses.bound_penalty(over, self._bounds, beta=learner.penalty_scale, continuous=learner.continuous_penalty),
            batch.shown,
            temperature=learner.temperature,
            eta=learner.bound_penalty,
        )
        minimise(loss, self._optimiser)
        self._rounds.gradient_steps += 1
        return loss.detach()


def reward_loss(predicted: torch.Tensor, rewards: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """`mean over shown pairs of (f(s_j) - r_j)^2`; all (B, L), padding contributes exactly 0."""
    assert predicted.shape == rewards.shape == shown.shape, (predicted.shape, rewards.shape, shown.shape)
    return ((predicted - rewards).square() * shown).sum() / shown.sum().clamp_min(1.0)
