"""What benchmarks leave behind: finished rows survive a writer that was killed in the middle of one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.rows import append_row, read_rows
from esrl_ray.errors import InputDataError


class Row(msgspec.Struct, frozen=True):
    name: str
    value: int = 0


ROWS = [Row("a", 1), Row("b", 2), Row("c", 3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        append_row(path, row)
    return path


def test_rows_come_back_and_no_file_has_none(path: Path, tmp_path: Path) -> None:
    assert read_rows(path, Row) == ROWS
    assert read_rows(tmp_path / "none.jsonl", Row) == []


def test_a_last_line_cut_anywhere_loses_at_most_itself_and_the_next_row_starts_a_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        kept = ROWS if cut == 1 else ROWS[:2]  # but for its end the row is whole
        assert read_rows(path, Row) == kept
        assert ("rows.jsonl, line 3 is half-written" in capsys.readouterr().out) == (1 < cut < last)
        append_row(path, Row("d", 4))
        assert read_rows(path, Row) == [*kept, Row("d", 4)]
        assert not capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_ended_line_that_is_no_row_is_an_error_with_file_and_line_and_the_file_stays(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b'{"value": 4}\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputDataError, match=f"rows.jsonl, line {number}"):
        read_rows(path, Row)
    assert path.read_bytes() == b"".join(lines)
