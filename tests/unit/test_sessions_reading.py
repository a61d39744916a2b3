"""The session join as a worker reads: a clock, events that arrive, ends of topics that are true; and few open sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl_ray.config import Config
from esrl_ray.vocabulary import Bucket, Ended, StepRow
from streaming.sessions import SessionJoiner
from streaming.wire import DecodedDecision, Feedback
from tests.unit.test_sessions import T0
from tests.unit.test_sessions_order import CONFIGS, END_S, POLLS, Expected, Poll, Sent, join, ledger_of, oracle, traffic


class Read(NamedTuple):
    """Time passes, then so many of the events that have arrived are read, then the joiner advances."""

    wait_ms: int
    num_decisions: int
    num_feedback: int


READS = st.lists(st.builds(Read, st.sampled_from([0, 500, 2_000, 7_000]), st.integers(0, 6), st.integers(0, 12)), max_size=40)


def read_as_it_comes(sent: Sequence[Sent], config: Config, reads: Sequence[Read]) -> tuple[list[StepRow], SessionJoiner]:
    """A topic is at its end when everything that has arrived was read; at the last read, long after, everything is."""
    decisions = [(s.arrival_ms, s.event) for s in sent if isinstance(s.event, DecodedDecision)]
    feedback = [(s.arrival_ms, s.event) for s in sent if isinstance(s.event, Feedback)]
    joiner, rows, clock_ms = SessionJoiner(0, config), list[StepRow](), T0

    def arrived(topic: Sequence[tuple[float, object]]) -> int:
        return sum(arrival_ms <= clock_ms for arrival_ms, _ in topic)

    for read in [*reads, Read(round(END_S * 1000), len(decisions), len(feedback))]:
        clock_ms += read.wait_ms
        taken = decisions[: min(read.num_decisions, arrived(decisions))], feedback[: min(read.num_feedback, arrived(feedback))]
        del decisions[: len(taken[0])], feedback[: len(taken[1])]
        joiner.push([(0, event) for _, event in taken[0]], [(0, event) for _, event in taken[1]])
        rows += joiner.advance(clock_ms=clock_ms, decisions_at_end=not arrived(decisions), feedback_at_end=not arrived(feedback))
    return rows + joiner.close(clock_ms=clock_ms), joiner


@pytest.mark.parametrize("name", ["gap", "no gap", "positions"])
@settings(max_examples=80, deadline=None)
@given(sent=traffic(max_delay_s=5), reads=READS)
def test_any_interleaving_with_true_ends_of_topics_gives_the_steps_of_the_oracle(name: str, sent: list[Sent], reads: list[Read]) -> None:
    expected, ledger = oracle(sent, CONFIGS[name])
    rows, joiner = read_as_it_comes(sent, CONFIGS[name], reads)
    last = {row.step_id: row for row in rows}
    got = {step: Expected(r.session_id, r.index, r.next_id, r.ended, r.shown.tolist(), r.behaviours.tolist()) for step, r in last.items()}
    assert got == expected
    assert ledger_of(joiner) == {key: amount for key, amount in ledger.items() if amount}


@settings(max_examples=120, deadline=None)
@given(sent=traffic(max_delay_s=5), polls=POLLS)
def test_with_one_open_session_the_others_are_truncated_and_no_step_is_lost(sent: list[Sent], polls: list[Poll]) -> None:
    expected, ledger = oracle(sent, CONFIGS["gap"])
    for close in (False, True):
        rows, joiner = join(sent, CONFIGS["few sessions"], polls, close=close)
        assert joiner.num_open_sessions <= 1
    last = {row.step_id: row for row in rows}
    assert set(last) == set(expected)
    assert {name: row.shown.tolist() for name, row in last.items()} == {name: step.shown for name, step in expected.items()}
    assert not any(row.ended is Ended.OPEN for row in last.values())
    for bucket in (Bucket.JOINED, Bucket.NEVER_SHOWN, Bucket.DUPLICATE):
        assert joiner.ledger.get(("decisions", bucket), 0) == ledger["decisions", bucket]
    for topic in ("decisions", "feedback"):
        amounts = [sum(n for (t, _), n in counted.items() if t == topic) for counted in (joiner.ledger, ledger)]
        assert amounts[0] == amounts[1]
