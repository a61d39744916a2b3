"""The speed benchmarks at toy sizes: every table has its rows; nothing is said about time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.buffers import sampling
from benchmarks.learner import ensemble, through_rllib
from benchmarks.pipelines import pipelines
from benchmarks.replay import LISTS_PER_SESSION, make_tables
from benchmarks.timing import Table, in_turns
from esrl_ray.config import Config, load_config

ROOT = Path(__file__).parents[2]
SMALL = ["learner.batch_size=8", "learner.updates_per_call=2", "learner.hidden_sizes=[8, 8]", "replay.capacity=100", "replay.min_size=1"]
SMALL += ["replay.samples_per_insert=1e9", "simulation.num_users=300", "simulation.num_items=300"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")  # Ray's, torch's


@pytest.fixture(scope="module")
def config() -> Config:
    torch.set_num_threads(1)
    return load_config(ROOT / "configs" / "demo.yaml", SMALL)


def names(table: Table, column: int = 0) -> list[str]:
    assert all(len(row) == len(table.columns) for row in table.rows)
    lines = table.markdown().splitlines()
    assert lines[0] == f"## {table.title}" and lines[1] == f"Target: {table.target}."
    assert sum(line.startswith("|") for line in lines) == 2 + len(table.rows)
    return [row[column] for row in table.rows]


def test_calls_take_turns_and_warm_up_does_not_count() -> None:
    made: list[str] = []
    timings = in_turns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=3)
    assert made == ["a", "b"] * 5
    assert set(timings) == {"a", "b"} and all(timing.cpu >= 0 and timing.wall >= 0 for timing in timings.values())


def test_learner_tables(config: Config) -> None:
    assert names(through_rllib(config, rounds=1)) == ["bare torch loop", "RLlib, local learner"]
    table = ensemble(config, rounds=1, critics=(1, 10), batches=(2, 4))
    assert [(row[0], row[1], row[6]) for row in table.rows] == [("1", "2", "1"), ("1", "4", "1"), ("10", "2", "2"), ("10", "4", "2")]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_pipeline_table(config: Config) -> None:
    table = pipelines(config, num_steps=600, rounds=1, stock=False)
    assert names(table) == ["EnhancedRL", "RLlib SAC, log in memory"]


def test_replay_table(config: Config) -> None:
    table = sampling(config, make_tables(config, 100), session_length=LISTS_PER_SESSION, rounds=1, batches=(4, 16))
    assert not table.notes, "TorchRL is there"
    assert names(table, 0) == ["4"] * 8 + ["16"] * 8
    assert names(table, 1)[:3] == ["ours", "ours, with how the session goes on", "bare numpy"]
    assert sum("RLlib" in name for name in names(table, 1)) == 6 and sum("TorchRL" in name for name in names(table, 1)) == 4
