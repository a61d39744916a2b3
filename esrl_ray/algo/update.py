"""One gradient step of EnhancedRL on plain torch: `update(state, batch)` is the executable specification of learning.

A step is: critics, then the actor with the critics frozen (only the actor's parameters are differentiated), then every
`soft_update_every` steps the targets, of critics that have them. Nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from esrl_ray.algo import losses
from esrl_ray.algo.device import compiled, moved, pick_device
from esrl_ray.algo.future import Future, future_of
from esrl_ray.algo.losses import Bounds
from esrl_ray.algo.networks import Critics, Networks, SplitCritics
from esrl_ray.algo.split import Between, Lists, lists_ahead, reward_losses
from esrl_ray.config import Config, LearnerConfig
from esrl_ray.fusion import fused_scores
from esrl_ray.vocabulary import TransitionBatch


class Average(Protocol):
    """Makes one of what each learner has, in place."""

    def __call__(self, tensors: list[torch.Tensor], *, total: bool = False) -> None:
        """Means of gradients; the total of sums over lists, which are counts: half of them would be trusted half as much."""


class StepLosses(NamedTuple):
    """The pure parts of a gradient step: they read the state and change nothing."""

    critics: Callable[[LearnState, Batch], tuple[torch.Tensor, torch.Tensor]]  # one loss for each critic; mean of phi
    actor: Callable[[LearnState, Batch], tuple[torch.Tensor, torch.Tensor]]  # loss; share of dimensions outside the bounds


@dataclass(slots=True)
class LearnState:
    """Everything that learning changes.

    Attributes:
        networks: Actor, critics, targets, anchor, normaliser, on one device.
        actor_optimiser: Adam on the actor.
        critic_optimiser: Adam on the critics.
        group_weights: (q,) w_i.
        learner: Hyper-parameters.
        bounds: Of exploration around the anchor.
        gradient_steps: Taken so far.
        losses: Of a gradient step; compiled with `learner.compile`.
    """

    networks: Networks
    actor_optimiser: torch.optim.Optimizer
    critic_optimiser: torch.optim.Optimizer
    group_weights: torch.Tensor
    learner: LearnerConfig
    bounds: Bounds
    gradient_steps: int = 0
    losses: StepLosses = field(default_factory=lambda: StepLosses(_critic_losses, _actor_loss))

    @property
    def relative(self) -> bool:
        """Whether critics see actions relative to the anchor (`losses.action_input`)."""
        return self.learner.actor_loss == "listwise"

    @classmethod
    def create(cls, config: Config, *, device: str | None = None) -> Self:
        """A fresh learner that starts at the control policy.

        Args:
            config: Deployment; `learner.seed` fixes the parameters.
            device: Instead of `learner.device`.
        """
        networks = make_networks(config).to(pick_device(device or config.learner.device))
        return cls.around(networks, make_optimisers(networks, config.learner), config)

    @classmethod
    def around(cls, networks: Networks, optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer], config: Config) -> Self:
        """A learner around networks and optimisers (of the actor, of the critics) that exist."""
        weights = torch.tensor(config.learner.group_weights or [1.0] * config.reward.num_groups, device=networks.mean.device)
        bounds = Bounds(config.exploration.low, config.exploration.high)
        state = cls(networks, *optimisers, weights, config.learner, bounds)
        if config.learner.compile:  # on a CPU the actor's part gets slower, so it stays eager there
            actor = compiled(_actor_loss, weights.device) if weights.is_cuda else _actor_loss
            state.losses = StepLosses(compiled(_critic_losses, weights.device), actor)
        return state


def make_networks(config: Config) -> Networks:
    """Networks on the CPU, seeded by `learner.seed`; the global random state is left as it was."""
    learner = config.learner
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(learner.seed)
        return Networks(
            config.spec.build(),
            config.reward.num_groups,
            learner.critics_per_group,
            hidden_sizes=learner.hidden_sizes,
            embedding_size=learner.embedding_size,
            level=learner.level,
            split=learner.critic == "split",
            actor=learner.actor,
        )


def make_optimisers(networks: Networks, learner: LearnerConfig) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Adam of the actor and of the critics."""
    return (
        torch.optim.Adam(list(networks.actor.parameters()), lr=learner.actor_lr, foreach=True),
        torch.optim.Adam(list(networks.critics.parameters()), lr=learner.critic_lr, foreach=True),
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Transitions as the networks read them; P pairs of a request, L shown ones of its list, M shown ones of the next list, all padded."""

    numeric: torch.Tensor  # (B, P, F + k) normalised
    categorical: torch.Tensor  # (B, P, C) int64
    scores: torch.Tensor  # (B, P, k) raw
    anchors: torch.Tensor  # (B, P, A) mu_bp(s)
    valid: torch.Tensor  # (B, P)
    shown: torch.Tensor  # (B, P)
    list_numeric: torch.Tensor  # (B, L, F + k)
    list_categorical: torch.Tensor  # (B, L, C)
    list_actions: torch.Tensor  # (B, L, A) taken actions, as critics see them
    list_rewards: torch.Tensor  # (B, L, q) in units of the value scale
    list_shown: torch.Tensor  # (B, L)
    next_numeric: torch.Tensor  # (B, M, F + k)
    next_categorical: torch.Tensor  # (B, M, C)
    next_anchors: torch.Tensor  # (B, M, A) mu_bp(s')
    next_shown: torch.Tensor  # (B, M)
    bootstrap: torch.Tensor  # (B,)
    future: Future | None  # for the split critic

    def split(self, num_parts: int) -> list[Batch]:
        """Parts with equally many consecutive transitions."""
        rows = len(self.bootstrap)
        assert rows % num_parts == 0, f"{rows} transitions do not split in {num_parts}"
        columns = {f.name: getattr(self, f.name).split(rows // num_parts) for f in fields(self) if f.name != "future"}
        futures = [None] * num_parts if self.future is None else self.future.split(num_parts)
        return [Batch(**{name: parts[i] for name, parts in columns.items()}, future=future) for i, future in enumerate(futures)]


@torch.no_grad()
def prepare(state: LearnState, batch: TransitionBatch | Mapping[str, torch.Tensor | np.ndarray]) -> Batch:
    """Move transitions to the device, normalise them, gather the shown pairs, and ask the anchor: everything that is constant in a round.

    Call it once for the transitions of several gradient steps: it waits for the device twice, to know the longest list.

    Args:
        state: Its networks give normaliser, value scale, anchor and device.
        batch: `TransitionBatch` columns, arrays or tensors.
    """
    networks = state.networks
    device = networks.mean.device
    c = {name: moved(torch.as_tensor(column), device) for name, column in batch.items()}
    if state.learner.level == "request":
        c = request_level(c)
    numeric, categorical = networks.visible(networks.numeric(c["states"], c["scores"]), c["categorical"].long())
    actions = losses.action_input(c["actions"], c["anchor_actions"], state.bounds, relative=state.relative)
    future = None
    if isinstance(networks.critics, SplitCritics):
        future = future_of(networks, c, score_changes=state.learner.score_changes)
    shown, next_shown = _shown_first(c["shown"]), _shown_first(c["next_shown"])
    next_states, next_scores, next_codes = (_pick(c[name], next_shown) for name in ("next_states", "next_scores", "next_categorical"))
    next_list, next_codes = networks.visible(networks.numeric(next_states, next_scores), next_codes.long())
    return Batch(
        numeric=numeric,
        categorical=categorical,
        scores=c["scores"],
        anchors=networks.anchor(numeric, categorical),
        valid=c["valid"],
        shown=c["shown"],
        list_numeric=_pick(numeric, shown),
        list_categorical=_pick(categorical, shown),
        list_actions=_pick(actions, shown),
        list_rewards=_pick(c["rewards"] / networks.value_scale, shown),
        list_shown=c["shown"].gather(1, shown),
        next_numeric=next_list,
        next_categorical=next_codes,
        next_anchors=next_list[..., :0] if future is not None else networks.anchor(next_list, next_codes),  # split: no next action
        next_shown=c["next_shown"].gather(1, next_shown),
        bootstrap=c["has_next"] * (1 - c["terminated"]),
        future=future,
    )


def request_level(columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lists as single pairs: UnifiedRL's view, one action and one reward per request.

    Args:
        columns: Of a `TransitionBatch`, (B, G, ...).

    Returns:
        The same names, (B, 1, ...): the state of a real pair of the request (networks then see user and context only), mean action of the
        shown pairs (all alike when exploration draws per request), summed reward of the list.
    """

    def one_of(name: str, mask: torch.Tensor) -> torch.Tensor:
        column = columns[name]
        return column[torch.arange(len(column), device=column.device), mask.argmax(1)].unsqueeze(1)

    shown, valid, next_shown = columns["shown"], columns["valid"], columns["next_shown"]
    share = (shown / shown.sum(1, keepdim=True).clamp_min(1.0)).unsqueeze(-1)  # (B, G, 1)
    return {
        **{name: one_of(name, valid) for name in ("states", "categorical", "scores")},
        **{name: one_of(name, next_shown) for name in ("next_states", "next_categorical", "next_scores")},
        **{name: (columns[name] * share).sum(1, keepdim=True) for name in ("actions", "anchor_actions")},
        "rewards": (columns["rewards"] * shown.unsqueeze(-1)).sum(1, keepdim=True),
        "shown": shown.amax(1, keepdim=True),
        "valid": valid.amax(1, keepdim=True),
        "next_shown": next_shown.amax(1, keepdim=True),
        "has_next": columns["has_next"],
        "terminated": columns["terminated"],
    }


class UpdateResult(NamedTuple):
    """What one gradient step did; scalars on the device."""

    critic_loss: torch.Tensor  # mean over critics, in units of the value scale squared
    actor_loss: torch.Tensor
    outside_share: torch.Tensor  # share of mu(s)'s dimensions outside the bounds
    phi_mean: torch.Tensor  # over the next list, whether or not targets use it; 1 with the split critic
    critic_grad_norm: torch.Tensor  # before clipping
    actor_grad_norm: torch.Tensor


def update(state: LearnState, batch: Batch, *, average: Average | None = None) -> UpdateResult:
    """One gradient step, in place.

    Args:
        state: Changed: parameters, optimisers, counter.
        batch: From `prepare`.
        average: Averages gradients over learners, before they are clipped, and adds up their sums of the long-term effect.
    """
    if state.learner.compile:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # results of the last step's CUDA graphs may be written over
    critic_loss, critic_norm, phi_mean = _critic_step(state, batch, average)
    if batch.future is not None:
        _long_term_step(state, batch, average)
    actor_loss, actor_norm, outside = _actor_step(state, batch, average)
    state.gradient_steps += 1
    if state.gradient_steps % state.learner.soft_update_every == 0:
        n = state.networks
        for target, network in ((n.target_critics, n.critics), (n.target_actor, n.actor)):
            if target is not None:
                losses.soft_update(list(target.parameters()), list(network.parameters()), tau=state.learner.soft_update)
    return UpdateResult(critic_loss, actor_loss, outside, phi_mean, critic_norm, actor_norm)


def _critic_step(state: LearnState, batch: Batch, average: Average | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parameters = list(state.networks.critics.parameters())
    # Each critic has its own loss: the sum gives each its own gradient, whatever their number.
    each, phi_mean = state.losses.critics(state, batch)
    norm = _step(each.sum(), parameters, state.critic_optimiser, max_norm=state.learner.grad_clip, average=average)
    return each.detach().mean(), norm, phi_mean


def _critic_losses(state: LearnState, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    networks, learner, bounds = state.networks, state.learner, state.bounds
    if isinstance(networks.critics, SplitCritics):
        values = _values(networks.critics.rewards, batch.list_numeric, batch.list_categorical)  # (q, m, B, L)
        return reward_losses(values, batch.list_rewards, batch.list_shown), torch.ones_like(batch.bootstrap[0])
    assert isinstance(networks.target_critics, Critics) and networks.target_actor is not None
    with torch.no_grad():
        next_actions = networks.target_actor(batch.next_numeric, batch.next_categorical)  # (B, M, A)
        inputs = losses.action_input(next_actions, batch.next_anchors, bounds, relative=state.relative)
        next_values = _values(networks.target_critics, batch.next_numeric, batch.next_categorical, inputs)  # (q, m, B, M)
        next_phi = losses.phi(losses.excess(next_actions, batch.next_anchors, bounds), bounds, beta=learner.penalty_scale)
        if learner.phi:
            next_values = next_values * next_phi
    values = _values(networks.critics, batch.list_numeric, batch.list_categorical, batch.list_actions)  # (q, m, B, L)
    td = losses.list_sum_td if learner.critic == "list_sum" else losses.per_pair_td
    each = td(
        values,
        batch.list_shown,
        batch.list_rewards,
        next_values=next_values,
        next_shown=batch.next_shown,
        bootstrap=batch.bootstrap,
        gamma=learner.gamma,
    )  # (q, m)
    return each, (next_phi * batch.next_shown).sum() / batch.next_shown.sum().clamp_min(1.0)


@torch.no_grad()
def _long_term_step(state: LearnState, batch: Batch, average: Average | None) -> None:
    """Take a batch into the sums of the long-term effect; solve for it every `soft_update_every` steps."""
    networks, critics, future = state.networks, state.networks.critics, batch.future
    assert isinstance(critics, SplitCritics) and future is not None

    def effects(numeric: torch.Tensor, categorical: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:  # (B, D)
        psi = _effects(networks, numeric, _values(critics.rewards, numeric, categorical))
        return (psi * shown.unsqueeze(-1)).sum(1)

    ended = 1 - batch.bootstrap
    leaving, discounts = critics.long_term.leaving, (state.learner.effect_gamma, state.learner.gamma)
    ahead = torch.stack([lists_ahead(future.known, future.terminated, ended, leaving, gamma=gamma) for gamma in discounts], -1)  # (B, 2)
    rewards = batch.list_rewards @ (state.group_weights * networks.value_scale)  # (B, L)
    here = effects(batch.list_numeric, batch.list_categorical, batch.list_shown)
    there = effects(batch.next_numeric, batch.next_categorical, batch.next_shown)
    lists = Lists(here, future.given, future.cohort, ahead, ended, (rewards * batch.list_shown).sum(-1))
    sums = critics.long_term.sums(lists, Between(there, future.next_request, future.held, future.score_change, future.change_known))
    if average is not None:
        average(list(sums), total=True)
    critics.long_term.add(sums)
    if (state.gradient_steps + 1) % state.learner.soft_update_every == 0:
        critics.long_term.solve()


def _effects(networks: Networks, numeric: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """psi of pairs: the item's features and the rewards that rho (q, m, B, P) predicts, as they are in the log; (B, P, D)."""
    rewards = predicted.mean(1).permute(1, 2, 0) * networks.value_scale
    return torch.cat([networks.item_features(numeric), rewards], -1)


def _actor_step(state: LearnState, batch: Batch, average: Average | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parameters = list(state.networks.actor.parameters())
    loss, outside = state.losses.actor(state, batch)
    norm = _step(loss, parameters, state.actor_optimiser, max_norm=state.learner.grad_clip, average=average)
    return loss.detach().clone(), norm, outside  # the next call of a CUDA graph writes where its results of this one are


def _actor_loss(state: LearnState, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    networks, learner, bounds = state.networks, state.learner, state.bounds
    actions = networks.actor(batch.numeric, batch.categorical)  # (B, P, A)
    over = losses.excess(actions, batch.anchors, bounds)
    penalties = losses.bound_penalty(over, bounds, beta=learner.penalty_scale, continuous=learner.continuous_penalty)
    weights = state.group_weights * networks.value_scale  # back to units of reward

    def pair_values() -> torch.Tensor:  # (B, P)
        if isinstance(networks.critics, SplitCritics):
            predicted = _values(networks.critics.rewards, batch.numeric, batch.categorical)  # (q, m, B, P)
            reward = losses.pessimistic_values(predicted, weights, std_penalty=learner.std_penalty)
            long_term: torch.Tensor = networks.critics.long_term(_effects(networks, batch.numeric, predicted))
            return reward + learner.long_term_weight * long_term
        inputs = losses.action_input(actions, batch.anchors, bounds, relative=state.relative)
        values = _values(networks.critics, batch.numeric, batch.categorical, inputs)
        return losses.pessimistic_values(values, weights, std_penalty=learner.std_penalty)

    if learner.actor_loss == "listwise":
        with torch.no_grad():
            gains = losses.advantages(pair_values(), batch.valid)
        fused = fused_scores(batch.scores, actions, networks.spec)
        loss = losses.listwise_actor_loss(fused, gains, penalties, batch.valid, temperature=learner.temperature, eta=learner.bound_penalty)
    else:
        loss = losses.printed_actor_loss(pair_values(), penalties, batch.shown, eta=learner.bound_penalty)
    return loss, ((over.detach() > 0).float().mean(-1) * batch.valid).sum() / batch.valid.sum().clamp_min(1.0)


def _step(
    loss: torch.Tensor, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer, *, max_norm: float, average: Average | None
) -> torch.Tensor:
    """Differentiate only `parameters`, average, clip, step; the gradient norm before clipping."""
    gradients = list(torch.autograd.grad(loss, parameters))
    if average is not None:
        average(gradients)
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    for parameter in parameters:
        parameter.grad = None
    return norm


def _values(critics: Critics, numeric: torch.Tensor, categorical: torch.Tensor, actions: torch.Tensor | None = None) -> torch.Tensor:
    """Values of padded pairs (B, P, ...): (q, m, B, P)."""
    taken = None if actions is None else actions.flatten(0, 1)
    values: torch.Tensor = critics(numeric.flatten(0, 1), categorical.flatten(0, 1), taken)
    return values.view(*critics.shape, *numeric.shape[:2])


def _shown_first(shown: torch.Tensor) -> torch.Tensor:
    """(B, L) indices of the shown pairs of each list, in order, then of others; L is the longest list's length, at least 1."""
    longest = max(1, int(shown.sum(-1).max()))
    return torch.argsort(shown, dim=-1, descending=True, stable=True)[:, :longest]


def _pick(column: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, L, ...) pairs of (B, G, ...) by (B, L) indices."""
    return column.gather(1, indices.unsqueeze(-1).expand(-1, -1, column.shape[-1]))
