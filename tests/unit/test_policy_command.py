"""`esrl policy` on the files of a run without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from esrl_ray.cli.policy import policy_group
from esrl_ray.config import load_config
from esrl_ray.errors import EsrlError, PolicyRejected
from esrl_ray.policy.policy import Policy
from esrl_ray.policy.store import PolicyStore, read_snapshot
from esrl_ray.policy.store_actor import own

ROOT = Path(__file__).parents[2]


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


def test_show_prints_the_manifest(run: Path) -> None:
    result = esrl_policy(run, "show", "1")
    assert json.loads(result.stdout)["kind"] == "static" and "whole" in result.stderr


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
