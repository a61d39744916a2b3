"""An order to die at a point is carried out once or taken back, whatever comes at the same moment."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from esrl_ray.cli.chaos import faults, points
from esrl_ray.cli.chaos.faults import Faults
from esrl_ray.cli.chaos.points import Point

WORKER = "ingest-0"


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process would have sent itself."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: sent.append(signal))
    return sent


def passes(folder: Path) -> None:
    """The worker comes to a point."""
    points._at(folder / f"{WORKER}.point", Point.BEFORE_DELTA)


def test_an_order_is_for_one_point_and_carried_out_once(tmp_path: Path, signals: list[int]) -> None:
    points.arm(tmp_path, WORKER, Point.AFTER_DELTA)
    passes(tmp_path)
    assert not signals and not points.passed(tmp_path, WORKER)
    points.arm(tmp_path, WORKER, Point.BEFORE_DELTA)
    passes(tmp_path)
    passes(tmp_path)
    assert len(signals) == 1 and points.passed(tmp_path, WORKER)


def test_an_order_that_is_taken_back_while_the_worker_reads_it_does_nothing(
    tmp_path: Path, signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    points.arm(tmp_path, WORKER, Point.BEFORE_DELTA)
    decode = msgspec.json.decode

    def reads(*args: Any, **options: Any) -> Any:
        assert points.disarm(tmp_path, WORKER)
        return decode(*args, **options)

    monkeypatch.setattr(points, "msgspec", SimpleNamespace(json=SimpleNamespace(decode=reads)))
    passes(tmp_path)
    assert not signals


@pytest.mark.parametrize("at_last", [False, True])
def test_a_worker_that_passes_the_point_at_the_last_moment_counts_as_dead(
    tmp_path: Path, signals: list[int], monkeypatch: pytest.MonkeyPatch, at_last: bool
) -> None:
    fleet, broker = SimpleNamespace(folder=tmp_path), SimpleNamespace()
    doing = Faults(fleet, broker, 0, print)  # type: ignore[arg-type]
    monkeypatch.setattr(faults, "POINT_S", -1.0)

    def looks(folder: Path, worker: str) -> bool:
        if at_last:
            passes(folder)  # after the harness has looked
        return False

    monkeypatch.setattr(points, "passed", looks)
    points.arm(tmp_path, WORKER, Point.BEFORE_DELTA)
    assert doing._passes(WORKER) == at_last and len(signals) == at_last
