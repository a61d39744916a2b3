"""Named points of the commit sequence at which a process ends itself, or stops, when it is told to.

Production code knows nothing of this: `watch` wraps its functions in a process of the harness. `arm` writes one file for one worker; the
process that next passes the point takes the file away and sends itself the signal. So one that comes back goes on unharmed, and the
harness sees from the file that the point was passed.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import msgspec
from deltalake import DeltaTable

from streaming import statefiles, steplog
from streaming.deadletter import DeadLetters
from streaming.steplog import StepLog


class Point(StrEnum):
    """Moments of one commit, in their order; `DURING_*` are up to some tens of milliseconds into it."""

    AFTER_DEAD_LETTERS = "after_dead_letters"  # some were acknowledged, and nothing else has happened
    BEFORE_STATE = "before_state"
    DURING_STATE = "during_state"  # written under its temporary name
    AFTER_STATE = "after_state"
    BEFORE_DELTA = "before_delta"
    DURING_DELTA = "during_delta"
    AFTER_DELTA = "after_delta"
    BEFORE_PUBLICATION = "before_publication"
    BEFORE_COMPACTION = "before_compaction"
    DURING_COMPACTION = "during_compaction"
    AFTER_COMPACTION = "after_compaction"
    DURING_CHECKPOINT = "during_checkpoint"


Signal = Literal["kill", "stop"]


class _Order(msgspec.Struct):
    """What the file says."""

    point: Point
    signal: Signal
    delay_ms: int


def _file(folder: Path, worker: str) -> Path:
    return folder / f"{worker}.point"


def arm(folder: Path, worker: str, point: Point, *, how: Signal = "kill", delay_ms: int = 0) -> None:
    """Have the worker's process end (or stop) at its next passage of a point.

    Args:
        folder: Known to harness and workers.
        worker: Name.
        point: Where.
        how: SIGKILL or SIGSTOP.
        delay_ms: How long after the start of what the point names, for those that take their time.
    """
    path = _file(folder, worker)
    path.with_suffix(".writing").write_bytes(msgspec.json.encode(_Order(point, how, delay_ms)))
    path.with_suffix(".writing").rename(path)


def disarm(folder: Path, worker: str) -> bool:
    """Take back an order; False when the worker was first, and carries it out."""
    return _take(_file(folder, worker))


def passed(folder: Path, worker: str) -> bool:
    """Whether nothing is armed, so that the last order was carried out."""
    return not _file(folder, worker).exists()


def watch(folder: Path, worker: str) -> None:
    """Wrap the functions of this process that the points lie around. Once per process, before the worker is made."""
    at = functools.partial(_at, _file(folder, worker))
    flush = DeadLetters.flush

    def flush_and_look(letters: DeadLetters) -> None:
        sent = letters.sent
        flush(letters)
        if letters.sent > sent:
            at(Point.AFTER_DEAD_LETTERS)

    setattr(DeadLetters, "flush", flush_and_look)  # noqa: B010 - mypy knows that a method is not assigned
    _wrap(statefiles.StateFiles, "write", before=lambda: at(Point.BEFORE_STATE), after=lambda: at(Point.AFTER_STATE))
    _wrap(os, "fsync", before=lambda: at(Point.DURING_STATE))
    _wrap(steplog, "write_deltalake", before=lambda: at(Point.BEFORE_DELTA, Point.DURING_DELTA), after=lambda: at(Point.AFTER_DELTA))
    _wrap(StepLog, "commit", after=lambda: at(Point.BEFORE_PUBLICATION))
    _wrap(
        steplog,
        "rewrite",
        before=lambda: at(Point.BEFORE_COMPACTION, Point.DURING_COMPACTION),
        after=lambda: at(Point.AFTER_COMPACTION),
    )
    _wrap(DeltaTable, "create_checkpoint", before=lambda: at(Point.DURING_CHECKPOINT))


def _at(path: Path, *points: Point) -> None:
    """Carry out the order if it is for one of these points.

    A delayed one is left to the kernel's timer, whose SIGALRM ends the process like SIGKILL does: no thread of ours would get to run while
    Delta holds the interpreter.
    """
    try:
        order = msgspec.json.decode(path.read_bytes(), type=_Order)
    except FileNotFoundError:
        return
    if order.point not in points or not _take(path):
        return
    if order.delay_ms:
        signal.setitimer(signal.ITIMER_REAL, order.delay_ms / 1000)
    else:
        os.kill(os.getpid(), signal.SIGKILL if order.signal == "kill" else signal.SIGSTOP)


def _take(path: Path) -> bool:
    """Take an order away, of two that try at the same time one: what it says is done, or it is not, and both sides know which."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _wrap(owner: Any, name: str, *, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        before()
        result = function(*args, **options)
        after()
        return result

    setattr(owner, name, wrapped)
