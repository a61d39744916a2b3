"""`esrl policy` on the files of a run without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from esrl_ray.algo.actor import make_actor
from esrl_ray.cli.policy import policy_group
from esrl_ray.config import load_config
from esrl_ray.errors import EsrlError, InputDataError, LogError, PolicyRejected
from esrl_ray.evaluation.second_tier import load_verdict
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.policy.store import PolicyStore, read_snapshot, version_folder
from esrl_ray.policy.store_actor import own
from streaming.steplog import StepLog, WorkerState
from tests.step_tables import simulated_steps, step_table

ROOT = Path(__file__).parents[2]
HELD_OUT = ["policy.second_tier=block", "policy.held_out_share=0.4"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = load_config(ROOT / "configs/demo.yaml", [f"run.dir={tmp_path}"])
    PolicyStore(tmp_path / "policies", config, clock_ms=lambda: 5)
    return tmp_path


def esrl_policy(run: Path, *arguments: str) -> Result:
    deployment = ["--config", str(ROOT / "configs/demo.yaml"), "--set", f"run.dir={run}"]
    return CliRunner().invoke(policy_group, [*arguments, *deployment], catch_exceptions=False)


def test_pin_static_and_unpin_on_the_files(run: Path) -> None:
    assert "version 2 is pinned" in esrl_policy(run, "pin", "static").output
    assert read_snapshot(run / "policies").pinned
    assert "PINNED" in esrl_policy(run, "list").output
    assert "not pinned; version 2 serves" in esrl_policy(run, "unpin").output
    assert not read_snapshot(run / "policies").pinned


def test_rollback_lists_the_new_version_with_its_reason(run: Path) -> None:
    assert "version 2 serves the parameters of 1" in esrl_policy(run, "rollback", "1").output
    lines = esrl_policy(run, "list").output.splitlines()
    assert lines[0].startswith("* ") and "rollback to 1" in lines[0] and lines[1].startswith(" a") and len(lines) == 3
    assert len(esrl_policy(run, "list", "--last", "1").output.splitlines()) == 2


def test_a_policy_from_elsewhere_serves_and_is_the_anchor_of_the_next_round(run: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    learner, spec = config.learner, config.spec.build()
    actor = make_actor(spec, learner.hidden_sizes, learner.embedding_size)
    made = Manifest(
        version=0,
        digest="",
        kind=PolicyKind.PAIR,
        spec=spec,
        hidden_sizes=learner.hidden_sizes,
        embedding_size=learner.embedding_size,
        gradient_steps=7,
    )
    parameters = {name: value.numpy() for name, value in actor.state_dict().items()}
    Policy.of(made, parameters, Normaliser.identity(spec)).save(tmp_path / "trained")
    assert "version 2 serves, and is the anchor of round 1" in esrl_policy(run, "publish", str(tmp_path / "trained")).output
    snapshot = read_snapshot(run / "policies")
    assert (snapshot.round.number, snapshot.round.anchor_version, snapshot.round.low) == (1, 2, config.exploration.low)
    assert Policy.from_bytes(snapshot.current).manifest.gradient_steps == Policy.from_bytes(snapshot.anchor).manifest.gradient_steps == 7
    with pytest.raises(PolicyRejected, match=r"its actor is .*a learner of this deployment has \('pair', \(8,\)"):
        esrl_policy(run, "publish", str(tmp_path / "trained"), "--set", "learner.hidden_sizes=[8]")
    with pytest.raises(PolicyRejected, match="there is no such run"):
        esrl_policy(tmp_path / "nowhere", "publish", str(tmp_path / "trained"))
    assert not (tmp_path / "nowhere").exists()
    esrl_policy(run, "pin", "static")
    with pytest.raises(PolicyRejected, match="version 3 is pinned"):
        esrl_policy(run, "publish", str(tmp_path / "trained"))


def test_a_run_without_policies_begins_with_the_one_that_is_brought(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    Policy.static(config.spec.build(), np.full(config.spec.build().num_actions, 0.1, np.float32)).save(tmp_path / "searched")
    assert "version 2 serves, and is the anchor of round 1" in esrl_policy(tmp_path, "publish", str(tmp_path / "searched")).output


def test_show_prints_the_manifest(run: Path) -> None:
    result = esrl_policy(run, "show", "1")
    assert json.loads(result.stdout)["kind"] == "static" and "whole" in result.stderr


def test_judge_reads_the_runs_log_and_keeps_a_verdict_that_show_prints(run: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/demo.yaml", [f"run.dir={tmp_path}", *HELD_OUT])
    spec = config.spec.build()
    store = PolicyStore(tmp_path / "policies", config, clock_ms=lambda: 6)
    version = store.publish(Policy.static(spec, np.full(spec.num_actions, 0.1, np.float32)).to_bytes(), None)
    assert "second tier: not judged" in esrl_policy(run, "show", str(version)).stderr
    arguments = [argument for override in HELD_OUT for argument in ("--set", override)]
    assert "no held-out explore users; against version 1" in esrl_policy(run, "judge", str(version), *arguments).stdout

    table = step_table(simulated_steps(config, 600))
    log = StepLog(config.log_root, "ingest-0", "one", spec)
    log.commit(WorkerState(commit=0, incarnation="one", positions={}, joiners={}, committed_ms=1), table)
    said = esrl_policy(run, "judge", str(version), *arguments).stdout
    assert said.startswith("second tier: abstain: too little support: ") and "against version 1" in said
    assert said.strip() in esrl_policy(run, "show", str(version)).stderr
    verdict = load_verdict(version_folder(tmp_path / "policies", version))
    assert verdict is not None and verdict.rule.unseen and 0 < verdict.lists < 300 and verdict.times_ms[1] > verdict.times_ms[0] > 0
    assert verdict.candidate == store.load(version).manifest.digest

    parquet = tmp_path / "parquet" / "steps.parquet"
    parquet.parent.mkdir()
    pq.write_table(table, parquet)
    other = esrl_policy(run, "judge", "1", "--against", str(version), "--log", str(parquet), *arguments)
    assert f"against version {version}" in other.stdout
    assert "is the anchor" in esrl_policy(run, "judge", "1").output

    for path in (tmp_path, tmp_path / "log", Path(config.log_root), parquet.parent):
        assert esrl_policy(run, "judge", str(version), "--log", str(path), *arguments).stdout == said
    with pytest.raises(LogError, match="there is no step log"):
        esrl_policy(run, "judge", str(version), "--log", str(tmp_path / "policies"), *arguments)
    for name in ("index", "num_candidates"):
        pq.write_table(table.drop_columns([name]), parquet)
        with pytest.raises(InputDataError, match=f"column '{name}' is missing"):
            esrl_policy(run, "judge", str(version), "--log", str(parquet), *arguments)


def test_a_version_that_does_not_exist_is_refused(run: Path) -> None:
    with pytest.raises(PolicyRejected):
        esrl_policy(run, "show", "9")
    with pytest.raises(PolicyRejected):
        esrl_policy(run, "pin", "9")
    assert "neither a number nor 'static'" in esrl_policy(run, "pin", "newest").output
    assert Policy.from_bytes(read_snapshot(run / "policies").current).version == 1


def test_a_folder_without_policies_is_an_error_and_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match="no policy has been published"):
        esrl_policy(tmp_path, "pin", "static")
    assert not list(tmp_path.iterdir())


def test_files_of_a_running_store_are_not_touched(run: Path) -> None:
    """Nobody answers at the address that is named: the command says so instead of changing files under a running store."""
    before = read_snapshot(run / "policies")
    with own(run / "policies") as owned, pytest.raises(EsrlError, match="no policy store answers"):
        assert owned
        esrl_policy(run, "pin", "static", "--address", "127.0.0.1:1")
    assert read_snapshot(run / "policies") == before
