"""The session join, case by case: one event at a time, with the clock far behind and both topics never at their end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pytest

from esrl_ray.config import Config, JoinConfig, KafkaConfig, SpecConfig
from esrl_ray.errors import LogError
from esrl_ray.reward import BehaviourConfig, RewardConfig, RewardGroup
from esrl_ray.vocabulary import Bucket, Ended, StepRow
from streaming.sessions import SessionJoiner
from streaming.steptable import BULKY
from streaming.wire import SCHEMA_VERSION, Decision, DecodedDecision, Feedback, decode_decision, encode

T0 = 1_700_000_000_000
REWARD = RewardConfig(
    behaviours=(
        BehaviourConfig(name="click", combine="max"),
        BehaviourConfig(name="watch", combine="sum", cap=10.0),
        BehaviourConfig(name="rating", combine="last", cap=5.0),
    ),
    groups=(
        RewardGroup(name="a", expression="click + 0.5 * watch"),
        RewardGroup(name="b", expression="2 * rating"),
    ),
    scale=2.0,
)


def configure(**join: object) -> Config:
    """label age 4 s, lateness 5 s, gap 15 s, amend 30 s, dedup 120 s unless said otherwise."""
    kafka = KafkaConfig(late_topics=True)
    return Config(join=JoinConfig.model_validate(join), reward=REWARD, spec=SpecConfig(item_features=("age",)), kafka=kafka)


CONFIG = configure()
SPEC = CONFIG.spec.build()


@lru_cache
def decision(name: str, at_s: float, *, session: str = "s", positions: tuple[int, ...] = (0, 1, -1)) -> DecodedDecision:
    g = len(positions)
    seed = np.random.default_rng(sum(name.encode()))

    def floats(width: int) -> bytes:
        return seed.normal(size=(g, width)).astype("<f4").tobytes()

    event = Decision(
        schema_version=SCHEMA_VERSION,
        decision_id=name,
        request_id=f"r-{name}",
        session_id=session,
        user_id="u",
        event_time_ms=T0 + round(at_s * 1000),
        policy_version=3,
        round=1,
        arm="explore",
        spec_digest=SPEC.digest,
        num_candidates=50,
        item_ids=[f"i{j}" for j in range(g)],
        positions=list(positions),
        states=floats(1),
        categorical=b"",
        scores=floats(2),
        actions=floats(4),
        anchor_actions=floats(4),
        fused_scores=floats(1),
        candidate_means=bytes(4 * (SPEC.num_features + SPEC.num_scores)),
    )
    return decode_decision(encode(event), SPEC, b"application/msgpack")


def feedback(
    of: str, behaviour: str, at_s: float, *, item: str | None = None, value: float = 1.0, session: str = "s", event_id: str = ""
) -> Feedback:
    return Feedback(
        schema_version=SCHEMA_VERSION,
        event_id=event_id or f"{of}-{behaviour}-{item}-{at_s}",
        decision_id=of,
        session_id=session,
        behaviour=behaviour,
        event_time_ms=T0 + round(at_s * 1000),
        item_id=item,
        value=value,
    )


class Join:
    """A joiner with its rows merged as a reader of the log would."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.joiner = SessionJoiner(0, config)
        self.rows: list[StepRow] = []
        self._lateness_s = config.join.lateness_s

    def push(self, *events: DecodedDecision | Feedback) -> None:
        decisions = [(i, e) for i, e in enumerate(events) if isinstance(e, DecodedDecision)]
        self.joiner.push(decisions, [(i, e) for i, e in enumerate(events) if isinstance(e, Feedback)])

    def until(self, at_s: float) -> list[StepRow]:
        """Both topics are read to their end and the watermark is `at_s`."""
        clock_ms = T0 + round((at_s + self._lateness_s) * 1000)
        rows = self.joiner.advance(clock_ms=clock_ms, decisions_at_end=True, feedback_at_end=True)
        self.rows += rows
        return rows

    def close(self) -> list[StepRow]:
        rows = self.joiner.close(clock_ms=T0)
        self.rows += rows
        return rows

    @property
    def steps(self) -> dict[str, StepRow]:
        merged: dict[str, StepRow] = {}
        for row in self.rows:
            known = merged.get(row.step_id)
            assert row.revision == (0 if known is None else known.revision + 1)
            merged[row.step_id] = row
        return merged

    @property
    def links(self) -> dict[str, tuple[str, int, str | None, Ended]]:
        return {name: (row.session_id, row.index, row.next_id, row.ended) for name, row in self.steps.items()}

    def counts(self, topic: str) -> Mapping[Bucket, int]:
        return {bucket: n for (t, bucket), n in self.joiner.ledger.items() if t == topic and n}


def shown(name: str, at_s: float, *, session: str = "s") -> tuple[DecodedDecision, Feedback]:
    """A decision that the user saw 0.1 s later."""
    return decision(name, at_s, session=session), feedback(name, "shown", at_s + 0.1, session=session)


def test_a_step_closes_at_its_label_age_with_everything_that_was_logged() -> None:
    join, made = Join(), decision("a", 0)
    join.push(made, feedback("a", "shown", 0.1), feedback("a", "click", 1, item="i1"))
    assert join.until(3.999) == []
    (row,) = join.until(4)
    assert (row.step_id, row.revision, row.session_id, row.user_id, row.index, row.partition, row.offset) == ("a", 0, "s", "u", 0, 0, 0)
    assert (row.arm, row.policy_version, row.round, row.num_candidates) == ("explore", 3, 1, 50)
    assert (row.event_time_ms, row.closed_ms) == (T0, T0 + 9_000)
    assert row.shown.tolist() == [True, True, False]
    assert row.behaviours.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert row.rewards.tolist() == [[0, 0], [0.5, 0], [0, 0]]
    assert (row.next_id, row.ended) == (None, Ended.OPEN)
    assert row.item_ids == ("i0", "i1", "i2")
    assert row.positions is not None and row.positions.tolist() == [0, 1, -1]
    for name in ("states", "categorical", "scores", "actions", "anchor_actions", "fused_scores", "candidate_means"):
        logged, sent = getattr(row, name), getattr(made, name)
        assert logged.dtype == sent.dtype and logged.shape == sent.shape and np.array_equal(logged, sent), name
    assert join.counts("decisions") == {Bucket.JOINED: 1}
    assert join.counts("feedback") == {Bucket.JOINED: 2}


def test_repeats_combine_by_sum_max_or_last_and_are_capped() -> None:
    join = Join()
    join.push(
        *shown("a", 0),
        feedback("a", "watch", 1, item="i0", value=4),
        feedback("a", "watch", 2, item="i0", value=3),
        feedback("a", "watch", 1, item="i1", value=400),
        feedback("a", "click", 1, item="i0", value=0.5),
        feedback("a", "click", 2, item="i0", value=0.25),
        feedback("a", "rating", 2, item="i0", value=2),
        feedback("a", "rating", 1, item="i0", value=3),
        feedback("a", "rating", 2, item="i1", value=1, event_id="x"),
        feedback("a", "rating", 2, item="i1", value=4, event_id="y"),
    )
    (row,) = join.until(4)
    assert row.behaviours.tolist() == [[0.5, 7, 2], [0, 10, 4], [0, 0, 0]]
    assert row.rewards.tolist() == [[(0.5 + 3.5) / 2, 2], [2.5, 4], [0, 0]]


def test_steps_of_a_session_are_linked_and_the_last_is_terminated_by_leave() -> None:
    join = Join()
    join.push(*shown("a", 0), *shown("b", 2), *shown("c", 3), feedback("c", "leave", 3.5))
    join.until(10)
    assert join.links == {
        "a": ("s", 0, "b", Ended.HAS_NEXT),
        "b": ("s", 1, "c", Ended.HAS_NEXT),
        "c": ("s", 2, None, Ended.TERMINATED),
    }
    assert len(join.rows) == 3  # no amendment was needed
    assert join.counts("feedback") == {Bucket.JOINED: 4}
    assert join.joiner.num_open_sessions == 0


def test_the_link_follows_as_a_small_row_when_the_next_list_comes_after_the_label_age() -> None:
    join = Join()
    join.push(*shown("a", 0))
    join.until(4.5)
    join.push(*shown("b", 6))
    (row,) = join.until(7)
    assert (row.step_id, row.revision, row.next_id, row.ended) == ("a", 1, "b", Ended.HAS_NEXT)
    assert row.shown.tolist() == [True, True, False]
    for name in BULKY:
        assert getattr(row, name) is None


def test_the_gap_ends_a_session_exactly_after_it_and_the_id_comes_again_with_a_number() -> None:
    join = Join()
    join.push(*shown("a", 0), *shown("b", 15.1))  # `shown` at 0.1 s is activity: exactly the gap
    join.until(30.2)
    assert join.links["b"] == ("s", 1, None, Ended.OPEN)
    (row,) = join.until(30.201)
    assert (row.step_id, row.revision, row.ended) == ("b", 1, Ended.TERMINATED)
    join.push(*shown("c", 31), *shown("d", 46.101))
    join.until(100)
    assert join.links["c"] == ("s#1", 0, None, Ended.TERMINATED)
    assert join.links["d"] == ("s#2", 0, None, Ended.TERMINATED)


def test_item_feedback_keeps_a_session_alive() -> None:
    join = Join()
    join.push(*shown("a", 0), feedback("a", "click", 14, item="i0"), *shown("b", 28))
    join.until(35)
    assert join.links["a"] == ("s", 0, "b", Ended.HAS_NEXT)


def test_a_leave_between_two_lists_makes_two_sessions() -> None:
    join = Join()
    join.push(*shown("a", 0), feedback("a", "leave", 1), *shown("b", 2), feedback("b", "leave", 2.05), *shown("c", 2.07))
    join.until(60)
    assert [join.links[name][0] for name in "abc"] == ["s", "s#1", "s#2"]
    assert all(row.ended is Ended.TERMINATED for row in join.steps.values())
    assert join.counts("feedback") == {Bucket.JOINED: 5}


def test_a_leave_that_ends_nothing_is_unmatched() -> None:
    join = Join()
    join.push(*shown("a", 0), feedback("a", "leave", 1), feedback("a", "leave", 1.5), feedback("z", "leave", 1, session="z"))
    join.until(60)
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.UNMATCHED: 2}


def test_a_decision_never_shown_is_dropped_with_its_feedback_and_skipped_by_links() -> None:
    join = Join()
    join.push(*shown("a", 0), decision("b", 1), feedback("b", "click", 1.5, item="i0"), *shown("c", 2))
    assert join.until(4.5)[0].ended is Ended.OPEN  # b may still be shown
    join.until(10)
    join.push(feedback("b", "shown", 5.5))
    join.until(12)
    assert set(join.steps) == {"a", "c"}
    assert join.links["a"] == ("s", 0, "c", Ended.HAS_NEXT) and join.links["c"][1] == 1
    assert join.counts("decisions") == {Bucket.JOINED: 2, Bucket.NEVER_SHOWN: 1}
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.NEVER_SHOWN: 2}


def test_when_the_last_list_was_never_shown_the_one_before_it_gets_the_end() -> None:
    join = Join()
    join.push(*shown("a", 0), decision("b", 3), feedback("b", "leave", 3.5))
    assert [row.ended for row in join.until(6)] == [Ended.OPEN]
    assert [(row.step_id, row.ended) for row in join.until(7)] == [("a", Ended.TERMINATED)]


def test_shown_of_one_item_sets_only_its_mask() -> None:
    join = Join()
    join.push(decision("a", 0), feedback("a", "shown", 1, item="i1"))
    (row,) = join.until(4)
    assert row.shown.tolist() == [False, True, False]


def test_without_require_shown_the_position_decides() -> None:
    join = Join(configure(require_shown=False))
    join.push(decision("a", 0), decision("b", 1, positions=(-1, -1)))
    (row,) = join.until(5)
    assert row.shown.tolist() == [True, True, False]
    assert join.counts("decisions") == {Bucket.JOINED: 1, Bucket.NEVER_SHOWN: 1}


def test_duplicates_are_counted_and_change_nothing() -> None:
    join = Join()
    join.push(*shown("a", 0), feedback("a", "watch", 1, item="i0", event_id="w"), feedback("a", "watch", 1, item="i0", event_id="w"))
    join.push(decision("a", 0))
    (row,) = join.until(4)
    join.push(decision("a", 0), feedback("a", "watch", 1, item="i0", event_id="w"))
    assert join.until(5) == []
    assert row.behaviours[0, 1] == 1
    assert join.counts("decisions") == {Bucket.JOINED: 1, Bucket.DUPLICATE: 2}
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.DUPLICATE: 2}


def test_a_decision_cannot_be_logged_twice_by_a_duplicate_with_another_time() -> None:
    join = Join(configure(gap_s=None, dedup_s=10))
    join.push(*shown("a", 0))
    join.until(100)
    join.push(decision("a", 95))
    join.until(120)
    assert join.counts("decisions") == {Bucket.JOINED: 1, Bucket.DUPLICATE: 1}


def test_feedback_waits_for_its_decision_and_is_unmatched_when_that_never_comes() -> None:
    join = Join()
    join.push(feedback("a", "click", 0, item="i0"), feedback("b", "click", 0, item="i0", session="z"))
    join.until(1)
    assert join.counts("feedback") == {Bucket.IN_OPEN_SESSION: 2}
    join.push(*shown("a", 3))
    join.until(18.999)
    assert join.steps["a"].behaviours[0, 0] == 1
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.IN_OPEN_SESSION: 1}
    join.until(19)
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.UNMATCHED: 1}


def test_feedback_on_an_item_or_session_that_the_decision_does_not_have_is_unmatched() -> None:
    join = Join()
    join.push(*shown("a", 0), feedback("a", "click", 1, item="i9"), feedback("a", "click", 1, item="i0", session="other", event_id="o"))
    (row,) = join.until(4)
    assert not row.behaviours.any()
    assert join.counts("feedback") == {Bucket.JOINED: 1, Bucket.UNMATCHED: 2}


def test_close_truncates_what_is_open_and_settles_everything() -> None:
    join = Join()
    join.push(*shown("a", 0), *shown("b", 3), decision("c", 4), feedback("x", "click", 3, item="i0"))
    join.until(3.5)
    join.close()
    assert join.links == {"a": ("s", 0, "b", Ended.HAS_NEXT), "b": ("s", 1, None, Ended.TRUNCATED)}
    assert join.counts("decisions") == {Bucket.JOINED: 2, Bucket.NEVER_SHOWN: 1}
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.UNMATCHED: 1}
    join.push(*shown("d", 6))
    join.until(60)
    assert join.links["d"] == ("s#1", 0, None, Ended.TERMINATED)


def test_the_least_recently_active_session_is_truncated_above_the_limit() -> None:
    join = Join(configure(max_open_sessions=2))
    join.push(*shown("a", 0, session="x"), *shown("b", 1, session="y"), feedback("a", "click", 2, item="i0", session="x"))
    join.push(*shown("c", 3, session="z"))
    join.until(8)
    assert {name: row.ended for name, row in join.steps.items()} == {"a": Ended.OPEN, "b": Ended.TRUNCATED, "c": Ended.OPEN}
    assert join.joiner.num_open_sessions == 2


def test_without_a_gap_only_leave_ends_a_session_and_old_steps_are_forgotten() -> None:
    join = Join(configure(gap_s=None))
    for i in range(200):
        join.push(*shown(f"d{i}", i * 60))
        join.until(i * 60 + 30)
    size = len(join.joiner.snapshot())
    for i in range(200, 400):
        join.push(*shown(f"d{i}", i * 60))
        join.until(i * 60 + 30)
    assert len(join.joiner.snapshot()) < size * 1.1
    join.push(feedback("d399", "leave", 24_000))
    join.until(24_001)
    assert [row.index for row in join.steps.values()] == list(range(400))
    assert [row.next_id for row in join.steps.values()] == [f"d{i}" for i in range(1, 400)] + [None]
    assert join.steps["d399"].ended is Ended.TERMINATED
    assert {row.session_id for row in join.steps.values()} == {"s"}


def test_the_watermark_follows_the_slower_topic_and_the_clock_only_at_the_end_of_a_topic() -> None:
    join = SessionJoiner(0, CONFIG)

    def watermark(clock_s: float, *, decisions_at_end: bool = False, feedback_at_end: bool = False) -> float:
        join.advance(clock_ms=T0 + round(clock_s * 1000), decisions_at_end=decisions_at_end, feedback_at_end=feedback_at_end)
        return (join.watermark_ms - T0) / 1000

    join.push([(0, decision("a", 100))], [])
    assert watermark(1000) == -T0 / 1000  # no feedback seen, and its end not reached
    join.push([], [(0, feedback("a", "shown", 50))])
    assert watermark(1000) == 45
    assert watermark(80, feedback_at_end=True) == 75
    assert watermark(1000, feedback_at_end=True) == 95
    assert watermark(60, decisions_at_end=True, feedback_at_end=True) == 95  # it never goes down
    assert watermark(200, decisions_at_end=True, feedback_at_end=True) == 195


def test_dead_letters_are_settled_by_the_worker() -> None:
    join = Join()
    join.joiner.settle("feedback", Bucket.DEAD_LETTER, 3)
    assert join.counts("feedback") == {Bucket.DEAD_LETTER: 3}


def test_a_damaged_state_or_one_of_another_partition_is_refused() -> None:
    state = SessionJoiner(0, CONFIG).snapshot()
    with pytest.raises(LogError, match="cannot be read"):
        SessionJoiner(0, CONFIG, state=[state[:-3]])
    with pytest.raises(LogError, match="partition 0, expected 3 of 1"):
        SessionJoiner(1, CONFIG, state=[state])
