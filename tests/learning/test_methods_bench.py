"""The benchmark of methods, made short: rows, going on after a stop, and a report from the rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.methods import Forgetful, configure, main
from benchmarks.methods_rows import METHODS, Row
from benchmarks.rows import read_rows
from esrl_ray.methods.catalogue import create_method
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.simulation.rounds import SimulatedTraffic

SHORT = ["--worlds", "1", "--seeds", "0", "--steps", "2500", "--sessions", "60", "--jobs", "1"]


def test_finished_rows_are_kept_and_missing_ones_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "methods.jsonl"
    main([*SHORT, "--methods", "static,cem", "--out", str(out)])
    first = out.read_bytes()
    main([*SHORT, "--methods", "static,cem,enhancedrl,oracle-instant", "--out", str(out)])
    assert "2 rows are there, 2 are missing" in capsys.readouterr().out
    assert out.read_bytes().startswith(first)
    rows = {row.method: row for row in read_rows(out, Row)}
    assert set(rows) == {"static", "cem", "enhancedrl", "oracle-instant"}
    for row in rows.values():
        assert (row.world, row.seed, row.num_steps, row.sessions) == (1, 0, 2500, 60)
        assert row.ci_low < row.reward < row.ci_high and row.pages >= 1
        assert [point.num_steps for point in row.curve] == ([] if row.method == "oracle-instant" else [row.curve[-1].num_steps])
    assert rows["enhancedrl"].gradient_steps > 0 == rows["static"].gradient_steps
    report = out.with_suffix(".md").read_text()
    assert "on 60 unseen sessions" in report and all(f"| {name} | 1 |" in report for name in rows)
    assert out.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, "--methods", "sarsa", "--out", str(tmp_path / "rows.jsonl")])
    assert "no methods ['sarsa']; there are static, enhancedrl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def seen_by(name: str) -> Steps:
    """What the method of this name gets to learn from, of two rounds of 500 lists each."""
    config, seen = configure(name, world=1), list[Steps]()
    method, traffic = create_method("static", config, seed=0), SimulatedTraffic(config, seed=0, capacity=1000)
    for number in range(2):
        for _ in traffic.serve(method.exploration(), Policy.static(config.spec.build()), until=500 * (number + 1), number=number):
            pass
    if (forget := METHODS[name].forget) is None:
        return traffic.steps
    served = method.fit

    class Watched:
        name, exploration = "watched", method.exploration

        def fit(self, steps: Steps) -> Policy:
            seen.append(steps)
            return served(steps)

    Forgetful(Watched(), forget).fit(traffic.steps)
    return seen[0]


def test_a_variant_does_not_see_what_it_is_to_forget() -> None:
    names = ("enhancedrl", "enhancedrl-logged-means", "enhancedrl-pooled")
    everything, logged, pooled = (dict[str, Any](seen_by(name).transitions(np.arange(1000), horizon=4)) for name in names)
    of_logged = np.concatenate([everything["states"], np.log(everything["scores"])], -1).mean(1)
    assert np.allclose(logged["candidate_means"], of_logged, atol=1e-4)
    assert not np.allclose(everything["candidate_means"], of_logged, atol=1e-2)
    assert [len(np.unique(columns["cohort"])) for columns in (everything, logged, pooled)] == [2, 2, 1]
    for name in set(everything) - {"candidate_means", "cohort", "future_change"}:
        assert np.array_equal(everything[name], logged[name]) and np.array_equal(everything[name], pooled[name]), name
