"""Two learners take the steps of two cores that average their gradients and add up their sums, and say it when they diverge."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import torch

from esrl_ray.algo.networks import SplitCritics
from esrl_ray.algo.update import Average, Batch, LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.errors import Diverged
from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.feed import to_multi_agent_batch
from esrl_ray.vocabulary import TransitionBatch
from tests.transitions import make_transitions

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # Ray's own
]

SET = ["learner.batch_size=16", "learner.updates_per_call=8", "learner.hidden_sizes=[16, 16]", "learner.soft_update_every=5"]
CALLS = 4  # of 8 gradient steps


@pytest.fixture
def config() -> Config:
    return load_config("configs/demo.yaml", [*SET, "learner.num_learners=2", "learner.device=cpu"])


def of_both(config: Config, call: int) -> list[TransitionBatch]:
    return [make_transitions(config, config.learner.batch_size * config.learner.updates_per_call, seed=2 * call + i) for i in range(2)]


def learn(algorithm: EnhancedRL, batches: list[TransitionBatch]) -> None:
    algorithm.learn({}, [ray.put(to_multi_agent_batch(batch)) for batch in batches])


class Pair:
    """Two cores in two threads that wait for each other wherever learners do."""

    def __init__(self, config: Config) -> None:
        self.states = [LearnState.create(config, device="cpu") for _ in range(2)]
        self._barrier = threading.Barrier(2, timeout=60)
        self._of: list[list[torch.Tensor]] = [[], []]

    def update(self, batches: tuple[Batch, Batch]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: update(self.states[i], batches[i], average=self._average_of(i)), range(2)))

    def _average_of(self, i: int) -> Average:
        def average(tensors: list[torch.Tensor], *, total: bool = False) -> None:
            self._of[i] = [tensor.clone() for tensor in tensors]
            self._barrier.wait()
            for tensor, mine, other in zip(tensors, *self._of, strict=True):
                tensor.copy_(
                    mine + other if tensor.dtype == torch.float64 else (mine + other) / 2
                )  # sums are float64, whatever `total` says
            self._barrier.wait()

        return average


def test_two_learners_average_gradients_and_add_up_what_they_count(config: Config) -> None:
    torch.set_num_threads(1)
    pair, algorithm = Pair(config), EnhancedRL.of(config)
    try:
        for call in range(CALLS):
            batches = of_both(config, call)
            parts = [
                prepare(state, batch).split(config.learner.updates_per_call) for state, batch in zip(pair.states, batches, strict=True)
            ]
            for both in zip(*parts, strict=True):
                pair.update(both)
            learn(algorithm, batches)
        learners = algorithm.each_learner(lambda learner: learner.learn_state.networks.state_dict())
    finally:
        algorithm.stop()
    critics = pair.states[0].networks.critics
    assert isinstance(critics, SplitCritics) and critics.long_term.weights.any()
    num_lists = 2 * config.learner.batch_size * config.learner.updates_per_call * CALLS
    assert 0.9 * num_lists < float(critics.long_term.gram[-1, -1]) <= num_lists  # older ones have faded a little
    for networks in learners:
        for name, tensor in pair.states[0].networks.state_dict().items():
            torch.testing.assert_close(networks[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_learners_that_diverge_say_so_in_their_own_words(config: Config) -> None:
    algorithm, batches = EnhancedRL.of(config), of_both(config, 0)
    try:
        learn(algorithm, batches)
        batches[0]["rewards"] = np.full_like(batches[0]["rewards"], np.nan)
        with pytest.raises(Diverged, match=r"^learning diverged at gradient step 16"):
            learn(algorithm, batches)
    finally:
        algorithm.stop()
