"""The method as built learns on the simulator: the core's `update` in process, arms and rounds as in the demo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esrl_ray.config import load_config
from esrl_ray.evaluation.frozen import FrozenResult, evaluate_frozen
from esrl_ray.policy.policy import Policy
from tests.learning.in_process import InProcessLoop, Learnt

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
STEPS = (5_000, 10_000)
"""About 800 gradient steps of 128 transitions: a minute of one core."""


@pytest.fixture(scope="module")
def learnt() -> list[Learnt]:
    torch.set_num_threads(1)
    return list(InProcessLoop(load_config(DEMO), seed=0, capacity=max(STEPS) + 1000).run(until=STEPS))


@pytest.fixture(scope="module")
def frozen(learnt: list[Learnt]) -> list[FrozenResult]:
    """Control, then the learnt policies, on sessions that training has not seen."""
    config = load_config(DEMO)
    return evaluate_frozen([Policy.static(config.spec.build()), *(at.policy for at in learnt)], config, seed=0, sessions=1000)


def test_after_10_000_steps_the_learnt_policy_beats_control_with_its_whole_interval(frozen: list[FrozenResult]) -> None:
    control, final = frozen[0].reward.mean, frozen[-1].difference
    assert control is not None and final.mean is not None and final.ci_low is not None
    assert final.ci_low > 0
    assert final.mean / control > 0.10, f"our experiments gave +13 % at 10,000 steps; here {final.mean / control:+.1%}"


def test_users_stay_longer_with_the_learnt_policy(frozen: list[FrozenResult]) -> None:
    assert frozen[-1].pages > frozen[0].pages


def test_it_learns_at_the_pace_of_the_samples_per_insert_and_stays_near_the_bounds(learnt: list[Learnt]) -> None:
    config = load_config(DEMO)
    per_step = config.replay.samples_per_insert / config.learner.batch_size
    expected = per_step * (STEPS[-1] - config.exploration.warmup_steps)
    assert learnt[-1].policy.manifest.gradient_steps == pytest.approx(expected, rel=0.05)
    assert learnt[-1].policy.manifest.round >= 1
    result = learnt[-1].result
    assert result is not None
    assert float(result.outside_share) < 0.3
    assert float(result.phi_mean) > 0.8
    assert 0.3 < float(result.critic_loss) < 6.0
