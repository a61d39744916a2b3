"""Sampling budgets outlive a replay shard and a learner: neither an empty nor a doubled one after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pytest

from esrl_ray import actors
from esrl_ray.config import Config, load_config
from esrl_ray.learning.replay_shard import ReplayShard
from esrl_ray.learning.shards import Shards
from esrl_ray.telemetry import Telemetry
from esrl_ray.vocabulary import Ended
from streaming.steptable import rows_to_table
from tests.unit.test_replay import step

RATIO, MOST = 10.0, 1_000.0
SETTINGS = [f"replay.{limit}" for limit in ("samples_per_insert=10", "capacity=100", "min_size=2")]
SETTINGS += ["learner.batch_size=4", "learner.updates_per_call=2"]


class Place:
    """Where a shard lives: the log, and the handle that finds whichever shard is there."""

    def __init__(self) -> None:
        self.config: Config = load_config("configs/demo.yaml", SETTINGS)
        self.log: list[pa.Table] = []
        self.now_ms = 0
        self.away = False
        self.answers_lost = 0
        self.restart()

    def restart(self) -> None:
        """A new shard, as after kill -9: all it has is the log."""
        self.now_ms += 1
        self.shard = ReplayShard(
            self.config, 0, lambda _, after: list(enumerate(self.log))[after + 1 :], lambda: self.now_ms, lambda: ["w"]
        )

    def write(self, num_steps: int, *, arrives: bool = True) -> None:
        """One commit."""
        number = len(self.log)
        self.log.append(rows_to_table([step(self.config, f"{number}-{i}", ended=Ended.TERMINATED) for i in range(num_steps)]))
        if arrives:
            self.shard.apply("w", number, self.log[-1], 0)

    def __getattr__(self, name: str) -> SimpleNamespace:
        def call(*args: object) -> object:
            if self.away:
                return None
            answer = getattr(self.shard, name)(*args)
            if name == "restore_limiter" and self.answers_lost:  # it was done, but the caller waited no longer
                self.answers_lost -= 1
                return None
            return answer

        return SimpleNamespace(remote=call)

    @property
    def totals(self) -> Mapping[str, float]:
        """What the limiter says."""
        return cast(Mapping[str, float], self.shard.stats()["limiter"])


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(actors, "ask", lambda call, *args: call(*args))
    return Place()


@pytest.fixture
def telemetry() -> Telemetry:
    return cast(Telemetry, SimpleNamespace(gauge=lambda *_, **__: None))


def test_a_learner_that_begins_anew_may_draw_all_that_a_refilled_shard_holds_and_once_only(place: Place, telemetry: Telemetry) -> None:
    place.write(5)
    place.restart()
    assert place.totals["budget"] == 0
    shards = Shards([place])
    shards.start_anew()
    shards.watch(telemetry)
    assert place.totals == {"inserted": 5, "sampled": 0, "budget": 5 * RATIO}
    assert place.shard.sample_batch(8) is not None
    place.write(1)
    shards.watch(telemetry)
    assert place.totals == {"inserted": 6, "sampled": 8, "budget": 6 * RATIO - 8}


def test_a_shard_that_restarts_goes_on_with_its_budget_and_that_of_what_came_meanwhile(place: Place, telemetry: Telemetry) -> None:
    shards = Shards([place])
    place.write(5)
    assert place.shard.sample_batch(8) is not None
    shards.watch(telemetry)
    assert place.totals == {"inserted": 5, "sampled": 8, "budget": 42}
    place.away = True
    shards.watch(telemetry)
    assert shards.inserted == 5, "the last count stays"
    place.write(3, arrives=False)  # while the shard is away
    place.restart()
    assert place.totals["budget"] == 0
    place.write(1)
    assert place.shard.sample_batch(8) is not None, "drawn before the loop looks"
    place.away = False
    shards.watch(telemetry)
    assert place.totals == {"inserted": 9, "sampled": 16, "budget": 42 + 4 * RATIO - 8} and shards.inserted == 9
    shards.watch(telemetry)
    assert place.totals["budget"] == 74, "given once"


@pytest.mark.parametrize("answers_lost", [1, 3])
def test_a_restored_budget_whose_answer_is_lost_is_restored_once(place: Place, telemetry: Telemetry, answers_lost: int) -> None:
    shards = Shards([place])
    place.write(5)
    assert place.shard.sample_batch(8) is not None
    shards.watch(telemetry)
    place.restart()
    place.write(1)
    assert place.shard.sample_batch(8) is not None
    place.answers_lost = answers_lost
    for drawn in (8, *[16] * answers_lost):
        shards.watch(telemetry)
        assert place.totals == {"inserted": 6, "sampled": 8 + drawn, "budget": 6 * RATIO - 8 - drawn}
        if drawn == 8:
            assert place.shard.sample_batch(8) is not None, "drawn before the loop has heard of it"
    place.restart()
    shards.watch(telemetry)
    assert place.totals == {"inserted": 6, "sampled": 24, "budget": 36}, "the next start has it again"


def test_totals_for_a_start_that_is_over_are_not_taken(place: Place, telemetry: Telemetry) -> None:
    shards = Shards([place])
    place.write(5)
    shards.watch(telemetry)
    kept = place.totals
    place.restart()
    began_ms = place.shard.stats()["began_ms"]
    place.restart()
    assert place.shard.restore_limiter(kept, began_ms) is None and place.totals["budget"] == 0
    shards.watch(telemetry)
    assert place.totals == kept


def test_a_learner_that_comes_back_gets_the_budget_of_its_checkpoint_and_of_what_came_since(place: Place, telemetry: Telemetry) -> None:
    shards = Shards([place])
    place.write(5)
    shards.watch(telemetry)
    kept = shards.limiters
    assert place.shard.sample_batch(8) is not None  # learnt after the checkpoint, and lost with the learner
    place.write(2)
    again = Shards([place])
    again.resume(kept)
    again.watch(telemetry)
    assert place.totals == {"inserted": 7, "sampled": 0, "budget": 7 * RATIO}


def test_a_restored_budget_is_at_most_a_full_buffers(place: Place, telemetry: Telemetry) -> None:
    place.write(5)
    shards = Shards([place])
    shards.resume([{"inserted": 0, "sampled": 0, "budget": MOST - 1}])
    shards.watch(telemetry)
    assert place.totals["budget"] == MOST


def test_budgets_of_another_number_of_shards_are_left_alone_and_said(
    place: Place, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    place.write(5)
    shards = Shards([place])
    with caplog.at_level("INFO"):
        shards.resume([{"inserted": 1, "sampled": 1, "budget": 9.0}] * 2)
    shards.watch(telemetry)
    assert place.totals["budget"] == 5 * RATIO and "checkpoint=2 now=1" in caplog.text


def test_a_count_of_before_is_no_more_than_there_is_after_the_log_was_shortened(place: Place, telemetry: Telemetry) -> None:
    shards = Shards([place])
    place.write(5)
    assert shards.at_most(7) == 7, "nobody has answered yet"
    shards.watch(telemetry)
    assert shards.at_most(4) == 4 and shards.at_most(7) == 5
