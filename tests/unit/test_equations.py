"""Eq. (1), Eq. (2) and Eq. (3), and the normaliser, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from esrl_ray.config import Config
from esrl_ray.exploration import exploration_noise
from esrl_ray.fusion import fused_scores, fusion_weights
from esrl_ray.normaliser import Normaliser
from esrl_ray.reward import BehaviourConfig, RewardConfig, RewardGroup, rewards_of
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Round

SPEC = Spec((), (), (), (), ("click", "watch"), (1.0, 0.5), 1.2, 0.55, 0.5)


def test_fusion_by_hand() -> None:
    # a = (.5, -.5, 1, 0): powers (1.6, -.1), biases (1.05, .55); scores (.95, .45) + biases = (2, 1): 1.6 ln 2 - .1 ln 1.
    action = torch.tensor([0.5, -0.5, 1.0, 0.0])
    powers, biases = fusion_weights(action, SPEC)
    assert powers.tolist() == pytest.approx([1.6, -0.1])
    assert biases.tolist() == pytest.approx([1.05, 0.55])
    assert float(fused_scores(torch.tensor([0.95, 0.45]), action, SPEC)) == pytest.approx(1.6 * math.log(2), rel=1e-5)


def test_the_logarithm_orders_as_the_product() -> None:
    rng = np.random.default_rng(0)
    scores, action = torch.from_numpy(rng.uniform(0, 3, (50, 2))), torch.from_numpy(rng.uniform(-1, 1, 4))
    powers, biases = fusion_weights(action, SPEC)
    product = ((scores + biases) ** powers).prod(-1)
    assert torch.equal(product.argsort(), fused_scores(scores, action, SPEC).argsort())


def test_a_score_of_zero_with_a_bias_of_zero_stays_finite() -> None:
    action, spec = torch.tensor([1.0, 1.0, -1.0, -1.0]), Spec((), (), (), (), ("a", "b"), (1.0, 1.0), 1.2, 0.5, 0.5)
    assert bool(fused_scores(torch.zeros(2), action, spec).isfinite())


ENHANCEDRL = RewardConfig(
    behaviours=(BehaviourConfig(name="watch_s", combine="sum", cap=240), BehaviourConfig(name="like")),
    groups=(
        RewardGroup(name="watch", expression="0.05 * min(watch_s, 120)"),
        RewardGroup(name="other", expression="0.5 * (watch_s > 10) + 5 * like"),
    ),
    scale=6.5,
)


def test_rewards_by_hand() -> None:
    # EnhancedRL's reward, in the groups of UnifiedRL. Watch 150 s: min(150, 120) .05 = 6 | [150 > 10] .5 + like 5 = 5.5; all over 6.5.
    got = rewards_of(np.array([[150.0, 1.0], [10.0, 0.0], [0.0, 0.0]], np.float32), ENHANCEDRL)
    np.testing.assert_allclose(got, [[6 / 6.5, 5.5 / 6.5], [0.5 / 6.5, 0.0], [0.0, 0.0]], rtol=1e-6)


def test_a_default_reward_stands_where_nothing_came() -> None:
    other = ENHANCEDRL.groups[1].model_copy(update={"default": -1.3})
    config = ENHANCEDRL.model_copy(update={"groups": (ENHANCEDRL.groups[0], other)})
    got = rewards_of(np.array([[[150.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]], np.float32), config)
    np.testing.assert_allclose(got[..., 1], [[5.5 / 6.5, -0.2], [5 / 6.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(got[0, :, 0], [6 / 6.5, 0.0], rtol=1e-6)


def test_noise_is_uniform_within_the_bounds_and_recomputable(config: Config) -> None:
    turn = Round(3, 1, 99, -0.1, 0.2, 0)
    items = [f"i{i}" for i in range(4000)]
    noise = exploration_noise("d", items, 10, turn, scope="pair")
    assert noise.min() >= -0.1 and noise.max() < 0.2
    np.testing.assert_allclose(np.quantile(noise, [0.1, 0.5, 0.9]), [-0.07, 0.05, 0.17], atol=0.005)
    assert np.abs(np.corrcoef(noise.T) - np.eye(10)).max() < 0.08
    assert np.array_equal(noise[7], exploration_noise("d", ["i7"], 10, turn, scope="pair")[0])
    assert not np.array_equal(noise, exploration_noise("d", items, 10, Round(3, 1, 98, -0.1, 0.2, 0), scope="pair"))
    shared = exploration_noise("d", items[:3], 10, turn, scope="request")
    assert np.array_equal(shared[0], shared[1]) and np.array_equal(shared[0], shared[2])


def test_the_normaliser_ignores_padding_and_constant_columns() -> None:
    rng = np.random.default_rng(0)
    states, scores = rng.normal(5, 3, (40, 4, 1)).astype(np.float32), np.ones((40, 4, 2), np.float32)
    valid = rng.random((40, 4)) < 0.7
    scores[..., 1] *= rng.uniform(1, 1 + 1e-6, (40, 4))  # varies, by next to nothing
    states[~valid] = 1e6
    fitted = Normaliser.fit(states, scores, valid)
    assert fitted.mean[0] == pytest.approx(states[valid].mean(), rel=1e-4)
    assert fitted.std[0] == pytest.approx(states[valid].std(), rel=1e-4)
    assert fitted.std[1:].tolist() == pytest.approx([1e9, 1e-3])
