"""`esrl evaluate`: what it says about policies that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from esrl_ray.cli.evaluate import evaluate
from esrl_ray.config import load_config
from esrl_ray.errors import SpecMismatch
from esrl_ray.policy.policy import Policy


@pytest.mark.parametrize("odd", ["policy", "against"])
def test_a_policy_of_another_spec_is_refused_by_its_own_folder(tmp_path: Path, odd: str) -> None:
    ours, other = load_config("configs/demo.yaml").spec.build(), load_config("configs/online.yaml").spec.build()
    for name in ("policy", "against"):
        Policy.static(other if name == odd else ours).save(tmp_path / name)
    folders = ["--policy", str(tmp_path / "policy"), "--against", str(tmp_path / "against")]
    result = CliRunner().invoke(evaluate, ["--log", str(tmp_path), "--config", "configs/demo.yaml", *folders])
    assert isinstance(result.exception, SpecMismatch) and result.exception.where == str(tmp_path / odd)
