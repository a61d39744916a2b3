"""A gradient step never waits for the device: it runs on tensors that have shapes and no values, where a look at a value raises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode

from esrl_ray.algo.update import Batch, LearnState, prepare, update
from esrl_ray.config import Config
from tests.transitions import make_transitions, with_codes, with_learner


def _without_values(config: Config, mode: FakeTensorMode) -> tuple[LearnState, Batch]:
    """Adam is left out: it reads its own counter of steps, which stays on the CPU and is no wait."""
    state = LearnState.create(config, device="cpu")
    batch = prepare(state, make_transitions(config, 8))
    with FakeCopyMode(mode):
        fake: tuple[LearnState, Batch] = copy.deepcopy((state, batch))
    for name, network in (("actor_optimiser", fake[0].networks.actor), ("critic_optimiser", fake[0].networks.critics)):
        setattr(fake[0], name, torch.optim.SGD(network.parameters(), lr=1e-3))
    return fake


@pytest.mark.parametrize(
    "learner",
    [
        {"critic": "split"},
        {"critic": "split", "actor": "ple"},
        {"critic": "list_sum", "phi": True},
        {"critic": "per_pair"},
        {"critic": "list_sum", "level": "request", "actor_loss": "printed"},
    ],
)
def test_a_gradient_step_looks_at_no_value(config: Config, learner: dict[str, Any]) -> None:
    config = with_learner(with_codes(config), soft_update_every=2, **learner)  # the second step has also what is done so rarely
    mode = FakeTensorMode()
    state, batch = _without_values(config, mode)
    with mode:
        for _ in range(2):
            result = update(state, batch)
        assert all(value.shape == () for value in result)
        with pytest.raises(DataDependentOutputException):
            float(result.critic_loss)
