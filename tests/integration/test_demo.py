"""The whole loop as a user starts it: kills of every part while it runs, and every way in which it can end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from esrl_ray.cli import watchdog
from esrl_ray.cli.local import LOCK
from streaming.steplog import list_workers, read_commits, read_steps

ROOT = Path(__file__).resolve().parents[2]
ESRL = Path(sys.executable).parent / "esrl"
SMALL = [
    "demo.requests_per_s=40",
    "exploration.warmup_steps=200",
    "exploration.round_steps=500",
    "replay.min_size=100",
    "learner.batch_size=32",
    "policy.publish_interval_s=1",
    "join.label_age_s=2",
    "join.lateness_s=2",
    "join.gap_s=6",
    "demo.late_s=8",
    "simulation.frozen_sessions=100",
    "simulation.frozen_policies=3",
]


@dataclass(frozen=True)
class Demo:
    """A demo in a process of its own."""

    process: subprocess.Popen[str]
    out: Path
    errors: Path

    @property
    def mark(self) -> str:
        return (self.out / LOCK).read_text().split()[0]

    def find(self, title: str) -> list[psutil.Process]:
        """The run's processes whose command line contains a text."""
        found = []
        for process in watchdog.carriers(self.mark):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue  # it ended while we looked
        return found

    def said(self) -> str:
        return self.errors.read_text()

    def progress(self) -> tuple[int, int]:
        """Gradient steps and served version of the newest line."""
        lines = re.findall(r"learner ([\d,]+) .*?version (\d+) of", self.said())
        return (int(lines[-1][0].replace(",", "")), int(lines[-1][1])) if lines else (0, 0)

    def wait_for(self, what: Callable[[], object], seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()[-4000:]
            time.sleep(0.2)

    def kill(self, title: str) -> None:
        """kill -9 of the oldest process of that title; waits until there is one, and until another has taken its place."""
        self.wait_for(lambda: self.find(title))
        victim = min(self.find(title), key=lambda p: p.create_time())
        victim.kill()
        self.wait_for(lambda: [p for p in self.find(title) if p.pid != victim.pid])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start(seconds: float, *overrides: str) -> Demo:
        out, errors = tmp_path / f"run{len(demos)}", tmp_path / f"errors{len(demos)}"
        sets = [part for value in (*SMALL, *overrides) for part in ("--set", value)]
        command = [str(ESRL), "demo", "--seconds", str(seconds), "--out", str(out), "--json", *sets]
        with errors.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True)
        demos.append(Demo(process, out, errors))
        return demos[-1]

    yield start
    for demo in demos:
        if demo.process.poll() is None:
            demo.process.kill()
        assert demo.process.stdout is not None
        demo.process.stdout.close()
        demo.process.wait(30)


def report_of(demo: Demo) -> dict[str, Any]:
    output, _ = demo.process.communicate(timeout=400)
    assert demo.process.returncode == 0, demo.said()[-4000:]
    report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return report


def leaves_nothing(mark: str, *, seconds: float = 25.0) -> None:
    """No process of the run, no temporary folder."""
    deadline = time.monotonic() + seconds
    while (left := watchdog.carriers(mark)) or watchdog.temporary_folder(mark).exists():
        assert time.monotonic() < deadline, [p.cmdline()[:3] for p in left]
        time.sleep(0.3)


@pytest.mark.timeout(900)
def test_every_part_is_killed_once_and_the_loop_goes_on(start: Callable[..., Demo]) -> None:
    demo = start(160)
    demo.wait_for(lambda: demo.progress()[1] >= 2)  # a learnt policy serves
    mark = demo.mark
    for title in ("ray::IngestPart", "ray::ReplayShard", "ray::LearnerPart", "ray::PolicyStoreActor", "ray::ServeReplica"):
        demo.kill(title)
        if title == "ray::ServeReplica":
            demo.wait_for(lambda: len(demo.find("ray::ServeReplica")) == 2, 60)
    steps, version = demo.progress()
    demo.wait_for(lambda: demo.progress()[0] > steps and demo.progress()[1] > version, 75)  # whole again: it learns, publishes, serves
    report = report_of(demo)

    assert report["requests"] > 500 and report["requests_failed"] == 0
    ledger = report["ledger"]
    buckets = ("joined", "duplicate", "late", "dead_letter", "never_shown", "unmatched", "in_open_session", "not_yet_read")
    assert ledger["closes"] and sum(ledger[b] for b in buckets) == ledger["produced"]
    assert ledger["dead_letter"] == ledger["not_yet_read"] == 0 and ledger["duplicate"] > 0
    assert report["version_regressions"] == 0 and report["versions_served"] >= 4
    steps = report["steps"]
    assert steps["closed"] == steps["logged"] == steps["inserted"] > 200
    assert report["learner"]["gradient_steps"] > 0

    (root,) = (demo.out / "log").iterdir()
    first_rows = [
        i
        for w in list_workers(root)
        for _, rows in read_commits(root, w)
        for i in rows.filter(rows["item_ids"].is_valid())["step_id"].to_pylist()
    ]
    assert len(first_rows) == len(set(first_rows)) == len(read_steps(root)) == steps["closed"], "each step is in the log once"
    assert json.loads((demo.out / "report.json").read_text())["requests"] == report["requests"]
    page = (demo.out / "report.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", ""), (
        "the page loads nothing"
    )
    leaves_nothing(mark)


def end_by_signal(demo: Demo, number: signal.Signals) -> None:
    demo.process.send_signal(number)


def kill_the_command(demo: Demo) -> None:
    demo.process.kill()


def kill_the_broker(demo: Demo) -> None:
    (broker,) = demo.find("kafka.Kafka")
    broker.kill()


def kill_the_raylet(demo: Demo) -> None:
    (raylet,) = demo.find("raylet/raylet")
    raylet.kill()


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        (lambda demo: end_by_signal(demo, signal.SIGINT), 130, "interrupted"),
        (lambda demo: end_by_signal(demo, signal.SIGTERM), 130, "interrupted"),
        (kill_the_command, -signal.SIGKILL, ""),
        (kill_the_broker, 2, "the embedded broker ended"),
        (kill_the_raylet, 2, "Ray's process"),
    ],
    ids=["ctrl-c", "sigterm", "command", "broker", "raylet"],
)
def test_however_it_ends_nothing_is_left(start: Callable[..., Demo], what: Callable[[Demo], None], code: int, message: str) -> None:
    demo = start(300)
    demo.wait_for(lambda: " requests " in demo.said())
    mark = demo.mark
    what(demo)
    assert demo.process.wait(90) == code, demo.said()[-4000:]
    assert message in demo.said()
    assert "Traceback" not in demo.said()
    leaves_nothing(mark)
    assert not (demo.out / LOCK).exists()


def test_a_port_in_use_is_a_clear_error(start: Callable[..., Demo]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        demo = start(10, f"serve.port={port}")
        assert demo.process.wait(150) == 2
    assert f"port {port}" in demo.said() and "Traceback" not in demo.said()


def test_a_folder_with_other_files_is_refused(start: Callable[..., Demo], tmp_path: Path) -> None:
    (tmp_path / "run0").mkdir()
    (tmp_path / "run0" / "thesis.tex").write_text("precious")
    demo = start(10)
    assert demo.process.wait(60) == 2 and "thesis.tex" in demo.said()
    assert (tmp_path / "run0" / "thesis.tex").read_text() == "precious"
