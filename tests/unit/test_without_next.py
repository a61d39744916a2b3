"""`replay.sample_without_next` in learning from a log: the same steps are sampled as by a replay shard."""

from __future__ import annotations

import numpy as np
import pytest
from ray.rllib.core.columns import Columns

from esrl_ray.config import Config, load_config
from esrl_ray.errors import MethodError
from esrl_ray.learning.offline_input import to_records
from esrl_ray.learning.steps_feed import StepsFeed
from esrl_ray.methods.catalogue import create_method
from esrl_ray.methods.request_level import Requests
from esrl_ray.normaliser import Normaliser
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.replay.steps import CUT, LEFT, UNKNOWN, Steps
from tests.step_tables import simulated_steps, step_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own

SMALL = ["learner.gamma=0", "learner.batch_size=16", "learner.hidden_sizes=[8]", "replay.min_size=10", "replay.samples_per_insert=8"]
ALL = "replay.sample_without_next=true"


def deployment(*settings: str) -> Config:
    return load_config("configs/demo.yaml", [*SMALL, *settings])


@pytest.fixture
def cut() -> Steps:
    """Of no step is it known what follows."""
    steps = simulated_steps(deployment(), 300)
    steps.follow(np.arange(len(steps)), CUT)
    return steps


def test_batches_of_a_log_are_drawn_from_all_steps_as_a_shard_draws_them(cut: Steps) -> None:
    buffer = ReplayBuffer(deployment(ALL), seed=0, read_log=lambda *_: [])
    buffer.apply("ingest-0", 0, step_table(cut), inserted_ms=0)
    assert buffer.num_samplable == len(cut.samplable(without_next=True)) == len(cut)
    drawn = StepsFeed(cut, deployment(ALL), 1, by_reference=False)._draw(0)
    assert not drawn["has_next"].any() and not drawn["terminated"].any()
    with pytest.raises(MethodError, match="none of 500 steps has a known next list or end"):
        StepsFeed(cut, deployment(), 1, by_reference=False)


@pytest.mark.parametrize("method", ["enhancedrl", "unifiedrl", "sac"])
def test_methods_that_take_the_deployments_discount_learn_from_all_steps(cut: Steps, method: str) -> None:
    assert create_method(method, deployment(ALL), seed=0).fit(cut).manifest.gradient_steps > 0
    with pytest.raises(MethodError, match="has a known next list or end"):
        create_method(method, deployment(), seed=0).fit(cut)


@pytest.mark.parametrize("method", ["td3", "batchrl-mtf"])
def test_methods_with_a_discount_of_their_own_do_not_take_what_is_cut_off_for_an_end(cut: Steps, method: str) -> None:
    with pytest.raises(MethodError, match="has a known next list or end"):
        create_method(method, deployment(ALL), seed=0).fit(cut)


def test_requests_that_nothing_is_known_to_follow_are_truncated_records_and_not_ends() -> None:
    config = deployment()
    steps, spec = simulated_steps(config, 300), config.spec.build()
    steps.follow(np.flatnonzero(steps.following == UNKNOWN)[:1], CUT)
    requests = Requests.of(steps, spec, Normaliser.identity(spec), without_next=True)
    np.testing.assert_array_equal(requests.terminated.astype(bool), steps.following == LEFT)
    records = to_records(requests, steps.sessions, spec)
    assert len(records) == len(steps)
    np.testing.assert_array_equal(records[Columns.TERMINATEDS].to_numpy(), steps.following == LEFT)
    np.testing.assert_array_equal(records[Columns.TRUNCATEDS].to_numpy(), np.isin(steps.following, (UNKNOWN, CUT)))
