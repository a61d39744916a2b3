"""Laws of the code as a whole (layers are checked by import-linter, in `make check`)."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("esrl_ray", "serve", "streaming")
FOLDERS = (*PACKAGES, "configs", "tests", "benchmarks", "docs", ".ci")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".cfg", ".ini", ".txt", ".lock", ".sh", ".json", ".html", ""}
EQUATION = re.compile(r"\bEqs?\. ?\(?(\d+)\)?")

LONG = {"esrl_ray/config.py": 600}
"""Files that may be longer than 400 lines: one schema is one file."""

SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project, by its path from the root."""
    paths = [p for p in ROOT.iterdir() if p.is_file()]
    paths += [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for path in sorted(paths):
        if path.suffix in TEXT:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def code_names(path: Path) -> set[str]:
    """Dotted names that a file's code uses or imports; comments and docstrings do not count."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_equation_cited_in_code_stands_in_the_paper_notes() -> None:
    cited = {(number, str(path.relative_to(ROOT))) for path in SOURCES for number in EQUATION.findall(path.read_text(encoding="utf-8"))}
    notes = set(EQUATION.findall((ROOT / "docs" / "paper.md").read_text(encoding="utf-8")))
    assert cited
    assert not {(number, where) for number, where in cited if number not in notes}


def test_the_three_packages_come_from_one_place() -> None:
    homes = {Path(str(importlib.import_module(package).__file__)).parents[1] for package in PACKAGES}
    assert homes == {ROOT}


def test_the_build_file_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")}
    assert set(listed) == found
    assert {p.parent for p in SOURCES} == {ROOT.joinpath(*name.split(".")) for name in found}


def test_ray_remote_stands_in_one_file() -> None:
    using = {str(p.relative_to(ROOT)) for p in SOURCES if code_names(p) & {"ray.remote", "ray.method"}}
    assert using == {"esrl_ray/actors.py"}


def test_no_module_shadows_the_standard_library_from_the_root() -> None:
    import sys

    assert not set(PACKAGES) & sys.stdlib_module_names
    assert not [p for p in (ROOT / "tests" / "serve", ROOT / "tests" / "streaming") if p.exists()]


def test_imports_inside_the_packages_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_the_global_random_state_is_left_alone() -> None:
    allowed = {f"np.random.{name}" for name in ("Generator", "default_rng", "SeedSequence", "BitGenerator", "PCG64", "Philox")}
    using = {(str(p.relative_to(ROOT)), n) for p in SOURCES for n in code_names(p) if n.startswith("np.random.") and n.count(".") == 2}
    assert not {(where, name) for where, name in using if name not in allowed}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    }
    assert not {where: n for where, n in lengths.items() if n > LONG.get(where, 400)}


@pytest.mark.parametrize(
    "pattern",
    [
        r"p[y]pi\.(org|io)|p[y]thonhosted|rep[o]1?\.maven|m[a]ven\.(apache|google)|m[a]ven-central|\b(docker|ghcr|quay|gcr)\.i[o]"
        r"|r[e]gistry\.npmjs|c[o]nda\.anaconda",
        r"(?<![\w.$}~])/(work|home|root|Users|mnt|media)/\w",
        r"i[n]dex-url|e[x]tra-index|t[r]usted-host|f[i]nd-links",
    ],
    ids=["registry_host", "machine_path", "registry_option"],
)
def test_no_text_names_a_registry_or_a_path_of_one_machine(pattern: str) -> None:
    found = [f"{where}: {match.group()}" for where, text in texts() for match in re.finditer(pattern, text)]
    assert not found


def test_no_text_names_where_this_checkout_lies() -> None:
    if len(ROOT.parts) < 3:
        pytest.skip(f"the checkout lies at {ROOT}, which is too short to look for")
    here = re.compile(rf"{re.escape(str(ROOT))}(?![\w-])")
    assert not [where for where, text in texts() if here.search(text)]
