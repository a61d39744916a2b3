"""The comparison sees what it must: it is the judge, so it is tried on what is wrong."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from esrl_ray.cli.chaos.compare import compare_steps, ids_of, problems_of, shard_differences
from esrl_ray.cli.chaos.processes import contents_of
from esrl_ray.config import Config
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.vocabulary import Ended
from streaming.steptable import merge_steps, rows_to_table
from tests.unit.test_replay import step

LEDGER = {"decisions": {"joined": 3, "duplicate": 1, "dead_letter": 0}, "feedback": {"joined": 5, "duplicate": 0, "dead_letter": 1}}


def rows_of(config: Config, *, reward: float = 1.0) -> pa.Table:
    rows = [
        step(config, "a", next_id="b", ended=Ended.HAS_NEXT),
        step(config, "b", ended=Ended.TERMINATED),
        step(config, "a", revision=1, next_id="b", ended=Ended.HAS_NEXT, reward=reward),
    ]
    return rows_to_table(rows)


def test_steps_that_are_equal_up_to_commits_revisions_and_clocks_are_equal(config: Config) -> None:
    rows = rows_of(config)
    other = rows_to_table([step(config, "b", ended=Ended.TERMINATED), step(config, "a", next_id="b", ended=Ended.HAS_NEXT, reward=1.0)])
    assert compare_steps(merge_steps(rows), merge_steps(other), other).exact


def test_lost_added_doubled_and_changed_steps_are_named(config: Config) -> None:
    rows = rows_of(config)
    expected = merge_steps(rows)
    assert compare_steps(expected, expected.slice(0, 1), rows).lost and compare_steps(expected.slice(0, 1), expected, rows).added
    twice = pa.concat_tables([rows, rows.slice(1, 1)])
    assert compare_steps(expected, merge_steps(twice), twice).doubled == ["b"]
    revised_twice = pa.concat_tables([rows, rows.slice(2, 1)])
    assert compare_steps(expected, merge_steps(revised_twice), revised_twice).doubled == ["a"]
    changed = rows_of(config, reward=2.0)
    assert compare_steps(expected, merge_steps(changed), changed).changed == {"rewards": ["a"]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"ledger": {**LEDGER, "feedback": {**LEDGER["feedback"], "joined": 4}}}, "4 joined, without faults 5"),
        ({"in_topics": {"decisions": 5, "feedback": 6}}, "the topic 5"),
        ({"planned": {"decisions": 4, "feedback": 6, "duplicate": 2, "poison": 1}}, "1 events counted as duplicate, 2 were sent"),
        ({"letters": Counter[tuple[str, int, int]]()}, "0 different dead letters, 1 refused"),
        ({"letters": Counter({("feedback", 0, 3): 1, ("feedback", 0, 4): 1})}, "2 different dead letters"),
        ({"shards": {"replay-0": ["empty"]}}, "replay-0: empty"),
        ({"not_reached": ["zombie:before_delta"]}, "zombie:before_delta found no moment"),
    ],
)
def test_whatever_is_not_as_without_faults_is_a_problem(config: Config, change: dict[str, object], problem: str | None) -> None:
    rows = rows_of(config)
    facts: dict[str, object] = {
        "steps": compare_steps(merge_steps(rows), merge_steps(rows), rows),
        "ledger": LEDGER,
        "expected": LEDGER,
        "planned": {"decisions": 4, "feedback": 6, "duplicate": 1, "poison": 1},
        "in_topics": {"decisions": 4, "feedback": 6},
        "refused": {("feedback", 0, 3)},
        "letters": Counter({("feedback", 0, 3): 2}),
        "shards": {"replay-0": []},
        "not_reached": [],
    }
    problems = problems_of(**(facts | change))  # type: ignore[arg-type]
    assert not problems if problem is None else any(problem in text for text in problems)


def test_a_shard_must_hold_the_tail_of_its_log(config: Config) -> None:
    small = config.model_copy(
        update={"replay": config.replay.model_copy(update={"capacity": 2, "min_size": 1, "samples_per_insert": 1_000.0})}
    )
    commits = [rows_of(config), rows_to_table([step(config, "c", ended=Ended.TERMINATED)])]
    steps, logs = merge_steps(pa.concat_tables(commits)), {"w": ids_of(commits)}
    assert logs == {"w": ["a", "b", "c"]}
    ids = logs["w"]
    whole, behind = (ReplayBuffer(small, seed=0, read_log=lambda worker, after: ()) for _ in range(2))
    for n, rows in enumerate(commits):
        whole.apply("w", n, rows, inserted_ms=0)
    behind.apply("w", 0, commits[0], inserted_ms=0)
    assert shard_differences(contents_of(whole, ids), logs, steps, {"w": 1}, capacity=2) == []
    assert len(shard_differences(contents_of(behind, ids), logs, steps, {"w": 1}, capacity=2)) == 2
    assert any("at most 3" in p for p in shard_differences(contents_of(whole, ids), logs, steps, {"w": 1}, capacity=3))
    other = merge_steps(pa.concat_tables([rows_to_table([step(config, "b", ended=Ended.OPEN, reward=3.0)]), commits[1]]))
    problems = shard_differences(contents_of(whole, ids), logs, other, {"w": 1}, capacity=2)
    assert any("rewards of step b" in p for p in problems) and any("can be drawn" in p for p in problems)
