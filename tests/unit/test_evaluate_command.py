"""`esrl evaluate`: what it prints of a log, whom it judges by, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from esrl_ray.cli.evaluate import evaluate
from esrl_ray.config import Config, load_config
from esrl_ray.errors import InputDataError, MethodError, SpecMismatch
from esrl_ray.policy.policy import Policy
from tests.step_tables import write_log
from tests.two_items import ALWAYS_B, LEAVES, REWARDS, log_of, table_of, two_items, vector


@pytest.fixture(scope="module")
def setting() -> Config:
    return two_items()


@pytest.mark.parametrize("odd", ["policy", "against"])
def test_a_policy_of_another_spec_is_refused_by_its_own_folder(tmp_path: Path, odd: str) -> None:
    ours, other = load_config("configs/demo.yaml").spec.build(), load_config("configs/online.yaml").spec.build()
    for name in ("policy", "against"):
        Policy.static(other if name == odd else ours).save(tmp_path / name)
    folders = ["--policy", str(tmp_path / "policy"), "--against", str(tmp_path / "against")]
    result = CliRunner().invoke(evaluate, ["--log", str(tmp_path), "--config", "configs/demo.yaml", *folders])
    assert isinstance(result.exception, SpecMismatch) and result.exception.where == str(tmp_path / odd)


def test_the_command_prints_estimates_of_a_parquet_log_as_json(setting: Config, tmp_path: Path) -> None:
    log, policy, yaml = tmp_path / "steps.parquet", tmp_path / "policy", tmp_path / "two.yaml"
    pq.write_table(table_of(log_of(setting, REWARDS, LEAVES, sessions=700, seed=3)), log)
    vector(setting, ALWAYS_B).save(policy)
    yaml.write_text(json.dumps(setting.model_dump(include={"spec", "serve", "reward", "exploration"}, mode="json")))
    result = CliRunner().invoke(
        evaluate, ["--log", str(log), "--policy", str(policy), "--config", str(yaml), "--updates", "0", "--label", "click>0.5", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["policy"]["estimates"]["fqe"]["mean"] == pytest.approx(4.0, rel=0.2)
    # Control shows either item half of the time: .6 / .275 = 2.18, so that the difference is 1.82.
    assert report["difference"]["fqe"]["mean"] == pytest.approx(1.82, abs=0.8)
    assert report["difference"]["fqe"]["ci_low"] < 1.82 < report["difference"]["fqe"]["ci_high"]
    assert report["mtf_gauc"]["user"][0]["gauc"] is not None


def test_the_command_judges_by_held_out_users_and_warns_where_there_are_none(setting: Config, tmp_path: Path) -> None:
    log, policy, yaml = tmp_path / "steps.parquet", tmp_path / "policy", tmp_path / "two.yaml"
    pq.write_table(table_of(log_of(setting, REWARDS, LEAVES, sessions=1500, seed=3, spread=0.5)), log)
    vector(setting, ALWAYS_B).save(policy)
    yaml.write_text(json.dumps(setting.model_dump(include={"spec", "serve", "reward", "exploration"}, mode="json")))
    rest = ["--log", str(log), "--policy", str(policy), "--config", str(yaml), "--updates", "0", "--label", "click>0.5", "--json"]
    sessions, warnings = [], []
    for more in ([], ["--set", "policy.held_out_share=0.5"], ["--set", "policy.held_out_share=0.5", "--all-users"]):
        result = CliRunner().invoke(evaluate, [*rest, *more])
        assert result.exit_code == 0, (result.output, result.exception)
        report = json.loads(result.stdout)
        sessions.append(report["policy"]["support"]["sessions"])
        warnings.append(report["warning"])
    assert 600 < sessions[1] < 900 and sessions[0] == sessions[2] >= 1495
    assert warnings[1] is None and "policy.held_out_share" in warnings[0] and warnings[0] == warnings[2]
    told = CliRunner().invoke(evaluate, rest[:-1])
    assert "WARNING: judged by all users of the log" in told.output


def test_the_command_reads_a_runs_folder_and_names_a_missing_column(setting: Config, tmp_path: Path) -> None:
    rows, policy, yaml = (
        table_of(log_of(setting, REWARDS, LEAVES, sessions=1500, seed=3, spread=0.5)),
        tmp_path / "policy",
        tmp_path / "two.yaml",
    )
    write_log(tmp_path / "run" / "log", setting, rows.slice(0, 2000), rows.slice(2000))
    pq.write_table(rows.drop_columns(["num_candidates"]), tmp_path / "steps.parquet")
    vector(setting, ALWAYS_B).save(policy)
    yaml.write_text(json.dumps(setting.model_dump(include={"spec", "serve", "reward", "exploration"}, mode="json")))
    rest = ["--policy", str(policy), "--config", str(yaml), "--updates", "0", "--label", "click>0.5", "--json"]
    result = CliRunner().invoke(evaluate, ["--log", str(tmp_path / "run"), *rest])
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["policy"]["support"]["sessions"] == pytest.approx(1500, abs=5)
    result = CliRunner().invoke(evaluate, ["--log", str(tmp_path / "run"), "--as-of", "0", *rest])
    assert 300 < json.loads(result.stdout)["policy"]["support"]["sessions"] < 1400, "the first commit has 2,000 steps"
    result = CliRunner().invoke(evaluate, ["--log", str(tmp_path / "steps.parquet"), *rest])
    assert isinstance(result.exception, InputDataError) and "num_candidates" in str(result.exception)


def test_the_command_refuses_a_log_that_is_too_small_with_the_reason(setting: Config, tmp_path: Path) -> None:
    log, policy, yaml = tmp_path / "steps.parquet", tmp_path / "policy", tmp_path / "two.yaml"
    pq.write_table(table_of(log_of(setting, REWARDS, LEAVES, sessions=40, seed=3)), log)
    vector(setting, ALWAYS_B).save(policy)
    yaml.write_text(json.dumps(setting.model_dump(include={"spec", "serve", "reward", "exploration"}, mode="json")))
    result = CliRunner().invoke(evaluate, ["--log", str(log), "--policy", str(policy), "--config", str(yaml), "--updates", "0"])
    assert isinstance(result.exception, MethodError)
    assert "sessions 40, at least 300 needed" in str(result.exception)
    assert "refused fqe of policy" in result.output
