"""The anchor of a log: where offline training begins when the policies that were served are not at hand."""

from __future__ import annotations

import numpy as np
import torch

from esrl_ray.algo.actor import make_actor
from esrl_ray.config import Config
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.replay.steps import Indices, Steps
from esrl_ray.vocabulary import Floats

MIN_LISTS = 500
"""A round that has only begun is left out: so many lists determine its anchor."""

NUM_STEPS, BATCH_LISTS, LEARNING_RATE = 2_000, 64, 3e-3
"""Of the regression: 4 s of a core, and .07 off anchors that were .55 from control after five rounds, where bounds are .6 wide."""


def logged_anchor(steps: Steps, config: Config) -> Policy | None:
    """mu_bp of the log's newest round, found again by regression on the anchor actions that were logged for every pair.

    Critics read actions relative to their logged anchors, and the bounds lie around the anchor: a learner that took control (a = 0) for the
    anchor of a later round would ask its critics about actions that were not meant.

    Args:
        steps: The log.
        config: Deployment: level, shape and sizes of the actor, seed.

    Returns:
        A `pair` or `request` policy whose note says how far it is off, or None when the anchor was the control policy.
    """
    numbers = _newest_round(steps)
    c, learner, spec = steps.columns, config.learner, config.spec.build()
    if not c["anchor_actions"][numbers].any():
        return None
    normaliser = Normaliser.fit(c["states"][numbers], c["scores"][numbers], c["valid"][numbers] > 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(learner.seed)
        actor = make_actor(spec, learner.hidden_sizes, learner.embedding_size, level=learner.level, shape=learner.actor)
    optimiser = torch.optim.Adam(actor.parameters(), lr=LEARNING_RATE, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=NUM_STEPS)
    rng, squares = np.random.default_rng(learner.seed), []
    for _ in range(NUM_STEPS):
        drawn = rng.choice(numbers, BATCH_LISTS)
        numeric = (numeric_input(c["states"][drawn], c["scores"][drawn]) - normaliser.mean) / normaliser.std
        actions = actor(torch.from_numpy(numeric), torch.from_numpy(c["categorical"][drawn].astype(np.int64)))  # (B, G, A)
        valid = torch.from_numpy(c["valid"][drawn])
        error = ((actions - torch.from_numpy(c["anchor_actions"][drawn])).square().mean(-1) * valid).sum() / valid.sum()
        optimiser.zero_grad()
        torch.autograd.backward(error)
        optimiser.step()
        schedule.step()
        squares.append(error.detach())
    off = float(torch.stack(squares[-100:]).mean().sqrt())
    manifest = Manifest(
        version=0,
        digest="",
        kind=PolicyKind(learner.level),
        spec=spec,
        hidden_sizes=learner.hidden_sizes,
        embedding_size=learner.embedding_size,
        actor=learner.actor,
        round=int(steps.rounds[numbers[-1]]),
        note=f"anchor of round {steps.rounds[numbers[-1]]} as logged, off by {off:.3f} (root mean square of an action)",
    )
    parameters: dict[str, Floats] = {name: p.detach().numpy().copy() for name, p in actor.state_dict().items()}
    return Policy.of(manifest, parameters, normaliser)


def _newest_round(steps: Steps) -> Indices:
    """Numbers of the lists of the newest round that has enough of them, or else of the newest."""
    rounds, counts = np.unique(steps.rounds, return_counts=True)
    enough = rounds[counts >= MIN_LISTS]
    return np.flatnonzero(steps.rounds == (enough if len(enough) else rounds)[-1])
