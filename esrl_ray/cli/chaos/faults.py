"""Which faults, in which order, and how each is done."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np

from esrl_ray.cli.chaos import points
from esrl_ray.cli.chaos.fleet import Fleet
from esrl_ray.cli.chaos.points import Point
from esrl_ray.cli.chaos.processes import REFUSED, ProcessFleet
from esrl_ray.cli.clock import clock_ms
from esrl_ray.errors import LoopError
from streaming.broker import EmbeddedBroker

Kind = Literal["ingest", "replay", "broker", "learner", "zombie", "deal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RANDOM, DOWN = "at_random", "down_10_s"
ZOMBIE_POINTS = (Point.BEFORE_STATE, Point.DURING_STATE, Point.BEFORE_DELTA, Point.BEFORE_PUBLICATION)
DELAYED = {Point.DURING_DELTA: (5, 60), Point.DURING_COMPACTION: (5, 60), Point.DURING_CHECKPOINT: (2, 20)}
"""Milliseconds after the start, drawn at random."""
DOWN_S, POINT_S, RECOVERY_S = 10.0, 45.0, 120.0
MOST_WORKERS = 3


class Fault(NamedTuple):
    """One fault: what dies, and when."""

    kind: Kind
    when: str  # a point, `at_random`, or how long


def plan(kinds: Sequence[Kind], num_faults: int, *, seed: int) -> list[Fault]:
    """Faults in an order drawn from the seed: every kind and every point, then all of them again in another order, as far as they go.

    Args:
        kinds: Of faults.
        num_faults: How many.
        seed: Of the order.
    """
    rng = np.random.default_rng([seed, 1])
    once = {
        "ingest": [Fault("ingest", point) for point in Point] + [Fault("ingest", RANDOM)] * 3,
        "replay": [Fault("replay", RANDOM)] * 4,
        "broker": [Fault("broker", RANDOM)] * 3 + [Fault("broker", DOWN)],
        "learner": [Fault("learner", RANDOM)] * 3,
        "zombie": [Fault("zombie", point) for point in ZOMBIE_POINTS],
        "deal": [Fault("deal", RANDOM)] * 3,
    }
    faults: list[Fault] = []
    while len(faults) < num_faults:
        turn = [fault for kind in KINDS if kind in kinds for fault in once[kind]]
        faults += [turn[i] for i in rng.permutation(len(turn))]
    return faults[:num_faults]


@dataclass
class Faults:
    """Does faults and remembers what they did.

    Args:
        fleet: The parts.
        broker: Killed and restarted on the same port and data.
        seed: Of victims and moments.
        say: Told about each.
    """

    fleet: Fleet
    broker: EmbeddedBroker
    seed: int
    say: Callable[[str], None]
    kills: Counter[str] = field(default_factory=Counter)
    not_reached: list[str] = field(default_factory=list)
    zombies: list[str] = field(default_factory=list)
    deaths: list[tuple[str, int]] = field(default_factory=list)  # worker, clock
    answers_s: dict[str, float] = field(default_factory=dict)  # part -> longest time until it answered again

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng([self.seed, 2])

    def do(self, fault: Fault) -> None:
        """Do one, and return when what died is back."""
        done = {
            "ingest": self._ingest,
            "replay": self._part,
            "learner": self._part,
            "broker": self._broker,
            "zombie": self._zombie,
            "deal": self._deal,
        }
        name = f"{fault.kind}:{fault.when}"
        if done[fault.kind](fault):
            self.kills[name] += 1
            self.say(f"{name} done")
        else:
            self.not_reached.append(name)
            self.say(f"{name} not reached")

    def _one_of(self, names: Sequence[str]) -> str:
        return names[int(self._rng.integers(len(names)))]

    def _ingest(self, fault: Fault) -> bool:
        worker = self._one_of(self.fleet.workers)
        if fault.when == RANDOM:
            os.kill(self.fleet.pid(worker), signal.SIGKILL)
        else:
            point = Point(fault.when)
            delay_ms = int(self._rng.integers(*DELAYED[point])) if point in DELAYED else 0
            points.arm(self.fleet.folder, worker, point, delay_ms=delay_ms)
            if not self._passes(worker):
                return False
        self.deaths.append((worker, clock_ms()))
        self._comes_back(worker)
        return True

    def _passes(self, worker: str) -> bool:
        deadline = time.monotonic() + POINT_S
        while not points.passed(self.fleet.folder, worker):
            if time.monotonic() > deadline:
                return not points.disarm(self.fleet.folder, worker)
            time.sleep(0.02)
        return True

    def _part(self, fault: Fault) -> bool:
        name = self._one_of(self.fleet.shards if fault.kind == "replay" else self.fleet.others)
        if fault.kind == "learner":
            self._learns(name)
        os.kill(self.fleet.pid(name), signal.SIGKILL)
        self._comes_back(name)
        return True

    def _comes_back(self, name: str) -> None:
        began = time.monotonic()
        if not self.fleet.wait_dead(name, RECOVERY_S):
            raise LoopError(f"{name} did not die")
        if not self.fleet.restarts_itself:
            time.sleep(float(self._rng.uniform(0.0, 1.0)))
        self.fleet.start(name)
        kind = name.split("-", maxsplit=1)[0]
        self.answers_s[kind] = max(self.answers_s.get(kind, 0.0), time.monotonic() - began)

    def _learns(self, name: str) -> None:
        """Wait until the training loop has made gradient steps in its present process."""
        deadline = time.monotonic() + RECOVERY_S
        while not (status := self.fleet.status(name)) or status["steps_per_s"] <= 0:
            if time.monotonic() > deadline:
                raise LoopError(f"the learner made no gradient step within {RECOVERY_S:.0f} s: {status}")
            time.sleep(0.2)

    def _broker(self, fault: Fault) -> bool:
        began = time.monotonic()
        os.kill(self.broker.pid, signal.SIGKILL)
        self.broker.wait_dead()
        time.sleep(DOWN_S if fault.when == DOWN else float(self._rng.uniform(0.0, 2.0)))
        self.broker.restart()
        self.answers_s["broker"] = max(self.answers_s.get("broker", 0.0), time.monotonic() - began)
        return True

    def _zombie(self, fault: Fault) -> bool:
        """Stop a worker in the middle of a commit, let a successor of the same name commit, and let the first one go on."""
        assert isinstance(self.fleet, ProcessFleet)
        worker = self._one_of(self.fleet.workers)
        points.arm(self.fleet.folder, worker, Point(fault.when), how="stop")
        if not self._passes(worker):
            return False
        old = self.fleet.set_aside(worker)
        self.fleet.start(worker)
        first, deadline = self._commit(worker), time.monotonic() + RECOVERY_S
        while self._commit(worker) < first + 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(old.pid, signal.SIGCONT)
        try:
            status = old.wait(RECOVERY_S)
        except subprocess.TimeoutExpired as error:
            os.kill(old.pid, signal.SIGUSR1)
            time.sleep(1.0)
            raise LoopError(f"a zombie of {worker} goes on: {self.fleet.said(worker, 80)}") from error
        reason = next((line for line in reversed(self.fleet.said(worker, 200).splitlines()) if f"{worker} ended: " in line), "")
        self.zombies.append(f"{fault.when}: exit status {status}, {reason or 'no reason'}")
        if status != REFUSED or "Fenced" not in reason:
            raise LoopError(f"a zombie was not fenced: {self.zombies[-1]}")
        return True

    def _deal(self, fault: Fault) -> bool:
        """All workers die, and another number of them comes: partitions move."""
        began, now = time.monotonic(), len(self.fleet.workers)
        self.fleet.deal(int(self._rng.choice([n for n in range(1, MOST_WORKERS + 1) if n != now])))
        self.answers_s["deal"] = max(self.answers_s.get("deal", 0.0), time.monotonic() - began)
        return True

    def _commit(self, worker: str) -> int:
        status = self.fleet.status(worker)
        return -1 if status is None else int(status["commit"])
