"""The open sessions of one partition: what each decision, feedback and timer changes, in the order of event time.

A late event is applied behind others. Then a decision is put between its neighbours and both are linked anew; feedback amends a step as
long as its session is open and its label age was reached at most `join.amend_s` ago.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from operator import or_

from esrl_ray.config import Config
from esrl_ray.vocabulary import Bucket, Ended
from streaming.session_state import DECISIONS, FEEDBACK, Bulk, Changes, JoinState, OpenStep, Session, SessionKey, drop_forgotten
from streaming.wire import SHOWN, Feedback

_CLOSE, _GAP, _PATIENCE = range(3)  # timers, in this order at the same time


class OpenSessions:
    """Sessions that can still change, and a short memory of those that cannot.

    Args:
        config: Sections `join` and `reward`.
        settled: (topic -> bucket -> events), counted up here.
        bulks: Decision id -> bulk; that of a decision which will have no row is dropped here. A list without one is skipped.
        note_late: Told of each event that is counted late.
    """

    def __init__(
        self,
        config: Config,
        settled: dict[str, Counter[Bucket]],
        bulks: dict[str, Bulk],
        note_late: Callable[[OpenStep | Feedback], None],
    ) -> None:
        join = config.join
        self.now_ms = 0  # event time
        self.timers: list[tuple[int, int, str, int, OpenStep | Session | Feedback]] = []  # due, kind, id, number
        self.open: dict[SessionKey, Session] = {}  # least recently active first
        self.changed: dict[str, OpenStep] = {}  # closed steps that need a row
        self.num_closed = 0
        self._settled, self._bulks, self._note_late = settled, bulks, note_late
        self._columns = {b.name: (i, b.combine) for i, b in enumerate(config.reward.behaviours)}
        self._label_age, self._amend, self._dedup = (round(seconds * 1000) for seconds in (join.label_age_s, join.amend_s, join.dedup_s))
        self._gap = None if join.gap_s is None else round(join.gap_s * 1000)
        self._patience = (self._label_age if self._gap is None else self._gap) + self._label_age
        self._max_open = join.max_open_sessions
        self._steps: dict[str, tuple[OpenStep, Session]] = {}
        self._sessions: dict[str, list[Session]] = {}  # session id -> its sessions by number
        self._waiting: dict[str, dict[str, Feedback]] = {}  # decision id -> event id -> feedback
        self._gone: dict[str, tuple[int, Bucket]] = {}
        self._numbers: dict[str, tuple[int, int]] = {}
        self._new = Changes()

    def knows(self, decision_id: str) -> bool:
        """The decision is in the state or was there a while ago."""
        return decision_id in self._steps or decision_id in self._gone

    def num_unsettled(self) -> tuple[int, int]:
        """Decisions and feedback that are in no other bucket than an open session."""
        unclosed = self.unclosed()
        return len(unclosed), sum(len(events) for events in self._waiting.values()) + sum(step.num_feedback for step in unclosed)

    def waiting(self) -> Iterator[str]:
        """Ids of feedback whose decision has not come."""
        return chain.from_iterable(self._waiting.values())

    def unclosed(self) -> list[OpenStep]:
        """Steps whose label age is not reached."""
        return [step for step, _ in self._steps.values() if not step.closed]

    def fire_until(self, time_ms: int, *, floor_ms: int, limit: float) -> int:
        """Apply the timers that are due by then, in their order, or until `limit` rows are due, but not to before the floor.

        Returns:
            Until when they are applied. It does not depend on timers of sessions that went on or ended: a restart sets none of those.
        """
        while self.timers and self.timers[0][0] <= time_ms:
            if len(self.changed) >= limit and self.timers[0][0] > max(floor_ms, self.now_ms):
                break
            due, *_, what = heapq.heappop(self.timers)
            self.now_ms = max(self.now_ms, due)
            self._fire(what)
        return time_ms if len(self.changed) < limit else min(time_ms, max(floor_ms, self.now_ms))

    def _fire(self, what: OpenStep | Session | Feedback) -> None:
        if isinstance(what, OpenStep):
            self._close_step(what)
        elif isinstance(what, Feedback):
            if what.event_id in self._waiting.get(what.decision_id, ()):
                self._settle_waiting(what.decision_id, Bucket.UNMATCHED, what.event_id)
        elif what.ended is None and self._gap is not None:
            if self.now_ms > what.last_ms + self._gap:
                self._end(what, Ended.TERMINATED, what.last_ms + self._gap)
            else:
                self._set_gap_timer(what)

    def close(self) -> None:
        """Truncate all that is open."""
        for decision_id in list(self._waiting):
            self._settle_waiting(decision_id, Bucket.UNMATCHED)
        for session in list(self.open.values()):
            self._end(session, Ended.TRUNCATED, 0)
        for step in sorted(self.unclosed(), key=lambda step: step.place):
            self._close_step(step)
        self.timers.clear()

    def forget(self) -> None:
        """Drop memories of retired steps and sessions that are too old."""
        drop_forgotten(self._gone, self.now_ms)
        drop_forgotten(self._numbers, self.now_ms)

    def store(self, state: JoinState, *, whole: bool) -> None:
        """Write all of this into a state, or what is new since the last time; it shares the objects, so encode it at once."""
        state.num_closed = self.num_closed
        if whole:
            state.gone, state.numbers, state.active = self._gone, self._numbers, list(self.open.values())
            state.waiting = {decision_id: list(events.values()) for decision_id, events in self._waiting.items()}
            state.sessions = [s for sessions in self._sessions.values() for s in sessions if s.ended is not None]
        else:
            self._new.put_into(state, self._steps, self._waiting)
        self._new = Changes()

    def restore(self, state: JoinState) -> None:
        """Go on from a state; this takes its objects over."""
        self.now_ms, self.num_closed, self._gone, self._numbers = state.watermark_ms, state.num_closed, state.gone, state.numbers
        for event in chain.from_iterable(state.waiting.values()):
            self._wait(event)
        for session in [*state.active, *state.sessions]:
            insort(self._sessions.setdefault(session.session_id, []), session, key=lambda s: s.number)
            if session.ended is None:
                self.open[session.session_id, session.number] = session
                self._set_gap_timer(session)
            for step in session.steps:
                self._steps[step.step_id] = step, session
                if not step.closed:
                    self._set_label_timer(step)
        self._new = Changes()

    def _set_label_timer(self, step: OpenStep) -> None:
        heapq.heappush(self.timers, (step.event_time_ms + self._label_age, _CLOSE, step.step_id, 0, step))

    def _set_gap_timer(self, session: Session) -> None:
        if self._gap is not None:
            heapq.heappush(self.timers, (session.last_ms + self._gap + 1, _GAP, session.session_id, session.number, session))

    # -- decisions

    def apply_decision(self, step: OpenStep) -> None:
        """Apply one decision."""
        session = self._session_of(step)
        if session.num_retired and step.place < session.steps[0].place:  # a retired step already links to that one
            self._settled[DECISIONS][Bucket.LATE] += 1
            self._note_late(step)
            self._leave_behind(step, Bucket.LATE)
            return
        step.name = session.name
        if session.steps and step.place < session.steps[-1].place:
            insort(session.steps, step, key=lambda s: s.place)
        else:
            session.steps.append(step)
        session.num_unclosed += 1
        self._steps[step.step_id] = step, session
        self._new.steps[step.step_id] = step
        self._set_label_timer(step)
        self._touch(session, step.event_time_ms)
        if step.kept:
            self._relink_around(step, session)
        if waiting := self._waiting.pop(step.step_id, None):
            self._new.waiting.add(step.step_id)
            for event in sorted(waiting.values(), key=lambda e: (e.event_time_ms, e.event_id)):
                self.apply_feedback(event)
        self._retire_old_steps(session)

    def _session_of(self, step: OpenStep) -> Session:
        time_ms, sessions = step.event_time_ms, self._sessions.setdefault(step.session_id, [])
        for session in sessions:
            early = self._gap is not None and time_ms < session.first_ms - self._gap
            if not early and (session.ended is None or time_ms <= session.end_ms):
                return session
        number = max([-1, self._numbers.get(step.session_id, (0, -1))[1], *(s.number for s in sessions)]) + 1
        session = Session(step.session_id, number, time_ms, time_ms)
        sessions.append(session)
        self.open[step.session_id, number] = session
        self._set_gap_timer(session)
        if len(self.open) > self._max_open:
            self._end(next(iter(self.open.values())), Ended.TRUNCATED, 0)
        return session

    def _touch(self, session: Session, time_ms: int) -> None:
        if time_ms > session.last_ms:
            session.last_ms = time_ms
        elif time_ms < session.first_ms:
            session.first_ms = time_ms
        if session.ended is None:
            key = session.key
            self.open[key] = self.open.pop(key)
            self._new.active.pop(key, None)
            self._new.active[key] = session
        else:
            self._new.sessions[session.key] = session

    def _close_step(self, step: OpenStep) -> None:
        session = self._steps[step.step_id][1]
        at = session.steps.index(step)
        session.num_unclosed -= 1
        self._new.sessions[session.key] = session
        has_row = step.kept and step.step_id in self._bulks
        bucket = Bucket.JOINED if has_row else Bucket.SKIPPED if step.kept else Bucket.NEVER_SHOWN
        self._settled[DECISIONS][bucket] += 1
        self._settled[FEEDBACK][bucket] += step.num_feedback
        if has_row:
            step.closed, step.num_feedback, step.index = True, 0, session.num_retired + at
            self.num_closed += 1
            self._needs_row(step)
            for later in session.steps[at + 1 :]:  # only when this decision was late
                if later.closed:
                    later.index += 1
                    self._needs_row(later)
        else:
            del session.steps[at]
            self._forget_step(step)
            self._leave_behind(step, bucket)
            if at > 0:
                self._relink(session, at - 1)
        self._retire_if_done(session)

    # -- links

    def _relink_around(self, step: OpenStep, session: Session) -> None:
        at = session.steps.index(step)
        for i in range(max(0, at - 1), at + 1):
            self._relink(session, i)

    def _relink(self, session: Session, at: int) -> None:
        """Set what follows a step, if known: a next list that is or will be logged, or the end. A link stays until there is another."""
        step, following = session.steps[at], session.steps[at + 1 : at + 2]
        if following:
            link = (Ended.HAS_NEXT, following[0].step_id) if following[0].kept else (Ended.OPEN, None)
        else:
            link = (session.ended or Ended.OPEN, None)
        if link[0] is not Ended.OPEN and link != (step.ended, step.next_id):
            step.ended, step.next_id = link
            self._new.steps[step.step_id] = step
            if step.closed:
                self._needs_row(step)

    def _needs_row(self, step: OpenStep) -> None:
        self.changed[step.step_id] = self._new.steps[step.step_id] = step

    def _end(self, session: Session, how: Ended, end_ms: int) -> None:
        session.ended, session.end_ms = how, end_ms
        del self.open[session.key]
        self._new.sessions[session.key] = session
        if session.steps:
            self._relink(session, len(session.steps) - 1)
        self._retire_if_done(session)

    # -- retirement

    def _retire_if_done(self, session: Session) -> None:
        if session.ended is None or session.num_unclosed:
            return
        for step in session.steps:
            self._forget_step(step)
            self._leave_behind(step, Bucket.LATE)
        self._new.sessions.pop(session.key, None)
        self._new.active.pop(session.key, None)
        self._new.left_sessions.append(session.key)
        sessions = self._sessions[session.session_id]
        sessions.remove(session)
        if not sessions:
            del self._sessions[session.session_id]
        _, number = self._numbers.pop(session.session_id, (0, -1))
        self._numbers[session.session_id] = remembered = self.now_ms + self._dedup, max(number, session.number)
        self._new.numbers.pop(session.session_id, None)
        self._new.numbers[session.session_id] = remembered

    def _retire_old_steps(self, session: Session) -> None:
        """Bounds a session that never ends: its oldest steps go once they are closed, linked and too old for late feedback.

        Linked to their neighbour, that is: a list that came late between the two may have its link yet.
        """
        steps = session.steps
        while len(steps) > 1 and steps[0].next_id == steps[1].step_id and self._is_past_amending(first := steps[0]):
            session.num_retired += 1
            self._new.sessions[session.key] = session
            del session.steps[0]
            self._forget_step(first)
            self._leave_behind(first, Bucket.LATE)

    def _forget_step(self, step: OpenStep) -> None:
        del self._steps[step.step_id]
        self._new.steps.pop(step.step_id, None)
        self._new.left_steps.append(step.step_id)

    def _is_past_amending(self, step: OpenStep) -> bool:
        return step.closed and self.now_ms > step.event_time_ms + self._label_age + self._amend

    def _leave_behind(self, step: OpenStep, bucket: Bucket) -> None:
        """Remember for a while what becomes of feedback to a step that is no longer in the state."""
        if not step.closed:
            self._bulks.pop(step.step_id, None)
        self._gone[step.step_id] = self._new.gone[step.step_id] = self.now_ms + self._dedup, bucket
        self._settle_waiting(step.step_id, bucket)

    # -- feedback

    def apply_feedback(self, event: Feedback) -> None:
        """Apply one feedback that is no `leave`."""
        if (found := self._steps.get(event.decision_id)) is None:
            if event.decision_id in self._gone:
                self._settle(event, self._gone[event.decision_id][1])
            else:
                self._wait(event)
            return
        step, session = found
        if step.closed and self._is_past_amending(step):
            bucket = Bucket.LATE
        elif event.session_id != step.session_id or not self._change(step, session, event):
            bucket = Bucket.UNMATCHED
        else:
            self._touch(session, event.event_time_ms)
            if not step.closed:
                step.num_feedback += 1
                return
            bucket = Bucket.JOINED
        self._settle(event, bucket)

    def _change(self, step: OpenStep, session: Session, event: Feedback) -> bool:
        pair, column = None, self._columns.get(event.behaviour)
        if event.item_id is not None:
            try:
                pair = step.item_ids.index(event.item_id)
            except ValueError:
                return False
        if column is not None and pair is not None:
            self._combine(step, event, pair * len(self._columns) + column[0], column[1])
        elif event.behaviour == SHOWN:
            if pair is None:
                step.shown = list(map(or_, step.shown, step.listed))
            else:
                step.shown[pair] = True
            if not step.kept and any(step.shown):
                step.kept = True
                self._relink_around(step, session)
        else:
            return False
        self._new.steps[step.step_id] = step
        if step.closed:
            self._needs_row(step)
        return True

    def _combine(self, step: OpenStep, event: Feedback, cell: int, combine: str) -> None:
        if combine == "sum":
            step.values[cell] = step.values.get(cell, 0.0) + event.value
        elif combine == "max":
            step.values[cell] = max(step.values.get(cell, event.value), event.value)
        else:
            place = event.event_time_ms, event.event_id
            if cell not in step.newest or place > step.newest[cell]:
                step.values[cell], step.newest[cell] = event.value, place

    def apply_leave(self, event: Feedback) -> None:
        """A `leave` ends the open session; one that arrives behind later lists of that session ends nothing."""
        sessions = self._sessions.get(event.session_id, [])
        newest = [s for s in sessions if s.ended is None]
        ended = [s for s in newest if event.event_time_ms >= (s.steps[-1].event_time_ms if s.steps else s.first_ms)]
        self._settled[FEEDBACK][Bucket.JOINED if ended else Bucket.UNMATCHED] += 1
        for session in ended:
            self._end(session, Ended.TERMINATED, event.event_time_ms)

    def _wait(self, event: Feedback) -> None:
        waiting = self._waiting.setdefault(event.decision_id, {})
        if event.event_id in waiting:  # it waits for longer than ids are remembered, `join.dedup_s`
            self._settle(event, Bucket.DUPLICATE)
            return
        waiting[event.event_id] = event
        self._new.waiting.add(event.decision_id)
        heapq.heappush(self.timers, (event.event_time_ms + self._patience, _PATIENCE, event.event_id, 0, event))

    def _settle(self, event: Feedback, bucket: Bucket) -> None:
        self._settled[FEEDBACK][bucket] += 1
        if bucket is Bucket.LATE:
            self._note_late(event)

    def _settle_waiting(self, decision_id: str, bucket: Bucket, event_id: str | None = None) -> None:
        if (waiting := self._waiting.get(decision_id)) is None:
            return
        self._new.waiting.add(decision_id)
        for waited in [event_id] if event_id is not None else list(waiting):
            self._settle(waiting.pop(waited), bucket)
        if not waiting:
            self._waiting.pop(decision_id, None)
