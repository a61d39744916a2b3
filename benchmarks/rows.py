"""What benchmarks leave behind: the commit that was measured, and a file that grows by one finished row at a time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TypeVar

import msgspec

from esrl_ray.errors import InputDataError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = TypeVar("Row")


def commit() -> str:
    """The commit of the code; `-dirty` where the tree differs from it outside of the results."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def read_rows(path: Path, row: type[Row]) -> list[Row]:
    """Finished rows; none when there is no file.

    A last line whose writer was killed in the middle is dropped, also from the file, with a printed warning: the next row starts a line.

    Raises:
        InputDataError: another line is no such row.
    """
    content, rows = path.read_bytes() if path.exists() else b"", []
    *lines, unended = content.split(b"\n")
    for number, line in enumerate([*lines, unended] if unended else lines, 1):
        try:
            rows.append(msgspec.json.decode(line, type=row))
        except msgspec.DecodeError as error:
            if number <= len(lines):
                raise InputDataError(f"no finished row: {error}", f"{path}, line {number}", "mend or delete the line") from error
            print(f"WARNING: {path}, line {number} is half-written and dropped: {line[:80]!r}", flush=True)
            os.truncate(path, len(content) - len(line))
            return rows
    if unended:  # whole but for its end
        with path.open("ab") as file:
            file.write(b"\n")
    return rows


def append_row(path: Path, row: msgspec.Struct) -> None:
    """Keep a finished row."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")
