"""Rounds of a method whose actor follows dQ/da end at the best action: each round's exploration lies around another anchor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esrl_ray.config import Config, load_config
from esrl_ray.methods.enhancedrl import EnhancedRL
from esrl_ray.replay.steps import LEFT, Steps

BEST = 0.25
"""Of the first power: a list earns `1 - 4 (a - BEST)^2`."""
LISTS, ROUNDS = 600, 6
SETTINGS = [
    *("spec.user_features=[act]", "spec.scores=[click]", "spec.power_base=[1.0]", "serve.list_size=1", "serve.num_unshown=0"),
    *("exploration.low=-0.15", "exploration.high=0.15"),
    *("learner.level=request", "learner.critic=list_sum", "learner.actor_loss=printed", "learner.gamma=0"),
    *("learner.hidden_sizes=[32]", "learner.critics_per_group=2", "learner.critic_lr=3e-3", "replay.samples_per_insert=12.8"),
]


def play_rounds(config: Config, *, seed: int) -> float:
    """The action after rounds of lists that the method itself explored."""
    torch.set_num_threads(1)
    rng, spec, steps = np.random.default_rng(seed), config.spec.build(), Steps(config, LISTS * ROUNDS)
    method = EnhancedRL("unifiedrl", config, seed=seed)
    states = np.zeros((LISTS, 1, spec.num_features), np.float32)
    scores, codes, ones = np.ones((LISTS, 1, 1), np.float32), np.zeros((LISTS, 1, 0), np.int32), np.ones((LISTS, 1), np.float32)
    for number in range(ROUNDS):
        exploration = method.exploration()
        states[..., 0], scores[..., 0] = rng.normal(size=(2, LISTS, 1)) * [[[1.0]], [[0.0]]] + [[[0.0]], [[1.0]]]
        anchors = exploration.centre.act(states, codes, scores)
        actions = np.clip(anchors + rng.uniform(-0.15, 0.15, anchors.shape), -1, 1).astype(np.float32)
        rewards = 1 - 4 * (actions[..., :1] - BEST) ** 2 + rng.normal(0, 0.3, (LISTS, 1, 1))
        columns = {"states": states, "categorical": codes, "scores": scores, "actions": actions, "anchor_actions": anchors}
        masks = {"rewards": rewards.astype(np.float32), "behaviours": rewards.astype(np.float32), "shown": ones, "valid": ones}
        numbers = steps.add({"sessions": len(steps) + np.arange(LISTS), "users": 0, "rounds": number, "arms": 0}, columns | masks)
        steps.follow(numbers, LEFT)
        learnt = method.fit(steps)
    return float(learnt.act(states, codes, scores)[..., 0].mean())


@pytest.mark.parametrize("seed", range(3))
def test_over_moving_anchors_the_actor_ends_at_the_best_action(seed: int) -> None:
    assert play_rounds(load_config(None, SETTINGS), seed=seed) == pytest.approx(BEST, abs=0.15)
