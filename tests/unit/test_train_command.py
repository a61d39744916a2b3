"""`esrl train --log`: which logs it takes, and what it says about those that it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from esrl_ray.cli.logged import read_log
from esrl_ray.cli.train import train
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, EsrlError, InputDataError, LogError, MethodError, SpecMismatch
from esrl_ray.normaliser import mean_input
from esrl_ray.policy.policy import Policy, PolicyKind
from streaming.steptable import BULKY, step_schema
from tests.step_tables import simulated_steps, step_table, write_log

NUM_STEPS = 300


@pytest.fixture(scope="module")
def table(config: Config) -> pa.Table:
    return step_table(simulated_steps(config, NUM_STEPS))


@pytest.fixture
def parquet(table: pa.Table, tmp_path: Path) -> Path:
    path = tmp_path / "steps.parquet"
    pq.write_table(table, path)
    return path


def changed(table: pa.Table, name: str, column: pa.Array | list[object]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train, ["--config", "configs/demo.yaml", *map(str, arguments)])


def error_of(result: Result) -> EsrlError:
    assert isinstance(result.exception, EsrlError), (result.output, result.exception)
    return result.exception


def test_parquet_and_step_log_give_the_same_steps_as_the_simulator(config: Config, table: pa.Table, parquet: Path, tmp_path: Path) -> None:
    steps = simulated_steps(config, NUM_STEPS)
    root = write_log(tmp_path / "run" / "log", config, table.slice(0, 200), table.slice(200))
    for path in (parquet, root, tmp_path / "run" / "log", tmp_path / "run"):
        log = read_log(str(path), config)
        assert len(log.steps) == len(steps) and log.num_sessions == len(set(steps.sessions.tolist()))
        for name, column in steps.columns.items():
            np.testing.assert_array_equal(log.steps.columns[name], column, err_msg=name)
        np.testing.assert_array_equal(log.steps.following, steps.following)
    assert log.lineage == {"ingest-0": 1} and log.where == str(root)
    assert len(read_log(str(root), config, ["0"]).steps) == 200
    assert len(read_log(str(root), config, ["ingest-0=1"]).steps) == len(steps)
    with pytest.raises(ConfigError, match="unknown worker 'ingest-7'"):
        read_log(str(root), config, ["ingest-7=1"])


def test_held_out_users_are_left_out_and_the_others_stay_whole(config: Config, table: pa.Table, parquet: Path, tmp_path: Path) -> None:
    some = config.model_copy(update={"policy": config.policy.model_copy(update={"held_out_share": 0.5})})
    log = read_log(str(parquet), some)
    ours, theirs = log.of_users(some, held_out=False).table, log.of_users(some, held_out=True).table
    users = [set(part["user_id"].to_pylist()) for part in (ours, theirs)]
    assert len(ours) + len(theirs) == len(table) and not users[0] & users[1]
    assert set(theirs["arm"].to_pylist()) == {"explore"}, "what exploits has no noise, and tells the gate nothing"
    told = run("--log", parquet, "--method", "static", "--out", tmp_path / "out", "--set", "policy.held_out_share=0.5")
    assert told.exit_code == 0 and f"held out        {len(theirs):,} steps" in told.output
    nobody = config.model_copy(update={"policy": config.policy.model_copy(update={"held_out_share": 1e-9})})
    with pytest.raises(LogError, match="none is of a user held out"):
        log.of_users(nobody, held_out=True)


def test_parquet_in_another_order_or_with_later_revisions_gives_the_same_steps(config: Config, table: pa.Table, tmp_path: Path) -> None:
    known = read_log(_written(tmp_path / "a.parquet", table), config).steps
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    again = read_log(_written(tmp_path / "b.parquet", shuffled), config).steps
    np.testing.assert_array_equal(again.columns["states"], known.columns["states"])
    np.testing.assert_array_equal(again.following, known.following)

    wide = changed(table, "states", table["states"].cast(pa.large_list(pa.float32())))  # as other writers have it
    np.testing.assert_array_equal(read_log(_written(tmp_path / "d.parquet", wide), config).steps.columns["states"], known.columns["states"])

    without = read_log(_written(tmp_path / "e.parquet", table.drop_columns(["candidate_means"])), config).steps  # as older logs are
    over_logged = mean_input(*(known.columns[name] for name in ("states", "scores", "valid")))
    np.testing.assert_array_equal(without.columns["candidate_means"], over_logged)
    assert (known.columns["candidate_means"] != over_logged).any()

    last = table.slice(0, 1).to_pylist()[0]
    later = {**last, "revision": 1, "rewards": [9.0] * len(last["rewards"]), **dict.fromkeys(BULKY)}
    revised = pa.concat_tables([table, pa.Table.from_pylist([later], schema=step_schema())])
    merged = read_log(_written(tmp_path / "c.parquet", revised), config).steps
    assert len(merged) == len(known)
    assert (merged.columns["rewards"][0] == 9).all() and (known.columns["rewards"][0] != 9).any()


def _written(path: Path, table: pa.Table) -> str:
    pq.write_table(table, path)
    return str(path)


def test_what_is_not_a_log_is_refused_with_the_reason(config: Config, table: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="there is nothing there"):
        read_log(str(tmp_path / "absent"), config)
    with pytest.raises(LogError, match="there is no step log"):
        read_log(str(tmp_path), config)
    (tmp_path / "text.txt").write_text("steps")
    with pytest.raises(InputDataError, match="not Parquet"):
        read_log(str(tmp_path / "text.txt"), config)
    root = write_log(tmp_path / "one" / "log", config, table)
    with pytest.raises(LogError, match=r"one ingest worker.*name the folder above it"):
        read_log(str(root / "ingest-0"), config)
    other = load_config("configs/online.yaml")
    digests = f"is of spec {config.spec.build().digest}, the configuration's is {other.spec.build().digest}"
    for path in (root, tmp_path / "one"):
        with pytest.raises(SpecMismatch, match=digests):
            read_log(str(path), other)
    empty = write_log(tmp_path / "two" / "log", config, step_schema().empty_table())
    with pytest.raises(LogError, match="holds no steps"):
        read_log(str(empty), config)
    with pytest.raises(LogError, match="holds no steps up to ingest-0@0"):
        read_log(str(empty), config, ["0"])


def test_a_table_that_does_not_fit_the_deployment_is_refused_with_the_column(config: Config, table: pa.Table, tmp_path: Path) -> None:
    path, k = str(tmp_path / "steps.parquet"), len(table)
    states = table["states"].combine_chunks()
    broken = states.values.to_numpy().copy()
    broken[7] = np.nan
    nan = pa.ListArray.from_arrays(states.offsets, pa.array(broken))
    means = np.zeros((k, 23), np.float32)
    means[3, 5] = np.inf
    odd = pa.array(list(means), pa.list_(pa.float32()))
    cases = [
        (table.slice(0, 0), "no steps"),
        (table.drop_columns(["anchor_actions"]), "column 'anchor_actions' is missing"),
        (changed(table, "user_id", pa.array(np.arange(k))), "column 'user_id' is int64"),
        (changed(table, "event_time_ms", pa.array([None] * k, pa.int64())), "column 'event_time_ms' is int64 with"),
        (changed(table, "states", pa.array(["x"] * k)), "column 'states' is string, expected a list of float32"),
        (changed(table, "arm", pa.array(["b"] * k)), r"column 'arm' holds 'b', expected one of \[.*explore"),
        (changed(table, "scores", table["rewards"]), "scores of step step-0 has 30 values for 15 pairs, expected 5 per pair"),
        (changed(table, "states", nan), "states of 1 steps are not finite"),
        (changed(table, "candidate_means", table["scores"]), "candidate_means of a step has 75 values, expected 23"),
        (changed(table, "candidate_means", table["shown"]), "column 'candidate_means' is list<.*bool>, expected a list of float32"),
        (changed(table, "candidate_means", odd), "candidate_means of 1 steps are not finite"),
        (pa.concat_tables([table, table]).drop_columns(["revision"]), "rows have the step_id of another"),
    ]
    for bad, text in cases:
        pq.write_table(bad, path)
        with pytest.raises(InputDataError, match=text):
            read_log(path, config)
    pq.write_table(table, path)
    with pytest.raises(InputDataError, match=r"expected 8 per pair \(spec features\).*use the configuration"):
        read_log(path, load_config("configs/online.yaml"))


def test_a_code_beyond_its_cardinality_is_refused(config: Config, table: pa.Table, tmp_path: Path) -> None:
    coded = load_config("configs/demo.yaml", ["spec.categorical_features=[{name: tab, cardinality: 4, side: context}]"])
    flat = np.zeros(len(table) * 15, np.int32)
    flat[20] = 4
    column = pa.ListArray.from_arrays(pa.array(np.arange(len(table) + 1, dtype=np.int32) * 15), pa.array(flat))
    path = _written(tmp_path / "coded.parquet", changed(table, "categorical", column))
    with pytest.raises(InputDataError, match=r"code 4 of feature 'tab' is not in 0\.\.3"):
        read_log(path, coded)


def test_an_unknown_method_names_the_nearest_and_all(parquet: Path) -> None:
    error = error_of(run("--log", parquet, "--method", "enhancdrl"))
    assert isinstance(error, MethodError)
    assert "nearest: enhancedrl" in str(error) and "static" in str(error)


def test_options_for_learning_offline_need_a_log() -> None:
    result = run("--method", "static")
    assert result.exit_code == 2 and "--method is for learning offline: name the log with --log" in result.output


def test_any_method_learns_from_a_log_and_its_folder_is_not_overwritten(parquet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--log", parquet, "--method", "static", "--out", out, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "method          static, seed 3" in result.output and f"policy          {out}/policy" in result.output
    assert Policy.load(out / "policy").manifest.kind is PolicyKind.STATIC
    assert "holds a policy" in str(error_of(run("--log", parquet, "--method", "static", "--out", out)))
    assert "there is no run to go on with" in str(error_of(run("--log", parquet, "--out", tmp_path / "none", "--resume")))
    assert "static keeps no checkpoints" in str(error_of(run("--log", parquet, "--method", "static", "--out", out, "--resume")))
