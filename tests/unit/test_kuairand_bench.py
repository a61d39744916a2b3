"""The offline bench on a small synthetic log: splits, planting, rounds of exploration, comparison, resuming; the data need not be there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.kuairand import QUICK, QUICK_LAYERS, Effort, run
from benchmarks.kuairand_methods import RL, SETTINGS, Gain, cem, compare, fixed, mean_gain, supervised
from benchmarks.kuairand_report import Row, checks, reference_of, report, warnings
from benchmarks.rows import read_rows
from esrl_ray.config import Config, load_config
from esrl_ray.evaluation.metrics import group_auc, policy_scores
from esrl_ray.methods.method import Exploration
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.replay.steps import LEFT, Steps
from esrl_ray.simulation.kuairand_bench import Bench, explore, permute_rewards, plant, read_bench, with_control
from tests.unit.test_kuairand_data import tables, write_folder

CONFIG = Path(__file__).parents[2] / "configs" / "kuairand.yaml"


def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with a random-exposure log; `cache` inside holds its upstream scores."""
    folder = write_folder(tmp_path_factory.mktemp("bench"))
    chance = tables(seed=1)["log_standard_small"].slice(0, 400)
    pq.write_table(chance, folder / "log_random_small.parquet")
    return folder


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    """The small world."""
    return read_bench(configured(), folder, cache=folder / "cache", say=quiet)


def configured(*more: str) -> Config:
    """The deployment with the settings of the benchmark."""
    return load_config(CONFIG, [*SETTINGS, *more])


def gauc(bench: Bench, powers: np.ndarray) -> float:
    """GAUC on train of a vector of powers."""
    train = bench.train
    scores = np.log(train.scores + bench.config.spec.bias_base) @ powers
    return group_auc(scores, train.labels, train.weights, train.groups["user_block"], train.user).mean


def test_splits_do_not_share_a_user_block_and_lists_are_candidates_of_one_unit(bench: Bench) -> None:
    units = [set(split.groups["user_block"].tolist()) for split in (bench.train, bench.dev, bench.test)]
    assert all(units) and not units[0] & units[1] and not units[1] & units[2] and not units[0] & units[2]
    assert len(bench.behaviours) == len(bench.train.labels)
    unit = bench.train.groups["user_block"]
    for rows in bench.lists:
        real = rows[rows >= 0]
        assert 2 <= len(real) <= 8 and len(set(unit[real].tolist())) == 1


def test_user_features_are_frozen_within_a_unit_so_that_a_scorer_of_users_cannot_gain(bench: Bench) -> None:
    width = len(bench.config.spec.user_features)
    for split in (bench.train, bench.dev, bench.test):
        _, first, unit = np.unique(split.groups["user_block"], return_index=True, return_inverse=True)
        assert np.array_equal(split.states[:, :width], split.states[first][unit][:, :width])
    scores = fixed("user-only", bench)(bench.test)
    assert len(np.unique(scores)) > 1
    own, _ = compare(scores, scores, bench.test)
    assert own.mean == pytest.approx(0.5)
    leaking = scores + 1e-3 * bench.test.labels
    assert compare(leaking.astype(np.float32), scores, bench.test)[0].mean > 0.9


def test_random_exposures_are_those_of_the_last_four_days_of_the_random_log(bench: Bench, folder: Path) -> None:
    assert bench.random is not None
    dates = pq.read_table(folder / "log_random_small.parquet")["date"].to_numpy()
    assert len(bench.random.labels) == int((dates >= 20220503).sum()) > 0


def test_a_folder_without_a_random_log_has_no_random_exposures(tmp_path: Path, folder: Path) -> None:
    for file in folder.glob("*small.parquet"):
        if not file.name.startswith("log_random"):
            (tmp_path / file.name).symlink_to(file)
    assert read_bench(configured(), tmp_path, cache=folder / "cache", say=quiet).random is None


@pytest.mark.parametrize("by", ["item", "user"])
def test_planting_replaces_one_half_of_the_scores_here_and_the_other_half_there(bench: Bench, by: str) -> None:
    planted = plant(bench, "item" if by == "item" else "user", seed=0)
    changed = planted.train.scores != bench.train.scores
    even = np.arange(bench.config.spec.build().num_scores) % 2 == 0
    first, second = changed[:, even].any(1), changed[:, ~even].any(1)
    assert not (first & second).any() and first.any() and second.any()
    assert np.allclose(np.sort(planted.train.states, axis=0), np.sort(bench.train.states, axis=0))
    assert set(planted.train.scores[:, 0].tolist()) <= set(bench.train.scores[:, 0].tolist())
    tag, age = planted.train.categorical[:, 1], planted.train.states[:, list(bench.config.spec.user_features).index("register")]
    key = tag if by == "item" else age > np.median(age)
    halves = [set(np.asarray(key)[rows].tolist()) for rows in (first, second)]
    assert not halves[0] & halves[1]


def test_permuted_rewards_are_the_same_facts_at_other_exposures(bench: Bench) -> None:
    permuted = permute_rewards(bench, seed=0).behaviours
    assert not np.array_equal(permuted, bench.behaviours)
    assert np.allclose(permuted.sum(0), bench.behaviours.sum(0), rtol=1e-4)


def explored(bench: Bench, *, permute_actions: bool = False) -> Steps:
    """One round around the control policy."""
    width = bench.config.spec.build().num_actions
    steps = Steps(bench.config, len(bench.lists))
    noise = Exploration(Policy.static(bench.config.spec.build()), np.full(width, -0.15, np.float32), np.full(width, 0.15, np.float32))
    explore(bench, noise, steps, np.random.default_rng(0), number=3, permute_actions=permute_actions)
    return steps


def test_a_round_shows_the_upper_half_of_each_list_and_uncovers_only_what_was_logged_for_it(bench: Bench) -> None:
    steps = explored(bench)
    c, valid = steps.columns, bench.lists >= 0
    assert len(steps) == len(bench.lists) and (steps.following == LEFT).all() and (steps.rounds == 3).all()
    assert np.array_equal(c["valid"] > 0, valid)
    assert np.array_equal(c["shown"].sum(1), valid.sum(1) // 2)
    shown = c["shown"] > 0
    assert np.allclose(c["behaviours"][shown], bench.behaviours[bench.lists][shown])
    assert not c["rewards"][~shown].any() and c["rewards"][shown].any()
    assert (np.abs(c["actions"] - c["anchor_actions"])[valid] <= 0.15).all() and c["actions"][valid].std() > 0.05
    assert not c["states"][~valid].any() and (c["scores"][~valid] == 1).all()


def test_permuted_actions_belong_to_other_pairs_and_change_nothing_else(bench: Bench) -> None:
    own, permuted = explored(bench).columns, explored(bench, permute_actions=True).columns
    assert np.array_equal(own["shown"], permuted["shown"]) and np.array_equal(own["rewards"], permuted["rewards"])
    assert not np.array_equal(own["actions"], permuted["actions"])
    assert np.allclose(np.sort(own["actions"], axis=None), np.sort(permuted["actions"], axis=None))


def test_the_cross_entropy_vector_beats_control_on_train_and_becomes_the_control_of_the_bench(bench: Bench) -> None:
    powers = cem(bench, seed=0, rounds=3, population=20)
    assert gauc(bench, powers) > gauc(bench, np.array(bench.config.spec.power_base))
    moved = with_control(bench, powers)
    assert np.allclose(moved.config.spec.build().power_base, powers)
    expected = np.log(bench.test.scores + bench.config.spec.bias_base) @ powers
    assert np.allclose(policy_scores(Policy.static(moved.config.spec.build()), moved.test), expected, atol=1e-4)


def test_a_paired_difference_of_a_ranking_from_itself_is_zero_and_tab_means_are_of_train_only(bench: Bench) -> None:
    scores = fixed("long_view", bench)(bench.test)
    own, difference = compare(scores, scores, bench.test)
    assert own.low < own.mean < own.high and (difference.mean, difference.low, difference.high) == (0, 0, 0)
    flipped = replace(bench, test=replace(bench.test, labels=1 - bench.test.labels))
    assert np.array_equal(fixed("tab", bench)(bench.test), fixed("tab", flipped)(bench.test))


def test_supervised_weights_stay_within_their_width_and_learn_labels_that_a_feature_gives_away(bench: Bench) -> None:
    planted = plant(bench, "item", seed=0)
    policy = supervised(planted, level=PolicyKind.PAIR, width=1.0, seed=0, steps=60)
    assert policy.spec.power_span == bench.config.spec.power_span
    narrow = supervised(planted, level=PolicyKind.PAIR, width=0.15, seed=0, steps=2)
    assert narrow.spec.power_span == pytest.approx(0.15 * bench.config.spec.power_span)
    control = policy_scores(Policy.static(bench.config.spec.build()), planted.train)
    assert compare(policy_scores(policy, planted.train), control, planted.train)[1].mean > 0.0


def test_every_method_runs_and_a_second_call_measures_nothing_again(bench: Bench, tmp_path: Path) -> None:
    path, effort = tmp_path / "rows.jsonl", Effort(rounds=2, steps=10, supervised_steps=6, cem_rounds=1)
    layers = {"real": ("user-only", "cem"), "item": ("supervised", *RL)}
    ran = run(bench, path, layers=layers, seeds=[0], effort=effort, commit="c", limit_s=1e9)
    assert [(r.layer, r.method) for r in ran] == [(layer, m) for layer, methods in layers.items() for m in methods]
    learnt = {r.method: r for r in ran if r.layer == "item"}
    assert all(learnt[m].gradient_steps == 20 and learnt[m].gated_round in (0, 1, 2) for m in RL)
    before = path.read_bytes()
    assert run(bench, path, layers=layers, seeds=[0], effort=effort, commit="c", limit_s=1e9) == ran == read_rows(path, Row)
    assert path.read_bytes() == before
    assert len(run(bench, path, layers=layers, seeds=[0, 1], effort=effort, commit="c", limit_s=0)) == len(ran)
    text = report(ran)
    assert "| enhancedrl-split |" in text and "no evidence" in text


def row(layer: str, method: str, gain: float, *, seed: int = 0, half: float = 0.005, level: float = 0.6, passed: int = 0) -> Row:
    """A finished run."""
    interval = Gain(gain, gain - half, gain + half)
    absolute = Gain(level, level - 0.01, level + 0.01)
    return Row(layer, method, seed, False, absolute, absolute, interval, interval, None, passed, interval, 1, 1.0, "c", "m")


def test_thresholds_are_kept_by_good_rows_and_missed_by_bad_ones() -> None:
    name = next(iter(RL))
    good = [row("item", name, 0.02, seed=s) for s in range(3)] + [row("item", "supervised", 0.02)]
    good += [row("item", f"{name}/permuted-rewards", -0.004)]
    assert all(c.kept for c in checks(good)) and len(list(checks(good))) == 7
    weak = [row("item", name, g, seed=s) for s, g in enumerate((0.02, 0.02, 0.007))] + [row("item", "supervised", 0.03)]
    assert [c.kept for c in checks(weak)] == [True, False, True, False]
    leaking = [row("item", name, 0.02), row("item", f"{name}/permuted-rewards", 0.006, passed=1)]
    assert [c.kept for c in checks(leaking)][-3:] == [False, False, False]
    assert [c.kept for c in checks([row("real", name, -0.009)])] == [False]
    assert [c.kept for c in checks([row("real", "user-only", 0.0, level=0.51)])] == [False]


def test_where_control_ranks_above_the_searched_vector_gains_are_over_control() -> None:
    name = next(iter(RL))
    over = [
        msgspec.structs.replace(row("user", name, 0.02, seed=s), gain_control=Gain(g, g - 0.005, g + 0.005))
        for s, g in enumerate((0.01, 0.015))
    ]
    rows = [*over, row("user", "cem", 0.0, level=0.6), row("user", "control", 0.01, level=0.61)]
    assert reference_of(rows, "user") == "control" and reference_of(rows[:3], "user") == "CEM"
    found = list(checks(rows))
    assert [c.kept for c in found] == [True, True, True] and "mean +0.0125 over control" in found[0].text
    assert "| +0.0200, +0.0200 | +0.0125 [" in report(rows)


def test_a_real_result_that_is_too_good_is_a_warning() -> None:
    name = next(iter(RL))
    assert not list(warnings([row("real", name, 0.0, level=0.645), row("item", name, 0.0, level=0.7)]))
    assert "leak" in next(iter(warnings([row("real", name, 0.01, level=0.6451)])))


def test_the_interval_of_the_mean_over_seeds_holds_their_spread_as_well() -> None:
    # Seeds +-1 around 2: variance 2, of their mean 1. 1.96 beside the users' 1 below and 2 above.
    found = mean_gain([Gain(1.0, 0.0, 3.0), Gain(3.0, 2.0, 5.0)])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - (1 + 1.96**2) ** 0.5, 2 + (4 + 1.96**2) ** 0.5))
    assert mean_gain([Gain(1.0, 0.0, 3.0)] * 2) == Gain(1.0, 0.0, 3.0)


def test_the_quick_mode_is_a_part_of_the_whole() -> None:
    assert set(QUICK_LAYERS) <= {"real", "item", "user"}
    assert QUICK.rounds * QUICK.steps < Effort().rounds * Effort().steps
