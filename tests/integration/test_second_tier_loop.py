"""The second tier beside a real loop: a process of its own reads the log and judges, while learning goes on; its death abstains."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from esrl_ray import actors
from esrl_ray.config import load_config
from esrl_ray.evaluation.second_tier import KeepRows, SecondTierVerdict, load_verdict
from esrl_ray.learning.judging import LIMIT_S, Judging
from esrl_ray.policy.policy import Policy
from esrl_ray.policy.store import CONTROL_VERSION, read_snapshot, version_folder
from tests.integration.test_training_loop import SET, Running, clock_ms
from tests.two_items import ALWAYS_A, ALWAYS_B, log_of, table_of, two_items, vector

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # Ray's own
]

WAIT_S = 300.0


def of_two_items(num_steps: int, keep: KeepRows) -> pa.Table:
    """A long log in which always A is worth 2 a session, and always B 4."""
    return table_of(log_of(two_items(), (1.0, 0.2), (0.5, 0.05), sessions=2_500, seed=0, spread=0.5))


def that_fails(num_steps: int, keep: KeepRows) -> pa.Table:
    """No log at all."""
    raise OSError("the disk is gone")


def that_is_killed(num_steps: int, keep: KeepRows) -> pa.Table:
    """Takes its process with it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def that_hangs(num_steps: int, keep: KeepRows) -> pa.Table:
    """Never comes back."""
    time.sleep(10 * WAIT_S)
    raise AssertionError


def waited(judging: Judging) -> SecondTierVerdict:
    """Its verdict, once it has one."""
    deadline = time.monotonic() + WAIT_S
    while (verdict := judging.verdict()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return verdict


def test_a_worse_candidate_is_blocked_in_a_process_of_its_own_and_what_ends_the_process_abstains() -> None:
    config, now_ms = two_items(), {"hangs": 0}
    candidate, anchor = vector(config, ALWAYS_A), vector(config, ALWAYS_B)
    hangs = Judging(candidate, anchor, config, that_hangs, clock_ms=lambda: now_ms["hangs"])
    others = [Judging(candidate, anchor, config, read, clock_ms=clock_ms) for read in (of_two_items, that_fails, that_is_killed)]
    worse, failed, died = (waited(judging) for judging in others)
    assert worse.outcome == "block" and worse.high is not None and worse.high < 0 and not worse.rule.unseen, worse.text
    assert (worse.candidate, worse.anchor) == (candidate.manifest.digest, anchor.manifest.digest)
    assert failed.outcome == "abstain" and "the disk is gone" in failed.text
    assert died.outcome == "abstain" and "the judge ended: WorkerCrashed" in died.text
    assert hangs.verdict() is None
    now_ms["hangs"] = int(LIMIT_S * 1e3) + 1
    given_up = waited(hangs)
    assert given_up.outcome == "abstain" and "no verdict within 600 s" in given_up.text


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    config = load_config("configs/demo.yaml", [*SET, "policy.second_tier=block"])
    made = Running(config, tmp_path, tmp_path.name)
    yield made
    made.stop_event.set()
    made.thread.join(WAIT_S)
    actors.end({"store": made.store, "shard": made.shard})


def test_the_loop_promotes_the_version_that_it_judged_and_learns_meanwhile(running: Running) -> None:
    running.until(lambda: "version" in str(running.loop.status()["second_tier"]))
    running.until(lambda: running.status("round") >= 1)
    anchor = Policy.from_bytes(read_snapshot(running.folder / "policies").anchor)
    verdict = load_verdict(version_folder(running.folder / "policies", anchor.version))
    assert verdict is not None and verdict.outcome == "abstain" and verdict.against == CONTROL_VERSION
    assert "users 1, at least 100 needed" in verdict.text  # the writer of these tests knows one user
    assert verdict.candidate == anchor.manifest.digest and verdict.lists > 300
    assert running.status("published") >= anchor.version  # control is version 1: it published on while that one was judged
    running.stop()
