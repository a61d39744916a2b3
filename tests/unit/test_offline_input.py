"""Requests as RLlib's records: episodes are sessions, rewards add up, minibatches come from what was written."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.rllib.algorithms.bc import BCConfig
from ray.rllib.core.columns import Columns

from esrl_ray.config import Config, load_config
from esrl_ray.learning.offline_input import FILE, LoggedRequests, to_records, write_records
from esrl_ray.methods.request_level import Requests
from esrl_ray.methods.static import Static
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import CUT, LEFT, Steps
from esrl_ray.simulation.rounds import SimulatedTraffic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("configs/demo.yaml", ["simulation.num_users=60", "simulation.num_items=300", "simulation.num_candidates=20"])


@pytest.fixture(scope="module")
def steps(config: Config) -> Steps:
    """600 simulated steps; some sessions ended, some run on, one was cut off."""
    traffic, control = SimulatedTraffic(config, seed=1, capacity=600), Static("static", config)
    for _ in traffic.serve(control.exploration(), Policy.static(config.spec.build()), until=600, number=0):
        pass
    running = np.flatnonzero(traffic.steps.following == -1)
    traffic.steps.follow(running[:1], CUT)
    return traffic.steps


@pytest.fixture(scope="module")
def records(config: Config, steps: Steps) -> pa.Table:
    spec = config.spec.build()
    return to_records(Requests.of(steps, spec, Normaliser.identity(spec)), steps.sessions, spec)


def array(records: pa.Table, name: str) -> np.ndarray:
    return np.array(records[name].to_pylist())


def test_rewards_of_an_episode_add_up_to_those_of_its_session(steps: Steps, records: pa.Table) -> None:
    known, total = steps.samplable(), steps.list_rewards.sum(1)
    logged = {str(s): total[known][steps.sessions[known] == s].sum() for s in np.unique(steps.sessions[known])}
    written = {e: array(records, Columns.REWARDS)[array(records, Columns.EPS_ID) == e].sum() for e in set(array(records, Columns.EPS_ID))}
    assert written.keys() == logged.keys() and len(logged) > 50
    assert all(written[e] == pytest.approx(logged[e], rel=1e-5) for e in logged)


def test_each_session_ends_once_and_is_terminated_only_when_the_user_left(steps: Steps, records: pa.Table) -> None:
    terminated, truncated, episode = (array(records, name) for name in (Columns.TERMINATEDS, Columns.TRUNCATEDS, Columns.EPS_ID))
    assert not (terminated & truncated).any()
    assert terminated.sum() == (steps.following == LEFT).sum() > 0
    assert truncated.sum() > 0
    for e in set(episode):
        ends = (terminated | truncated)[episode == e]
        assert ends[-1] and ends.sum() == 1


def test_the_next_observation_is_that_of_the_session_s_next_record(config: Config, steps: Steps, records: pa.Table) -> None:
    observations, after, episode = (array(records, name) for name in (Columns.OBS, Columns.NEXT_OBS, Columns.EPS_ID))
    assert observations.shape[1] == len(config.spec.build().request_inputs) == 12
    compared = 0
    for e in set(episode):
        mine = np.flatnonzero(episode == e)
        np.testing.assert_array_equal(after[mine[:-1]], observations[mine[1:]])
        compared += len(mine) - 1
    assert compared > 100


def test_a_step_whose_successor_is_unknown_is_the_last_observation_and_no_record(steps: Steps, records: pa.Table) -> None:
    assert len(records) == len(steps.samplable()) < len(steps)
    assert len(steps) - len(records) == (steps.following == -1).sum() + 1  # running sessions, and the one that was cut off


def test_minibatches_are_drawn_from_the_records_and_repeat_under_a_seed(records: pa.Table, tmp_path: Path) -> None:
    write_records(records, tmp_path)
    config = BCConfig().debugging(seed=3)
    config.offline_data(input_=str(tmp_path))
    once, again = (list(islice(LoggedRequests(config).iter_torch_batches(batch_size=32, device="cpu"), 3)) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        pairs = torch.cat([a["default_policy/obs"], a["default_policy/rewards"][:, None]], 1).numpy()
        every = np.column_stack([array(records, Columns.OBS), array(records, Columns.REWARDS)]).astype(np.float32)
        assert all((every == row).all(1).any() for row in pairs)
    assert not torch.equal(once[0]["default_policy/obs"], once[1]["default_policy/obs"])


def test_another_folder_s_records_replace_the_first_ones(records: pa.Table, tmp_path: Path) -> None:
    for number, part in enumerate((records, records.slice(0, 1))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_records(part, folder)
        assert (folder / FILE).exists()
    config = BCConfig().debugging(seed=3)
    config.offline_data(input_=str(tmp_path / "0"))
    source = LoggedRequests(config)
    source.read(tmp_path / "1")
    (batch,) = islice(source.iter_torch_batches(batch_size=8, device="cpu"), 1)
    assert (batch["default_policy/obs"] == torch.tensor(records["obs"][0].as_py())).all()
