"""EnhancedRL as a method: the core's `update` on steps in memory, rounds, folding. UnifiedRL is the same at the level of requests."""

from __future__ import annotations

import numpy as np

from esrl_ray.algo.update import LearnState, UpdateResult, prepare, update
from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.learning.rounds import fit_scales
from esrl_ray.methods.method import Exploration, require
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Floats


class EnhancedRL:
    """Rounds of EnhancedRL or UnifiedRL, as `config.learner` says.

    Args:
        name: As in the catalogue.
        config: Deployment.
        seed: Of parameters and sampling.
    """

    def __init__(self, name: str, config: Config, *, seed: int) -> None:
        self.name = name
        self.config = config.model_copy(update={"learner": config.learner.model_copy(update={"seed": seed})})
        self.state = LearnState.create(self.config)
        self.result: UpdateResult | None = None
        self._rng = np.random.default_rng(seed)
        self._anchor = Policy.static(config.spec.build())
        self._seen = self._round = 0

    def exploration(self) -> Exploration:
        """Uniform within the bounds around the last policy, per pair or per request."""
        exploration, width = self.config.exploration, self.config.spec.build().num_actions
        scope = "request" if self.config.learner.level == "request" else exploration.scope
        low, high = (np.full(width, bound, np.float32) for bound in (exploration.low, exploration.high))
        return Exploration(self._anchor, low, high, scope=scope)

    def fit(self, steps: Steps) -> Policy:
        """The gradient steps that the new steps allow; then the policy becomes the next anchor.

        Raises:
            MethodError: no step has a known next list or end, or the steps are of another width.
        """
        require(steps, self.config.spec.build(), self.name)
        if not len(samplable := steps.samplable(without_next=self.config.replay.sample_without_next)):
            raise MethodError(f"none of {len(steps)} steps has a known next list or end", self.name, "give whole sessions")
        networks, learner = self.state.networks, self.config.learner
        newest = steps.transitions(np.arange(max(0, len(steps) - self.config.exploration.round_steps), len(steps)))
        networks.set_scales(*fit_scales(newest), fold=self._round > 0)
        per_call = learner.batch_size * learner.updates_per_call
        for _ in range(round((len(steps) - self._seen) * self.config.replay.samples_per_insert / per_call)):
            drawn = steps.transitions(self._rng.choice(samplable, per_call), horizon=learner.num_future)
            for part in prepare(self.state, drawn).split(learner.updates_per_call):
                self.result = update(self.state, part)
        self._seen = len(steps)
        self._anchor = self._policy()
        networks.set_anchor(self._anchor.parameters, self._anchor.normaliser)
        self._round += 1
        return self._anchor

    def _policy(self) -> Policy:
        learner, networks = self.config.learner, self.state.networks
        manifest = Manifest(
            version=0,
            digest="",
            kind=PolicyKind(learner.level),
            spec=self.config.spec.build(),
            hidden_sizes=learner.hidden_sizes,
            embedding_size=learner.embedding_size,
            actor=learner.actor,
            round=self._round,
            gradient_steps=self.state.gradient_steps,
            note=self.name,
        )
        parameters: dict[str, Floats] = {k: v.cpu().numpy().copy() for k, v in networks.actor.state_dict().items()}
        return Policy.of(manifest, parameters, networks.normaliser)
