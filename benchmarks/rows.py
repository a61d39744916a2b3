"""What benchmarks leave behind: the commit that was measured, and a file that grows by one finished row at a time."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TypeVar

import msgspec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = TypeVar("Row", bound=msgspec.Struct)


def commit() -> str:
    """The commit of the code; `-dirty` where the tree differs from it outside of the results."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def read_rows(path: Path, row: type[Row]) -> list[Row]:
    """Finished rows; none when there is no file."""
    return [msgspec.json.decode(line, type=row) for line in path.read_bytes().splitlines()] if path.exists() else []


def append_row(path: Path, row: msgspec.Struct) -> None:
    """Keep a finished row."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")
