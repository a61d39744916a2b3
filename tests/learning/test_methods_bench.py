"""The benchmark of methods, made short: rows, going on after a stop, and a report from the rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods import main
from benchmarks.methods_rows import Row
from benchmarks.rows import read_rows

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
