"""The session join under any order of arrival: against a plain oracle, with restarts, and with events beyond the lateness."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl_ray.config import Config
from esrl_ray.reward import rewards_of
from esrl_ray.vocabulary import Bucket, Ended, StepRow
from streaming import wire
from streaming.session_state import read_chain
from streaming.sessions import SessionJoiner
from streaming.wire import DecodedDecision, Feedback
from tests.unit.test_sessions import REWARD, T0, configure, decision, feedback

CONFIGS = {
    "gap": configure(label_age_s=4, lateness_s=5, gap_s=6, amend_s=5, dedup_s=300),
    "no gap": configure(label_age_s=4, lateness_s=5, gap_s=None, amend_s=5, dedup_s=300),
    "positions": configure(label_age_s=4, lateness_s=5, gap_s=6, amend_s=5, dedup_s=300, require_shown=False),
    "few sessions": configure(label_age_s=4, lateness_s=5, gap_s=6, amend_s=5, dedup_s=300, max_open_sessions=1),
    "short memory": configure(label_age_s=2, lateness_s=2, gap_s=6, amend_s=5, dedup_s=10),
}
END_S = 1_000.0
_NEVER = 1 << 62
Event = DecodedDecision | Feedback


class Sent(NamedTuple):
    """An event and how much later than its time it arrives."""

    event: Event
    delay_s: float

    @property
    def arrival_ms(self) -> float:
        event = self.event.event if isinstance(self.event, DecodedDecision) else self.event
        return event.event_time_ms + self.delay_s * 1000


@st.composite
def traffic(draw: st.DrawFn, *, max_delay_s: float) -> list[Sent]:
    """Up to 12 lists in two session ids within 40 s, with feedback, leaves and duplicates; on a grid of 0.5 s, so ties are common."""

    def seconds(low: float, high: float) -> float:
        return draw(st.integers(round(low * 2), round(high * 2))) / 2

    sent: list[Sent] = []

    def send(event: Event) -> None:
        for _ in range(1 + (draw(st.integers(0, 9)) == 0)):
            sent.append(Sent(event, seconds(0, max_delay_s)))

    for i in range(draw(st.integers(1, 12))):
        at, session, name = seconds(0, 40), draw(st.sampled_from("xy")), f"d{i}"
        if draw(st.integers(0, 9)) > 0:  # some never come
            send(decision(name, at, session=session))
        if draw(st.integers(0, 4)) > 0:
            send(feedback(name, "shown", at + seconds(0, 4), session=session, item=draw(st.sampled_from([None, None, "i1"]))))
        for j in range(draw(st.integers(0, 3))):
            behaviour, item = draw(st.sampled_from(["click", "watch", "rating"])), draw(st.sampled_from(["i0", "i1", "i2", "i9"]))
            value, after = float(draw(st.integers(0, 6))), seconds(-1, 12)
            send(feedback(name, behaviour, at + after, item=item, value=value, session=session, event_id=f"f{i}-{j}"))
        if draw(st.integers(0, 5)) == 0:
            send(feedback(name, "leave", at + seconds(0, 6), session=session, event_id=f"l{i}"))
    return sorted(sent, key=lambda s: s.arrival_ms)


class Poll(NamedTuple):
    """What one poll brings: this many decisions and feedbacks; then what is done, each with all before it.

    `advance` the joiner; `store` what changed, `whole` everything; `restart` from what was stored.
    """

    num_decisions: int
    num_feedback: int
    then: Literal["", "advance", "store", "whole", "restart"]
    limit: float = math.inf  # of the rows that it advances by


POLLS = st.lists(
    st.builds(
        Poll,
        st.integers(0, 6),
        st.integers(0, 12),
        st.sampled_from(["", "advance", "store", "store", "whole", "restart"]),
        st.sampled_from([math.inf, 2, 1]),
    ),
    max_size=30,
)


def join(
    sent: Sequence[Sent],
    config: Config,
    polls: Sequence[Poll],
    *,
    close: bool = True,
    late: list[wire.Event] | None = None,
    joiner: SessionJoiner | None = None,
) -> tuple[list[StepRow], SessionJoiner]:
    """Read both topics in an interleaving, then everything else; at the end both are idle at END_S, and closed."""
    sent_decisions = {s.event.event.decision_id: s.event for s in sent if isinstance(s.event, DecodedDecision)}
    stored: list[bytes] = []
    decisions = [(i, s.event) for i, s in enumerate(s for s in sent if isinstance(s.event, DecodedDecision))]
    events = [(i, s.event) for i, s in enumerate(s for s in sent if isinstance(s.event, Feedback))]
    joiner, rows = joiner or SessionJoiner(0, config), []
    for poll in [*polls, Poll(len(decisions), len(events), "advance")]:
        taken = decisions[: poll.num_decisions], events[: poll.num_feedback]
        del decisions[: poll.num_decisions], events[: poll.num_feedback]
        joiner.push(
            [(i, e) for i, e in taken[0] if isinstance(e, DecodedDecision)], [(i, e) for i, e in taken[1] if isinstance(e, Feedback)]
        )
        if poll.then:
            rows += joiner.advance(clock_ms=T0, decisions_at_end=False, feedback_at_end=False, limit=poll.limit)
        if poll.then in ("store", "whole", "restart"):
            whole = poll.then == "whole" or not stored
            stored = [*([] if whole else stored), joiner.snapshot(whole=whole)]
        if poll.then == "restart":
            if late is not None:
                late += joiner.take_late()
            joiner = SessionJoiner(0, config, state=stored)
            assert all(joiner.give_back(offset, sent_decisions[name]) for name, offset in dict(joiner.lacking).items())
    if close:
        clock_ms = T0 + round(END_S * 1000)
        joiner.is_behind = True
        while joiner.is_behind:
            rows += joiner.advance(clock_ms=clock_ms, decisions_at_end=True, feedback_at_end=True, limit=2)
        rows += joiner.close(clock_ms=clock_ms)
    if late is not None:
        late += joiner.take_late()
    return rows, joiner


def remembered(chain: Sequence[bytes]) -> object:
    """What a chain says, in a form that does not depend on the order of what has none."""
    plain = msgspec.to_builtins(read_chain(chain, 0))
    for name in ("pending_decisions", "pending_feedback", "sessions"):
        plain[name].sort(key=repr)
    for events in (*plain["seen"].values(), *plain["waiting"].values()):
        events.sort(key=repr)
    return [*plain.items(), list(plain["gone"]), list(plain["numbers"])]


def text(value: object) -> object:
    """A form in which rows can be compared: arrays by dtype, shape and bytes."""
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


@dataclasses.dataclass
class Expected:
    """What the oracle says of one step."""

    session: str
    index: int
    next_id: str | None
    ended: Ended
    shown: list[bool]
    behaviours: list[list[float]]


@dataclasses.dataclass
class Visit:
    """A session of the oracle."""

    active_ms: int
    end_ms: float | None = None
    steps: list[str] = dataclasses.field(default_factory=list)


class Oracle:
    """One session id, all of its events known: a scan in the order of event time."""

    def __init__(self, config: Config, ledger: Counter[tuple[str, Bucket]]) -> None:
        self.join, self.ledger = config.join, ledger
        self.age, self.gap = config.join.label_age_s * 1000, None if config.join.gap_s is None else config.join.gap_s * 1000
        self.visits: list[Visit] = []
        self.where: dict[str, Visit] = {}
        self.times: dict[str, int] = {}
        self.shown: dict[str, list[bool]] = {}
        self.values: dict[str, np.ndarray] = {}
        self.accepted: Counter[str] = Counter()

    def place(self, event: Event) -> tuple[int, int, str]:
        """Feedback that is older than its decision comes right after it."""
        if isinstance(event, DecodedDecision):
            return event.event.event_time_ms, 0, event.event.decision_id
        if event.behaviour == "leave":
            return event.event_time_ms, 2, event.event_id
        if event.event_time_ms < self.times[event.decision_id]:
            return self.times[event.decision_id], 0, f"{event.decision_id}\0{event.event_time_ms:020}{event.event_id}"
        return event.event_time_ms, 1, event.event_id

    def scan(self, events: Sequence[Event]) -> None:
        self.times = {e.event.decision_id: e.event.event_time_ms for e in events if isinstance(e, DecodedDecision)}
        patience = self.age + (self.age if self.gap is None else self.gap)
        ordered: list[tuple[tuple[int, int, str], Event]] = []
        for event in events:
            decided_ms = _NEVER if isinstance(event, DecodedDecision) else self.times.get(event.decision_id, _NEVER)
            if isinstance(event, Feedback) and event.behaviour != "leave" and event.event_time_ms + patience <= decided_ms:
                self.ledger["feedback", Bucket.UNMATCHED] += 1
            else:
                ordered.append((self.place(event), event))
        for (now, _, _), event in sorted(ordered, key=lambda entry: entry[0]):
            if self.visits and self.gap is not None and self.visits[-1].end_ms is None and now > self.visits[-1].active_ms + self.gap:
                self.visits[-1].end_ms = self.visits[-1].active_ms + self.gap
            if isinstance(event, DecodedDecision):
                self.decide(event, now)
            elif event.behaviour == "leave":
                ends = bool(self.visits) and self.visits[-1].end_ms is None
                self.ledger["feedback", Bucket.JOINED if ends else Bucket.UNMATCHED] += 1
                if ends:
                    self.visits[-1].end_ms = now
            else:
                self.take(event, now)

    def decide(self, event: DecodedDecision, now: int) -> None:
        if not self.visits or self.visits[-1].end_ms is not None:
            self.visits.append(Visit(now))
        name, visit = event.event.decision_id, self.visits[-1]
        visit.steps.append(name)
        visit.active_ms, self.where[name] = now, visit
        self.shown[name] = [p >= 0 and not self.join.require_shown for p in event.event.positions]
        self.values[name] = np.zeros((3, 3))

    def take(self, event: Feedback, now: int) -> None:
        name = event.decision_id
        visit, closed_ms = self.where[name], self.times[name] + self.age
        retired = visit.end_ms is not None and all(now >= self.times[step] + self.age for step in visit.steps)
        if now >= closed_ms and not any(self.shown[name]):
            self.ledger["feedback", Bucket.NEVER_SHOWN] += 1
        elif retired or now > closed_ms + self.join.amend_s * 1000:
            self.ledger["feedback", Bucket.LATE] += 1
        elif event.item_id == "i9":
            self.ledger["feedback", Bucket.UNMATCHED] += 1
        else:
            self.accepted[name] += 1
            visit.active_ms = max(visit.active_ms, event.event_time_ms)
            if event.behaviour == "shown":
                touched = [g < 2 if event.item_id is None else f"i{g}" == event.item_id for g in range(3)]
                self.shown[name] = [a or b for a, b in zip(self.shown[name], touched, strict=True)]
            else:
                cell = int(str(event.item_id)[1]), ["click", "watch", "rating"].index(event.behaviour)
                old = self.values[name][cell]
                self.values[name][cell] = [max(old, event.value), old + event.value, event.value][cell[1]]

    def result(self, session_id: str) -> dict[str, Expected]:
        expected: dict[str, Expected] = {}
        for number, visit in enumerate(self.visits):
            for name in visit.steps:
                bucket = Bucket.JOINED if any(self.shown[name]) else Bucket.NEVER_SHOWN
                self.ledger["decisions", bucket] += 1
                self.ledger["feedback", bucket] += self.accepted[name]
            kept = [name for name in visit.steps if any(self.shown[name])]
            end = Ended.TRUNCATED if visit.end_ms is None and self.gap is None else Ended.TERMINATED
            for index, (name, next_id) in enumerate(zip(kept, [*kept, None][1:], strict=True)):
                expected[name] = Expected(
                    session=f"{session_id}#{number}" if number else session_id,
                    index=index,
                    next_id=next_id,
                    ended=Ended.HAS_NEXT if next_id else end,
                    shown=self.shown[name],
                    behaviours=np.minimum(self.values[name], [1, 10, 5]).tolist(),
                )
        return expected


def oracle(sent: Sequence[Sent], config: Config) -> tuple[dict[str, Expected], Counter[tuple[str, Bucket]]]:
    """What the join must give when no event is later than the lateness."""
    ledger: Counter[tuple[str, Bucket]] = Counter()
    by_session: dict[str, dict[tuple[str, str], Event]] = defaultdict(dict)
    for event, _ in sent:
        if isinstance(event, DecodedDecision):
            session_id, key = event.event.session_id, ("decisions", event.event.decision_id)
        else:
            session_id, key = event.session_id, ("feedback", event.event_id)
        if key in by_session[session_id]:
            ledger[key[0], Bucket.DUPLICATE] += 1
        by_session[session_id][key] = event
    expected: dict[str, Expected] = {}
    for session_id, events in by_session.items():
        one = Oracle(config, ledger)
        one.scan(list(events.values()))
        expected |= one.result(session_id)
    return expected, ledger


def ledger_of(joiner: SessionJoiner) -> dict[tuple[str, Bucket], int]:
    return {key: amount for key, amount in joiner.ledger.items() if amount}


@pytest.mark.parametrize("name", ["gap", "no gap", "positions"])
@settings(max_examples=120, deadline=None)
@given(sent=traffic(max_delay_s=5), polls=POLLS)
def test_every_order_of_arrival_within_the_lateness_gives_the_steps_of_the_oracle(name: str, sent: list[Sent], polls: list[Poll]) -> None:
    config = CONFIGS[name]
    expected, ledger = oracle(sent, config)
    rows, joiner = join(sent, config, polls)
    last = {row.step_id: row for row in rows}
    got = {step: Expected(r.session_id, r.index, r.next_id, r.ended, r.shown.tolist(), r.behaviours.tolist()) for step, r in last.items()}
    assert got == expected
    assert ledger_of(joiner) == {key: amount for key, amount in ledger.items() if amount}
    for row in rows:
        assert np.array_equal(row.rewards, rewards_of(row.behaviours, REWARD) * row.shown[:, None])


@pytest.mark.parametrize("name", list(CONFIGS))
@settings(max_examples=60, deadline=None)
@given(sent=traffic(max_delay_s=30), polls=POLLS)
def test_a_restart_at_any_point_changes_no_row(name: str, sent: list[Sent], polls: list[Poll]) -> None:
    config = CONFIGS[name]
    rows, joiner = join(sent, config, polls)
    steady_rows, steady = join(sent, config, [poll._replace(then="advance" if poll.then else "") for poll in polls])
    assert [[text(v) for v in msgspec.structs.astuple(r)] for r in rows] == [
        [text(v) for v in msgspec.structs.astuple(r)] for r in steady_rows
    ]
    assert joiner.ledger == steady.ledger
    assert remembered([joiner.snapshot()]) == remembered([steady.snapshot()])


@pytest.mark.parametrize("name", list(CONFIGS))
@settings(max_examples=60, deadline=None)
@given(sent=traffic(max_delay_s=30), polls=POLLS)
def test_what_changed_since_a_whole_state_makes_up_the_state_at_every_commit(name: str, sent: list[Sent], polls: list[Poll]) -> None:
    chain: list[bytes] = []

    class Both(SessionJoiner):
        """Stores what changed, and compares it with everything."""

        def advance(self, *, clock_ms: int, decisions_at_end: bool, feedback_at_end: bool, limit: float = math.inf) -> list[StepRow]:
            at_end = {"decisions_at_end": decisions_at_end, "feedback_at_end": feedback_at_end}
            rows = super().advance(clock_ms=clock_ms, limit=limit, **at_end)
            chain.append(self.snapshot(whole=not chain))
            everything = SessionJoiner(0, CONFIGS[name], state=chain)
            assert remembered(chain) == remembered([everything.snapshot()]) == remembered([copy.deepcopy(self).snapshot()])
            return rows

    join(sent, CONFIGS[name], [poll._replace(then="advance" if poll.then else "") for poll in polls], joiner=Both(0, CONFIGS[name]))


@pytest.mark.parametrize("name", list(CONFIGS))
@settings(max_examples=60, deadline=None)
@given(sent=traffic(max_delay_s=30), polls=POLLS)
def test_however_late_events_are_each_is_in_exactly_one_bucket(name: str, sent: list[Sent], polls: list[Poll]) -> None:
    config = CONFIGS[name]
    pushed = Counter("decisions" if isinstance(s.event, DecodedDecision) else "feedback" for s in sent)
    for close in (False, True):
        late: list[wire.Event] = []
        rows, joiner = join(sent, config, polls, close=close, late=late)
        for topic, kind in (("decisions", wire.Decision), ("feedback", wire.Feedback)):
            assert sum(isinstance(event, kind) for event in late) == joiner.ledger.get((topic, Bucket.LATE), 0)
        total: Counter[str] = Counter()
        for (topic, _), amount in joiner.ledger.items():
            assert amount >= 0
            total[topic] += amount
        assert +total == pushed
        assert len({row.step_id for row in rows}) == joiner.num_closed == joiner.ledger.get(("decisions", Bucket.JOINED), 0)
    assert not any(amount for (_, bucket), amount in joiner.ledger.items() if bucket is Bucket.IN_OPEN_SESSION)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "short memory"])  # which may use a session's name again
@settings(max_examples=100, deadline=None)
@given(sent=traffic(max_delay_s=30), polls=POLLS)
def test_however_late_events_are_the_sessions_are_whole_chains(name: str, sent: list[Sent], polls: list[Poll]) -> None:
    rows, _ = join(sent, CONFIGS[name], polls)
    last: dict[str, StepRow] = {}
    for row in rows:
        assert row.revision == (last[row.step_id].revision + 1 if row.step_id in last else 0)
        assert (row.states is not None) == (row.revision == 0)
        last[row.step_id] = row
    sessions: dict[str, list[StepRow]] = defaultdict(list)
    for row in sorted(last.values(), key=lambda row: (row.event_time_ms, row.step_id)):
        sessions[row.session_id].append(row)
    for steps in sessions.values():
        assert [step.index for step in steps] == list(range(len(steps)))
        assert [step.next_id for step in steps] == [*(step.step_id for step in steps[1:]), None]
        assert all(step.ended is Ended.HAS_NEXT for step in steps[:-1])
        assert steps[-1].ended in (Ended.TERMINATED, Ended.TRUNCATED)
