"""Upstream scores are free of leaks, the same each time, and cached; guards on the small world of test_kuairand_data."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest

from esrl_ray.evaluation.metrics import group_auc
from esrl_ray.simulation.kuairand_data import KuaiRandLog, read_log
from esrl_ray.simulation.kuairand_upstream import STATES, TASKS, Upstream, block_features, upstream
from tests.unit.test_kuairand_data import real_log, with_column, write_folder

FIRST_DAYS = MappingProxyType({0: 20220425, 3: 20220501, 4: 20220503, 5: 20220505})


def flipped(block: int, *, days: int = 2) -> object:
    """A change that turns the outcome of every exposure of a block (or of its first days) around."""

    def change(made: dict[str, pa.Table]) -> None:
        log = made["log_standard_small"]
        date = log["date"].to_numpy()
        hit = (date >= FIRST_DAYS[block]) & (date < FIRST_DAYS[block] + days)
        for name, largest in (("is_click", 1), ("long_view", 1), ("is_like", 1), ("is_profile_enter", 1), ("play_time_ms", 20_000)):
            values = log[name].to_numpy()
            log = with_column(log, name, np.where(hit, largest - values, values))
        made["log_standard_small"] = log

    return change


def logs(tmp_path: Path, block: int, *, days: int = 2) -> tuple[KuaiRandLog, KuaiRandLog]:
    """The small world as it is, and with a block turned around."""
    return read_log(write_folder(tmp_path / "plain")), read_log(write_folder(tmp_path / "flipped", flipped(block, days=days)))  # type: ignore[arg-type]


def quiet(_: str) -> None:
    """Nobody listens."""


def fitted(log: KuaiRandLog, cache: Path) -> tuple[Upstream, np.ndarray]:
    """Scores and states, and the block of each."""
    return upstream(log, cache, say=quiet), log.exposures.block[log.exposures.block > 0]


@pytest.mark.parametrize("days", [1, 2], ids=["first_day", "both_days"])
def test_labels_of_a_block_enter_no_feature_of_that_block_but_those_of_the_next(tmp_path: Path, days: int) -> None:
    plain, changed = logs(tmp_path, 3, days=days)
    assert (plain.exposures.click != changed.exposures.click).any()
    for block in range(4):
        assert np.array_equal(block_features(plain, block)[0], block_features(changed, block)[0], equal_nan=True), block
    assert not np.array_equal(block_features(plain, 4)[0], block_features(changed, 4)[0], equal_nan=True)


@pytest.mark.parametrize("block", [3, 4, 5], ids=["training", "development", "test"])
def test_labels_of_a_block_enter_no_score_and_no_state_of_that_block_or_of_earlier_ones_that_it_does_not_train(
    tmp_path: Path, block: int
) -> None:
    plain, changed = logs(tmp_path, block)
    (before, blocks), (after, _) = fitted(plain, tmp_path / "a"), fitted(changed, tmp_path / "b")
    untouched = blocks == block if block == 3 else blocks <= block  # cross-fitting: block 3 trains the models of blocks 1 and 2
    assert np.array_equal(before.scores[untouched], after.scores[untouched])
    assert np.array_equal(before.states[blocks <= block], after.states[blocks <= block])
    if block < 5:
        assert not np.array_equal(before.states[blocks > block], after.states[blocks > block])


def test_what_is_known_of_a_user_is_constant_within_a_block_so_that_a_model_of_users_cannot_gain(tmp_path: Path) -> None:
    log = read_log(write_folder(tmp_path / "files"))
    made, blocks = fitted(log, tmp_path / "cache")
    user = log.exposures.user[log.exposures.block > 0]
    states = made.states[:, : len(STATES["user"])]
    for key in set(zip(user.tolist(), blocks.tolist(), strict=True)):
        assert len(np.unique(states[(user == key[0]) & (blocks == key[1])], axis=0)) == 1


def test_scores_rank_what_can_be_known_and_are_about_one(tmp_path: Path) -> None:
    log = read_log(write_folder(tmp_path / "files"))
    made, blocks = fitted(log, tmp_path / "cache")
    later = log.exposures.block > 0
    assert made.scores.shape == (int(later.sum()), len(TASKS))
    assert np.isfinite(made.scores).all() and (made.scores >= 0).all()
    assert np.abs(made.scores[:, :4].mean(0) - 1).max() < 0.25
    clicks, test = log.exposures.click[later], blocks == 5
    assert (
        group_auc(
            made.scores[test, 0], clicks[test], np.ones(test.sum()), log.exposures.user[later][test], log.exposures.user[later][test]
        ).mean
        > 0.6
    )


def test_a_second_call_reads_the_cache_and_a_fresh_fit_gives_the_same_bits(tmp_path: Path) -> None:
    log = read_log(write_folder(tmp_path / "files"))
    said: list[str] = []
    first = upstream(log, tmp_path / "a", say=said.append)
    assert any("28 of 28" in line for line in said)
    said.clear()
    again, fresh = upstream(log, tmp_path / "a", say=said.append), upstream(log, tmp_path / "b", say=quiet)
    assert said == []
    for made in (again, fresh):
        assert np.array_equal(first.scores, made.scores) and np.array_equal(first.states, made.states)
    assert [p.suffix for p in (tmp_path / "a").iterdir()] == [".npz"]


def test_a_damaged_or_foreign_cache_is_fitted_again(tmp_path: Path) -> None:
    log = read_log(write_folder(tmp_path / "files"))
    first = upstream(log, tmp_path, say=quiet)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-4000] + bytes(4000), whole[:5000] + bytes(64) + whole[5064:]):
        file.write_bytes(damaged)
        said: list[str] = []
        assert np.array_equal(upstream(log, tmp_path, say=said.append).scores, first.scores)
        assert "fitting again" in said[0]
    np.savez(file, scores=first.scores[1:], states=first.states)
    assert np.array_equal(upstream(log, tmp_path, say=quiet).scores, first.scores)


def test_another_log_has_another_cache_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        upstream(read_log(write_folder(tmp_path / f"files{seed}", seed=seed)), tmp_path / "cache", say=quiet)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_single_tasks_on_the_real_test_days_rank_as_well_as_in_our_experiments(tmp_path: Path) -> None:
    log = real_log()
    made, blocks = fitted(log, tmp_path)
    x, test = log.exposures, blocks == 5
    rows = np.flatnonzero(x.block == 5)
    y, user = x.valid[rows], x.user[rows]
    reward = (
        y + np.minimum(x.play_s, 60)[rows] / 60 + 0.5 * x.finish[rows] + 2 * x.like[rows] + x.comment_open[rows] + x.profile_enter[rows]
    )
    scores = made.scores[test]
    gauc = {task: group_auc(scores[:, i], y, reward + 1, user, user).mean for i, task in enumerate(TASKS)}
    assert len(group_auc(scores[:, 0], y, reward + 1, user, user).auc) == 3_354
    assert 0.620 < gauc["click"] < 0.645 and 0.625 < gauc["long_view"] < 0.645, gauc
    ranks = sum(np.argsort(np.argsort(scores[:, i])) for i in range(4))
    assert 0.625 < group_auc(ranks, y, reward + 1, user, user).mean < 0.645
