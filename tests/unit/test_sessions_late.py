"""The session join, case by case: what arrives after others of its time."""

from __future__ import annotations

from esrl_ray.config import KafkaConfig
from esrl_ray.vocabulary import Bucket, Ended
from tests.unit.test_sessions import Join, configure, decision, feedback, shown


def test_late_feedback_amends_an_open_session_with_absolute_values() -> None:
    join = Join()
    join.push(*shown("a", 0), feedback("a", "watch", 1, item="i0", value=2))
    join.until(6)
    join.push(feedback("a", "watch", 2, item="i0", value=3))
    (row,) = join.until(7)
    assert (row.revision, row.behaviours[0].tolist(), row.states) == (1, [0, 5, 0], None)
    assert join.counts("feedback") == {Bucket.JOINED: 3}


def test_feedback_is_late_after_the_amend_time_and_after_the_session() -> None:
    join = Join(configure(amend_s=5))
    join.push(*shown("a", 0), feedback("a", "click", 9, item="i0"), feedback("a", "click", 9.001, item="i1"))
    join.until(20)
    assert join.steps["a"].behaviours[:, 0].tolist() == [1, 0, 0]
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.LATE: 1}
    join.until(40)
    join.push(feedback("a", "click", 39, item="i2"))
    join.until(41)
    assert join.counts("feedback") == {Bucket.JOINED: 2, Bucket.LATE: 2}


def test_feedback_that_waits_for_longer_than_ids_are_remembered_is_still_one_event() -> None:
    join = Join(configure(gap_s=300, dedup_s=120))
    for at_s in (0, 130, 260):  # the same one, stamped anew
        join.push(feedback("a", "click", at_s, item="i0", event_id="e"))
        join.until(at_s + 1)
    assert join.counts("feedback") == {Bucket.IN_OPEN_SESSION: 1, Bucket.DUPLICATE: 2}
    join.until(305)
    assert join.counts("feedback") == {Bucket.UNMATCHED: 1, Bucket.DUPLICATE: 2}


def test_an_event_older_than_the_deduplication_window_is_late_at_once() -> None:
    join = Join()
    join.push(*shown("a", 200))
    join.until(200)
    join.push(decision("b", 79.999), feedback("b", "shown", 79.999), decision("c", 80))
    assert join.joiner.ledger[("decisions", Bucket.LATE)] == 1
    assert join.joiner.ledger[("feedback", Bucket.LATE)] == 1
    assert join.joiner.ledger[("decisions", Bucket.IN_OPEN_SESSION)] == 2


def test_a_late_decision_is_put_between_its_neighbours_and_both_links_and_indices_are_amended() -> None:
    join = Join()
    join.push(*shown("a", 0), *shown("c", 10))
    join.until(14)
    assert join.links == {"a": ("s", 0, "c", Ended.HAS_NEXT), "c": ("s", 1, None, Ended.OPEN)}
    join.push(*shown("b", 5))
    assert {row.step_id for row in join.until(14.5)} == {"a", "b", "c"}
    assert join.links == {"a": ("s", 0, "b", Ended.HAS_NEXT), "b": ("s", 1, "c", Ended.HAS_NEXT), "c": ("s", 2, None, Ended.OPEN)}


def test_a_late_decision_that_was_never_shown_leaves_the_links_alone() -> None:
    join = Join()
    join.push(*shown("a", 0), *shown("c", 10))
    join.until(14)
    join.push(decision("b", 12))
    assert join.until(14.5) == []
    assert join.until(16) == []
    assert join.counts("decisions") == {Bucket.JOINED: 2, Bucket.NEVER_SHOWN: 1}


def test_without_a_gap_a_decision_before_a_forgotten_step_is_late_with_its_feedback() -> None:
    join = Join(configure(gap_s=None, amend_s=0))
    join.push(*shown("a", 0), *shown("b", 10), *shown("c", 20))
    join.until(25)
    join.push(*shown("l", 5))
    join.until(26)
    assert join.counts("decisions") == {Bucket.JOINED: 3, Bucket.LATE: 1}
    assert join.counts("feedback") == {Bucket.JOINED: 3, Bucket.LATE: 1}


def test_what_is_counted_late_is_told_once_and_what_amends_is_not_late() -> None:
    join = Join(configure(amend_s=5))
    join.push(*shown("a", 0), feedback("a", "watch", 1, item="i0", value=2))
    join.until(6)
    amends, too_late, old = (feedback("a", "click", at, item="i0") for at in (5, 9.5, -200))
    join.push(amends, too_late, old)
    join.until(10)
    assert join.joiner.take_late() == [old, too_late] and join.joiner.take_late() == []
    assert join.counts("feedback") == {Bucket.JOINED: 3, Bucket.LATE: 2}


def test_a_late_decision_is_told_whole_and_so_is_the_feedback_that_waited_for_it() -> None:
    join = Join(configure(gap_s=None, amend_s=0))
    join.push(*shown("a", 0), *shown("b", 10), *shown("c", 20))
    join.until(25)
    late, seen = decision("l", 9), feedback("l", "shown", 18)
    join.push(seen)
    join.until(25.5)
    assert join.joiner.take_late() == []
    join.push(late)
    join.until(26)
    assert join.joiner.take_late() == [late.event, seen]


def test_nothing_is_kept_when_late_topics_are_off() -> None:
    config = configure().model_copy(update={"kafka": KafkaConfig()})
    join = Join(config)
    join.push(*shown("a", 0))
    join.until(200)
    join.push(*shown("a", 1))
    join.until(201)
    assert join.joiner.take_late() == [] and join.joiner.ledger["feedback", Bucket.LATE] == 1


def test_a_step_stays_while_a_late_list_behind_it_may_still_get_its_link() -> None:
    join = Join(configure(amend_s=1))
    join.push(*shown("a", 0), *shown("d", 6))
    join.until(12)
    join.push(decision("b", 3), *shown("c", 5))  # b is never shown: a's link is c's, although a is past amending
    join.until(13)
    assert [(name, row.index, row.next_id) for name, row in sorted(join.steps.items())] == [("a", 0, "c"), ("c", 1, "d"), ("d", 2, None)]
