"""Steps as request-level transitions, as earlier RL for multi-task fusion sees them: one state, one action and one reward per list.

State: the inputs of user and context, normalised, and their categorical codes. Action: the mean over the shown pairs (all alike when
exploration draws per request). Reward: the sum over the shown pairs and the reward groups. Padding contributes exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.algo.device import moved, pick_device
from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.methods.method import Exploration, require
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.replay.steps import LEFT, Indices, Steps
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Floats


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """B request-level transitions; inputs of items are 0."""

    numeric: torch.Tensor  # (B, F + k) normalised
    categorical: torch.Tensor  # (B, C) int64
    actions: torch.Tensor  # (B, A)
    rewards: torch.Tensor  # (B,)
    next_numeric: torch.Tensor  # (B, F + k)
    next_categorical: torch.Tensor  # (B, C) int64
    terminated: torch.Tensor  # (B,) 1 = the user left
    has_next: torch.Tensor  # (B,) 1 = a next list follows: what a bootstrap is multiplied by

    def on(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(**{field.name: moved(getattr(self, field.name), device) for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Requests:
    """All requests of a log as columns.

    Attributes:
        numeric: (n, F + k) normalised, 0 in columns of items.
        categorical: (n, C) int64, 0 in columns of items.
        actions: (n, A) mean over the shown pairs.
        rewards: (n,) of the list, groups summed.
        following: (n,) number of the next request, negative = none or none known (`replay.steps`).
        terminated: (n,) 1 = the user left after this request.
        samplable: Numbers of the requests whose next one or end is known, or of all.
    """

    numeric: torch.Tensor
    categorical: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    following: Indices
    terminated: Floats
    samplable: Indices

    @classmethod
    def of(cls, steps: Steps, spec: Spec, normaliser: Normaliser, *, rewards: Floats | None = None, without_next: bool = False) -> Self:
        """The request-level view of steps.

        Args:
            steps: n steps.
            spec: Which inputs belong to user and context.
            normaliser: Of the numeric input.
            rewards: (n,) instead of the logged list rewards.
            without_next: All can be sampled: nothing bootstraps.
        """
        c = steps.columns
        first = np.arange(len(steps)), c["valid"].argmax(1)
        raw = numeric_input(c["states"][first], c["scores"][first])
        numeric, codes = np.zeros_like(raw), np.zeros(c["categorical"][first].shape, np.int64)
        inputs, columns = list(spec.request_inputs), list(spec.request_codes)
        numeric[:, inputs] = ((raw - normaliser.mean) / normaliser.std)[:, inputs]
        codes[:, columns] = c["categorical"][first][:, columns]
        share = c["shown"] / np.maximum(c["shown"].sum(1, keepdims=True), 1)
        following = steps.following.copy()
        return cls(
            numeric=torch.from_numpy(numeric),
            categorical=torch.from_numpy(codes),
            actions=torch.from_numpy((c["actions"] * share[..., None]).sum(1)),
            rewards=torch.from_numpy(np.asarray(steps.list_rewards.sum(1) if rewards is None else rewards, np.float32)),
            following=following,
            terminated=(following == LEFT).astype(np.float32),
            samplable=steps.samplable(without_next=without_next),
        )

    def batch(self, requests: Indices) -> RequestBatch:
        """These requests (B,) with what follows them; next states are 0 where nothing follows."""
        has_next = torch.from_numpy((self.following[requests] >= 0).astype(np.float32))
        after, here = np.maximum(self.following[requests], 0), torch.from_numpy(requests)
        return RequestBatch(
            numeric=self.numeric[here],
            categorical=self.categorical[here],
            actions=self.actions[here],
            rewards=self.rewards[here],
            next_numeric=self.numeric[after] * has_next[:, None],
            next_categorical=self.categorical[after] * has_next[:, None].long(),
            terminated=torch.from_numpy(self.terminated[requests]),
            has_next=has_next,
        )


class RequestRounds:
    """What request-level methods share: the normaliser, the budget of gradient steps, the policy that the next round explores around.

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
        self._centre = Policy.static(self.spec)

    def exploration(self, std: float | None) -> Exploration:
        """One draw per request around the newest policy: uniform in the configured bounds, or Gaussian with a standard deviation."""
        low, high = (
            np.full(self.spec.num_actions, bound, np.float32) for bound in (self.config.exploration.low, self.config.exploration.high)
        )
        gaussian = None if std is None else np.full(self.spec.num_actions, std, np.float32)
        return Exploration(self._centre, low, high, std=gaussian, scope="request")

    def begin(self, steps: Steps, *, rewards: Floats | None = None, without_next: bool = False) -> tuple[Requests, int]:
        """The view of the steps, and the gradient steps that the new ones allow: `num_new samples_per_insert / batch_size`.

        The normaliser is fitted once, on the steps of the first call: a peer keeps it, so that nothing has to be folded. TD3 and
        BatchRL-MTF have a discount of their own, so that only a method that takes `learner.gamma` passes `without_next`.

        Raises:
            MethodError: no step has a known next list or end, or the steps are of another width.
        """
        require(steps, self.spec, self.name)
        if not len(steps.samplable(without_next=without_next)):
            raise MethodError(f"none of {len(steps)} steps has a known next list or end", self.name, "give whole sessions")
        if self._normaliser is None:
            c = steps.columns
            self._normaliser = Normaliser.fit(c["states"], c["scores"], c["valid"] > 0)
        updates = round((len(steps) - self._seen) * self.config.replay.samples_per_insert / self.config.learner.batch_size)
        self._seen = len(steps)
        return Requests.of(steps, self.spec, self._normaliser, rewards=rewards, without_next=without_next), updates

    def draw(self, requests: Indices) -> Indices:
        """A batch of them (B,), drawn with replacement."""
        return self._rng.choice(requests, self.config.learner.batch_size)

    def publish(self, actor: Actor, *, note: str = "") -> Policy:
        """The actor as a policy; the next round explores around it."""
        assert self._normaliser is not None, "publish comes after begin"
        manifest = Manifest(
            version=0,
            digest="",
            kind=PolicyKind.REQUEST,
            spec=self.spec,
            hidden_sizes=self.config.learner.hidden_sizes,
            embedding_size=self.config.learner.embedding_size,
            round=self.round,
            gradient_steps=self.gradient_steps,
            note=note or self.name,
        )
        parameters: dict[str, Floats] = {k: v.detach().cpu().numpy().copy() for k, v in actor.state_dict().items()}
        self._centre = Policy.of(manifest, parameters, self._normaliser)
        self.round += 1
        return self._centre


def minimise(loss: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
    """One step of the optimiser's own parameters; no other parameter gets a gradient."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
