"""The replay buffer: exact application, links, sampling, limits."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, LogError
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.replay.limiter import Limiter
from esrl_ray.replay.sampler import Sampler
from esrl_ray.vocabulary import Ended, Floats, StepRow
from streaming.steptable import rows_to_table

SET = ["replay.capacity=8", "replay.min_size=1", "replay.samples_per_insert=100", "learner.batch_size=4", "learner.updates_per_call=1"]


@pytest.fixture
def config() -> Config:
    return load_config("configs/demo.yaml", [*SET, "serve.list_size=2", "serve.num_unshown=2"])


def step(
    config: Config,
    name: str,
    *,
    next_id: str | None = None,
    ended: Ended = Ended.OPEN,
    pairs: int = 3,
    revision: int = 0,
    reward: float = 0.0,
) -> StepRow:
    spec, value = config.spec.build(), float(sum(map(ord, name)))

    def fill(*shape: int) -> Floats:
        return np.full(shape, value, np.float32)

    q = config.reward.num_groups
    shown = np.arange(pairs) >= pairs - 2  # the last two were shown
    amend = revision > 0
    bulky = (
        {}
        if amend
        else {
            "item_ids": tuple(f"{name}{i}" for i in range(pairs)),
            "positions": np.arange(pairs, dtype=np.int32),
            "states": fill(pairs, spec.num_features),
            "categorical": np.zeros((pairs, 0), np.int32),
            "scores": fill(pairs, spec.num_scores),
            "actions": fill(pairs, spec.num_actions),
            "anchor_actions": fill(pairs, spec.num_actions),
            "fused_scores": fill(pairs),
        }
    )
    return StepRow(
        step_id=name, revision=revision, session_id="s", user_id="u", index=0, partition=0, offset=0, event_time_ms=0, closed_ms=0,
        arm="explore", policy_version=1, round=0, num_candidates=9, shown=shown,
        behaviours=np.zeros((pairs, len(config.reward.behaviours)), np.float32),
        rewards=np.where(shown[:, None], np.full((pairs, q), reward, np.float32), 0), next_id=next_id, ended=ended, **bulky,  # type: ignore[arg-type]
    )  # fmt: skip


def no_log(worker: str, after: int) -> Iterable[tuple[int, pa.Table]]:
    raise AssertionError(f"the log of {worker} was read after {after}")


def buffer_of(config: Config, *commits: Sequence[StepRow]) -> ReplayBuffer:
    buffer = ReplayBuffer(config, seed=0, read_log=no_log)
    for n, rows in enumerate(commits):
        buffer.apply("w", n, rows_to_table(rows), inserted_ms=n)
    return buffer


def test_a_step_is_sampled_once_its_next_list_is_here(config: Config) -> None:
    buffer = buffer_of(config, [step(config, "a", next_id="b", ended=Ended.HAS_NEXT)])
    assert buffer.samplable_ids() == set() and buffer.sample(4) is None
    buffer.apply("w", 1, rows_to_table([step(config, "b")]), inserted_ms=1)
    assert buffer.samplable_ids() == {"a"} and buffer.chain("a", 5) == ["a", "b"]
    batch = buffer.sample(4)
    assert batch is not None
    assert (batch["states"][:, :3] == ord("a")).all() and (batch["next_states"][:, :3] == ord("b")).all()
    assert batch["has_next"].tolist() == [1] * 4 and batch["terminated"].tolist() == [0] * 4


def test_a_terminated_step_is_sampled_without_a_next_list(config: Config) -> None:
    batch = buffer_of(config, [step(config, "a", ended=Ended.TERMINATED)]).sample(4)
    assert batch is not None
    assert batch["has_next"].sum() == 0 and batch["next_shown"].sum() == 0 and batch["terminated"].tolist() == [1] * 4


def test_open_and_truncated_steps_are_not_sampled(config: Config) -> None:
    rows = [step(config, "a"), step(config, "b", ended=Ended.TRUNCATED)]
    assert buffer_of(config, rows).samplable_ids() == set()
    without_future = load_config("configs/demo.yaml", [*SET, "learner.gamma=0", "replay.sample_without_next=true"])
    assert buffer_of(without_future, rows).samplable_ids() == {"a", "b"}


def test_padding_is_zero_with_scores_one(config: Config) -> None:
    batch = buffer_of(config, [step(config, "a", ended=Ended.TERMINATED, reward=2.0)]).sample(1)
    assert batch is not None
    assert batch["valid"].tolist() == [[1, 1, 1, 0]] and batch["shown"].tolist() == [[0, 1, 1, 0]]
    assert batch["rewards"][0, :, 0].tolist() == [0, 2, 2, 0]
    assert (batch["scores"][0, 3] == 1).all() and (batch["states"][0, 3] == 0).all() and (batch["actions"][0, 3] == 0).all()


def test_a_slot_that_is_used_again_holds_the_new_step_only(config: Config) -> None:
    lengths = (4, 3, 6, 2, 4, 4, 4, 1)
    early = [step(config, chr(97 + i), pairs=length, reward=1.0) for i, length in enumerate(lengths)]
    late = [step(config, chr(65 + i), pairs=length, reward=2.0) for i, length in enumerate(reversed(lengths))]
    used_again = buffer_of(config, early, [*late[:3], step(config, "e", revision=1, pairs=4), *late[3:]])  # an amendment between them
    fresh = buffer_of(config, late)
    for row in late:
        for name, column in fresh.step(row.step_id).items():
            np.testing.assert_array_equal(used_again.step(row.step_id)[name], column, err_msg=f"{name} of {row.step_id}")


def test_of_a_step_that_is_too_long_the_shown_pairs_stay(config: Config) -> None:
    buffer = buffer_of(config, [step(config, "a", ended=Ended.TERMINATED, pairs=6, reward=1.0)])
    columns = buffer.step("a")
    assert columns["shown"].tolist() == [1, 1, 0, 0] and columns["rewards"][:, 0].tolist() == [1, 1, 0, 0]
    buffer.apply("w", 1, rows_to_table([step(config, "a", ended=Ended.TERMINATED, pairs=6, reward=3.0, revision=1)]), inserted_ms=1)
    assert buffer.step("a")["rewards"][:, 0].tolist() == [3, 3, 0, 0]


def test_an_amendment_sets_absolute_values_and_an_older_one_changes_nothing(config: Config) -> None:
    buffer = buffer_of(config, [step(config, "a")], [step(config, "a", revision=2, reward=5.0, ended=Ended.TERMINATED)])
    assert buffer.step("a")["rewards"][:, 0].tolist() == [0, 5, 5, 0] and buffer.samplable_ids() == {"a"}
    buffer.apply("w", 2, rows_to_table([step(config, "a", revision=1, reward=1.0)]), inserted_ms=2)
    buffer.apply("w", 3, rows_to_table([step(config, "gone", revision=1, reward=1.0)]), inserted_ms=3)
    assert buffer.step("a")["rewards"][:, 0].tolist() == [0, 5, 5, 0] and buffer.samplable_ids() == {"a"}
    assert buffer.num_inserted == 1 and buffer.num_ignored_amendments == 2


def test_a_repeated_commit_is_ignored_and_a_gap_is_read_from_the_log(config: Config) -> None:
    commits = [
        [step(config, "a", next_id="b", ended=Ended.HAS_NEXT)],
        [step(config, "b", next_id="c", ended=Ended.HAS_NEXT)],
        [step(config, "c")],
    ]
    tables = [(n, rows_to_table(rows)) for n, rows in enumerate(commits)]
    read: list[int] = []

    def read_log(worker: str, after: int) -> Iterable[tuple[int, pa.Table]]:
        read.append(after)
        return iter(tables[after + 1 :])

    live, gapped = buffer_of(config, *commits), ReplayBuffer(config, seed=0, read_log=read_log)
    gapped.apply("w", 0, tables[0][1], inserted_ms=0)
    gapped.apply("w", 0, tables[0][1], inserted_ms=0)
    gapped.apply("w", 2, tables[2][1], inserted_ms=2)
    assert read == [0] and gapped.lineage == live.lineage == {"w": 2}
    assert gapped.samplable_ids() == live.samplable_ids() == {"a", "b"} and gapped.num_inserted == live.num_inserted == 3
    refilled = ReplayBuffer(config, seed=0, read_log=read_log)
    refilled.refill(["w"])
    assert refilled.samplable_ids() == live.samplable_ids() and refilled.size == 3
    assert refilled.sample(1) is None, "a refill grants no budget"
    for name in ("a", "b", "c"):
        for column, value in live.step(name).items():
            np.testing.assert_array_equal(refilled.step(name)[column], value)


def test_a_gap_that_the_log_does_not_have_is_an_error_and_not_a_loss(config: Config) -> None:
    tables = [(n, rows_to_table([step(config, name)])) for n, name in enumerate("abc")]
    visible: list[tuple[int, pa.Table]] = tables[:1]
    buffer = ReplayBuffer(config, seed=0, read_log=lambda worker, after: iter(visible[after + 1 :]))
    with pytest.raises(LogError, match="commit 2 of w follows commit 0"):
        buffer.apply("w", 2, tables[2][1], inserted_ms=0)
    assert buffer.lineage == {"w": 0} and buffer.size == 1
    visible = tables
    buffer.apply("w", 2, tables[2][1], inserted_ms=0)
    assert buffer.lineage == {"w": 2} and buffer.num_inserted == 3


def test_after_a_voided_commit_what_comes_again_counts(config: Config) -> None:
    buffer = buffer_of(config, [step(config, "a")], [step(config, "a", revision=2, reward=5.0, ended=Ended.TERMINATED)])
    again, later = step(config, "a", reward=1.0), step(config, "a", revision=1, reward=2.0, next_id="b", ended=Ended.HAS_NEXT)
    buffer.apply("w", 2, rows_to_table([again]), inserted_ms=2)
    assert buffer.step("a")["rewards"][:, 0].tolist() == [0, 1, 1, 0] and buffer.samplable_ids() == set()
    buffer.apply("w", 3, rows_to_table([later, step(config, "b"), step(config, "b", revision=1, reward=4.0)]), inserted_ms=3)
    assert buffer.step("a")["rewards"][:, 0].tolist() == [0, 2, 2, 0] and buffer.samplable_ids() == {"a"}
    assert buffer.step("b")["rewards"][:, 0].tolist() == [0, 4, 4, 0] and buffer.num_inserted == 2


def test_a_revision_with_another_number_of_pairs_is_refused(config: Config) -> None:
    buffer = buffer_of(config, [step(config, "a")])
    with pytest.raises(LogError, match="later revision of step a has 2 pairs, expected 3"):
        buffer.apply("w", 1, rows_to_table([step(config, "a", revision=1, pairs=2)]), inserted_ms=1)


def test_the_recent_lists_are_the_newest_with_or_without_a_next_list(config: Config) -> None:
    assert buffer_of(config).recent_lists(3) is None
    batch = buffer_of(config, [step(config, f"{i}") for i in range(10)]).recent_lists(3)
    assert batch is not None and batch["states"][:, 0, 0].tolist() == [ord("9"), ord("8"), ord("7")] and not batch["has_next"].any()


def test_the_ring_drops_the_oldest_and_its_links(config: Config) -> None:
    rows = [step(config, chr(97 + i), next_id=chr(98 + i), ended=Ended.HAS_NEXT) for i in range(11)]  # a..k, each waiting for the next
    buffer = buffer_of(config, rows[:8], rows[8:])
    assert buffer.size == 8 and buffer.samplable_ids() == set("defghij") and buffer.chain("i", 9) == ["i", "j", "k"]
    late = buffer_of(
        config, [step(config, "n"), step(config, "a", next_id="n", ended=Ended.HAS_NEXT)], [step(config, f"x{i}") for i in range(7)]
    )
    assert "a" not in late.samplable_ids(), "its next list was dropped before it"


def test_a_late_step_between_two_takes_over_the_link(config: Config) -> None:
    first = [step(config, "a", next_id="c", ended=Ended.HAS_NEXT), step(config, "c")]
    late = [step(config, "b", next_id="c", ended=Ended.HAS_NEXT), step(config, "a", revision=1, next_id="b", ended=Ended.HAS_NEXT)]
    buffer = buffer_of(config, first, late)
    assert buffer.chain("a", 9) == ["a", "b", "c"] and buffer.samplable_ids() == {"a", "b"}
    fill = [step(config, f"x{i}") for i in range(7)]  # drops a and c, but not b, which came after them
    buffer.apply("w", 2, rows_to_table(fill), inserted_ms=2)
    assert buffer.samplable_ids() == set() and buffer.chain("b", 9) == ["b"], "its next list is gone: it points at nobody else's"


def test_samples_per_insert_bounds_sampling_and_never_insertion() -> None:
    limiter = Limiter(samples_per_insert=2.0, min_size=3, capacity=10, batch=4)
    limiter.insert(2)
    assert not limiter.take(4, samplable=2), "below min_size"
    assert limiter.take(4, samplable=3) and not limiter.take(1, samplable=3)
    limiter.insert(1_000)
    assert limiter.budget == 20, "at most a full buffer's budget"
    with pytest.raises(ConfigError, match=r"one call draws 21 transitions.*= 20"):
        Limiter(samples_per_insert=2.0, min_size=3, capacity=10, batch=21)
    with pytest.raises(ConfigError, match="min_size 11 exceeds capacity 10"):
        Limiter(samples_per_insert=2.0, min_size=11, capacity=10, batch=4)


def test_the_limiters_totals_survive_a_checkpoint(config: Config) -> None:
    buffer, other = buffer_of(config, [step(config, "a", ended=Ended.TERMINATED), step(config, "b")]), buffer_of(config)
    assert buffer.sample(4) is not None
    other.restore_limiter(buffer.limiter_state())
    assert other.limiter_state() == {"inserted": 2, "sampled": 4, "budget": 196.0}


def test_amendments_and_refills_grant_no_budget(config: Config) -> None:
    rows = [[step(config, "a", ended=Ended.TERMINATED)], [step(config, "a", revision=1, ended=Ended.TERMINATED)]]
    buffer = buffer_of(config, *rows)
    assert buffer.limiter_state()["budget"] == 100
    refilled = ReplayBuffer(config, seed=0, read_log=lambda worker, after: ((n, rows_to_table(r)) for n, r in enumerate(rows)))
    refilled.refill(["w"])
    assert refilled.limiter_state()["budget"] == 0 and refilled.num_samplable == 1
    refilled.apply("w", 2, rows_to_table([step(config, "b")]), inserted_ms=0)
    assert refilled.limiter_state()["budget"] == 100


def test_the_sampler_is_uniform_over_what_is_left() -> None:
    sampler = Sampler(10, seed=1)
    for slot in range(10):
        sampler.add(slot)
    for slot in (0, 9, 4, 4):
        sampler.remove(slot)
    drawn = sampler.draw(70_000)
    counts = np.bincount(drawn, minlength=10)
    assert set(np.flatnonzero(counts)) == {1, 2, 3, 5, 6, 7, 8} == set(sampler.members().tolist())
    assert abs(counts[counts > 0] - 10_000).max() < 5 * np.sqrt(10_000)


def test_sampling_is_determined_by_the_seed(config: Config) -> None:
    rows = [step(config, f"x{i}", ended=Ended.TERMINATED) for i in range(6)]
    one, two = buffer_of(config, rows).sample(4), buffer_of(config, rows).sample(4)
    assert one is not None and two is not None
    np.testing.assert_array_equal(one["states"], two["states"])


def test_memory_is_the_payload_and_a_tenth_with_all_ids_and_links() -> None:
    config = load_config("configs/demo.yaml", ["replay.capacity=3000"])
    names = [f"{i:032x}" for i in range(3_001)]
    rows = [step(config, n, next_id=m, ended=Ended.HAS_NEXT, pairs=15) for n, m in pairwise(names)]
    tables = [rows_to_table(rows[i : i + 500]) for i in range(0, 3_000, 500)]
    spec, q = config.spec.build(), config.reward.num_groups
    pairs = 15 * (spec.num_features + spec.num_categorical + spec.num_scores + 2 * spec.num_actions + q + 2)
    payload = 3_000 * 4 * (pairs + spec.num_features + spec.num_scores)
    tracemalloc.start()
    try:
        buffer = ReplayBuffer(config, seed=0, read_log=no_log)
        for n, table in enumerate(tables):
            buffer.apply("w", n, table, inserted_ms=n)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.size == 3_000 and payload < buffer.num_bytes < used <= 1.1 * payload
