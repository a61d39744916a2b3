"""EnhancedRL on RLlib takes the core's gradient steps with every critic, loss, level and shape of actor; needs no Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import load_config
from esrl_ray.errors import Diverged
from esrl_ray.learning.algorithm import CALLS_PER_ITERATION, EnhancedRL
from esrl_ray.learning.feed import to_multi_agent_batch
from esrl_ray.vocabulary import Lineage
from tests.transitions import make_transitions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own

SET = [
    "learner.batch_size=16",
    "learner.updates_per_call=8",
    "learner.hidden_sizes=[16, 16]",
    "learner.soft_update_every=5",
    "learner.device=cpu",
]
CALLS = 2  # of 8 gradient steps
CODES = "spec.categorical_features=[{name: tag, cardinality: 7, side: item}, {name: tab, cardinality: 4, side: context}]"
LIST_SUM, PRINTED = "learner.critic=list_sum", "learner.actor_loss=printed"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([LIST_SUM], id="list_sum"),
        pytest.param([LIST_SUM, "learner.actor=ple"], id="list_sum-ple"),
        pytest.param(["learner.critic=per_pair"], id="per_pair"),
        pytest.param([LIST_SUM, PRINTED], id="printed"),
        pytest.param([LIST_SUM, PRINTED, "learner.level=request"], id="request"),
        pytest.param(["learner.actor=ple"], id="split-ple"),
        pytest.param([CODES], id="split-codes"),
        pytest.param([LIST_SUM, CODES], id="list_sum-codes"),
    ],
)
def test_rllib_takes_the_same_gradient_steps_as_the_core(settings: list[str]) -> None:
    config = load_config("configs/demo.yaml", [*SET, *settings])
    state, learner = LearnState.create(config, device="cpu"), config.learner
    torch.set_num_threads(1)
    start = {name: tensor.clone() for name, tensor in state.networks.state_dict().items()}
    algorithm = EnhancedRL.of(config)
    try:
        for number in range(CALLS):
            transitions = make_transitions(config, learner.batch_size * learner.updates_per_call, seed=number)
            for part in prepare(state, transitions).split(learner.updates_per_call):
                update(state, part)
            algorithm.learn({}, [to_multi_agent_batch(transitions)])
        (networks,) = algorithm.each_learner(lambda learner: learner.learn_state.networks.state_dict())
    finally:
        algorithm.stop()
    core = state.networks.state_dict()
    assert networks.keys() == core.keys()
    moved = {name.split(".")[0] for name, tensor in core.items() if not torch.equal(tensor, start[name])}
    assert moved == ({"actor", "critics"} if learner.critic == "split" else {"actor", "critics", "target_actor", "target_critics"})
    for name, tensor in core.items():
        torch.testing.assert_close(networks[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_call_that_diverges_is_an_error_also_after_one_that_did_not() -> None:
    config = load_config("configs/demo.yaml", SET)
    size = config.learner.batch_size * config.learner.updates_per_call

    class Feed:
        num_calls = 0

        def next(self, wait_s: float) -> tuple[Lineage, list[Any]]:
            self.num_calls += 1
            batch = make_transitions(config, size, seed=self.num_calls)
            if self.num_calls == CALLS_PER_ITERATION - 1:
                batch["rewards"] = np.full_like(batch["rewards"], np.nan)
            return {}, [to_multi_agent_batch(batch)]

    algorithm = EnhancedRL.of(config)
    algorithm._feed = Feed()
    try:
        with pytest.raises(Diverged, match=r"diverged at gradient step 24: .*'critic_loss': nan.*lower learner.critic_lr"):
            algorithm.train()
    finally:
        algorithm.stop()
