"""Commits on their way to a replay shard that may stand still, be away, or fail: never waited for, never gathered."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pytest
import ray

from esrl_ray.cli.parts import Publisher

ROWS = pa.table({"x": [1]})


class Shard:
    """An actor handle whose calls are answered when the test says so."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.answered: set[int] = set()
        self.away = False
        self.apply = self

    def remote(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> int:
        self.calls.append(commit)
        return commit

    def wait(self, refs: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        assert num_returns == len(refs) > 0 and timeout == 0, "the log must not wait for a shard"
        return [r for r in refs if r in self.answered], [r for r in refs if r not in self.answered]

    def get(self, ref: int) -> None:
        if self.away:
            raise ray.exceptions.RayActorError()


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch) -> Shard:
    """A shard in place of Ray's."""
    made = Shard()
    monkeypatch.setattr("esrl_ray.cli.parts.ray.wait", made.wait)
    monkeypatch.setattr("esrl_ray.cli.parts.ray.get", made.get)
    return made


def publish(publisher: Any, commits: range) -> None:
    for commit in commits:
        publisher("ingest-0", commit, ROWS, 0)


def test_a_shard_that_stands_still_gets_a_few_calls_and_then_none(shard: Shard, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(shard)
    with caplog.at_level(logging.INFO):
        publish(publisher, range(1_000))
        assert shard.calls == list(range(Publisher.MAX_WAITING)) and len(publisher._waiting) == Publisher.MAX_WAITING
        shard.answered |= {0}
        publish(publisher, range(1_000, 1_002))
    assert shard.calls == [*range(Publisher.MAX_WAITING), 1_000]  # the shard reads what is between from the log
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and "does not answer" in told[0] and "left_out=996" in told[1] and "does not answer" in told[2]


def test_a_shard_that_answers_gets_every_commit_and_one_that_failed_the_next(shard: Shard, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(shard)
    shard.answered = set(range(100))
    publish(publisher, range(50))
    shard.away = True
    publish(publisher, range(50, 60))
    assert shard.calls == list(range(60)) and "it will read the log" in caplog.text
