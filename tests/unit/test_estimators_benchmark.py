"""The benchmark of off-policy estimates names the code behind every finished line that it reads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import estimators
from benchmarks.estimators import LOG_SEED, STAGES, Lines, main
from esrl_ray.config import Config
from esrl_ray.policy.policy import Policy

STEPS = 100


def policies(config: Config, folder: Path) -> dict[str, Policy]:
    """Two that nobody learns; the folder is left as after learning."""
    for stage in STAGES:
        (folder / f"stage-{stage}").mkdir(exist_ok=True)
    return {"control": Policy.static(config.spec.build()), "clicks": Policy.static(config.spec.build())}


def finished(policy: str, kind: str) -> dict[str, Any]:
    """What one finished line holds."""
    names = estimators.NAMES
    return {
        "world": 5,
        "log": kind,
        "seed": LOG_SEED,
        "policy": policy,
        "support": {"ess_share": 0.5, "overlap": 0.5, "inside_bounds": 0.5},
        "estimates": {name: {"mean": 1.0, "ci_low": 0.0, "ci_high": 2.0} for name in names},
        "differences": {name: [0.0, -1.0, 1.0, -0.9, 0.9] for name in names},
        "faults": [],
        "wide": [],
        "seconds": 1.0,
    }


def add_lines(work: Path, code: str, *names: str) -> None:
    lines = Lines(work / "lines.jsonl", code=code)
    for kind in ("control", "rounds"):
        for name in names:
            lines.add(f"5 {kind} {LOG_SEED} {STEPS} {name}", finished(name, kind))


def reported(work: Path, code: str, monkeypatch: pytest.MonkeyPatch, *, sessions: int) -> list[str]:
    """Lines of the report that code of this commit writes; the real value of every policy is half the number of sessions."""
    out = work / "report.md"
    options = ["--worlds", "5", "--logs", "1", "--steps", str(STEPS), "--sessions", str(sessions), "--work", str(work), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["estimators", *options])
    monkeypatch.setattr(estimators, "commit", lambda: code)
    monkeypatch.setattr(estimators, "make_policies", policies)
    monkeypatch.setattr(estimators, "play", lambda policy, config, *, seed, sessions: (np.full(sessions, sessions / 2),))
    main()
    return out.read_text().splitlines()


def test_the_report_names_the_commits_of_lines_real_values_and_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lines(tmp_path, "aaa", "control")
    add_lines(tmp_path, "bbb-dirty", "clicks")
    head = reported(tmp_path, "ccc", monkeypatch, sessions=20)[2]
    assert head.startswith("Commits aaa, bbb-dirty, ccc; 2 shared CPU cores; worlds [5], 1 logs of each kind (seeds from 200)")
    assert reported(tmp_path, "ddd", monkeypatch, sessions=20)[2] == head, "nothing was made anew"
    (tmp_path / "lines.jsonl").write_text("".join(_without_truths(tmp_path)))
    assert reported(tmp_path, "ddd", monkeypatch, sessions=20)[2].startswith("Commits aaa, bbb-dirty, ccc, ddd;"), "policies are of ccc"


def _without_truths(work: Path) -> list[str]:
    return [line for line in (work / "lines.jsonl").read_text().splitlines(keepends=True) if '"truth ' not in line]


def test_lines_of_before_commits_were_kept_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lines(tmp_path, "aaa", "control", "clicks")
    old = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    lines = [json.dumps({name: value for name, value in line.items() if name != "commit"}) for line in old]
    (tmp_path / "lines.jsonl").write_text("\n".join([*lines, '{"key": "half']))
    assert reported(tmp_path, "bbb", monkeypatch, sessions=20)[2].startswith("Commits bbb, not recorded;")


def test_real_values_of_other_numbers_of_sessions_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lines(tmp_path, "aaa", "control", "clicks")
    truths = [reported(tmp_path, "aaa", monkeypatch, sessions=n)[-1].split(" | ")[4] for n in (20, 60, 20)]
    assert truths == ["10.0", "30.0", "10.0"]
