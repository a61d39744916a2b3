"""The default method learns on the simulator: rounds, arms and settings of the demo, without its plumbing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esrl_ray.config import load_config
from esrl_ray.evaluation.frozen import FrozenResult, evaluate_frozen
from esrl_ray.methods.enhancedrl import EnhancedRL
from esrl_ray.policy.policy import Policy
from esrl_ray.simulation.rounds import learn_online

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
NUM_STEPS = 10_000
"""Two rounds, about 1,000 gradient steps of 128 transitions."""


@pytest.fixture(scope="module")
def method() -> EnhancedRL:
    return EnhancedRL("enhancedrl", load_config(DEMO), seed=0)


@pytest.fixture(scope="module")
def learnt(method: EnhancedRL) -> list[Policy]:
    torch.set_num_threads(1)
    return [policy for _, policy in learn_online(method, method.config, seed=0, num_steps=NUM_STEPS)]


@pytest.fixture(scope="module")
def frozen(learnt: list[Policy]) -> list[FrozenResult]:
    """Control, then the learnt policies, on sessions that training has not seen."""
    config = load_config(DEMO)
    return evaluate_frozen([Policy.static(config.spec.build()), *learnt], config, seed=0, sessions=1000)


def test_after_10_000_steps_the_learnt_policy_beats_control_with_its_whole_interval(frozen: list[FrozenResult]) -> None:
    control, final = frozen[0].reward.mean, frozen[-1].difference
    assert control is not None and final.mean is not None and final.ci_low is not None
    assert final.ci_low > 0
    assert final.mean / control > 0.25, f"four seeds gave +40 % to +62 %; here {final.mean / control:+.1%}"


def test_users_stay_longer_with_the_learnt_policy(frozen: list[FrozenResult]) -> None:
    assert frozen[-1].pages > frozen[0].pages


def test_it_learns_at_the_pace_of_the_samples_per_insert_and_stays_near_the_bounds(method: EnhancedRL, learnt: list[Policy]) -> None:
    per_step = method.config.replay.samples_per_insert / method.config.learner.batch_size
    assert learnt[-1].manifest.gradient_steps == pytest.approx(per_step * NUM_STEPS, rel=0.05)
    assert [policy.manifest.round for policy in learnt] == [0, 1]
    assert method.result is not None
    assert float(method.result.outside_share) < 0.3
    assert 0.02 < float(method.result.critic_loss) < 1.0
