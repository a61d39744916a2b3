"""The session join of one partition: a pure function of the events, the clock and the end-of-topic flags that it is given.

Events wait until the watermark has passed them and are then applied in the order of their event time, together with the
timers (label age, inactivity gap, patience with feedback without decision). So the order of arrival does not matter as long as no
event is more than `join.lateness_s` out of order in its topic; what comes later than that is applied at once, behind the others.

Watermark: min over both topics of (newest event time - lateness); a topic that is read to its end follows clock - lateness if that
is later. It never goes down.

Ledger: a decision is joined when its step closes, feedback when it is applied to a closed step or its step closes. Until then both
are in an open session. Every event is in exactly one bucket at any time.

The state holds no bulk. A joiner that goes on from one lacks that of the steps which have no row yet, and wants their decisions again
(`lacking`, `give_back`, or else `skip_lacking`) before it advances.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

from esrl_ray.config import Config
from esrl_ray.reward import rewards_of
from esrl_ray.vocabulary import Bucket, Floats, StepRow
from streaming.open_sessions import OpenSessions
from streaming.session_state import (
    DECISIONS,
    FEEDBACK,
    STATE_VERSION,
    Bulk,
    JoinState,
    OpenStep,
    Topic,
    bulk_of,
    encode_state,
    open_step,
    read_chain,
    step_row,
)
from streaming.wire import LEAVE, Decision, DecodedDecision, Event, Feedback

_FIRST_DECISIONS, _THEN_FEEDBACK, _LAST_LEAVE = range(3)  # events, in this order at the same time


class SessionJoiner:
    """Joins decisions and feedback of one partition into steps.

    Args:
        partition: Of both topics.
        config: Sections `join`, `reward`, `spec`.
        state: What `snapshot` returned, from a whole one on; None starts with the first event ever.

    Attributes:
        is_behind: The last `advance` stopped at its limit.

    Raises:
        LogError: the state is damaged or belongs to another partition.
    """

    def __init__(self, partition: int, config: Config, *, state: Sequence[bytes] | None = None) -> None:
        self._partition, self._reward, self._spec = partition, config.reward, config.spec.build()
        self._caps = np.asarray([b.cap for b in config.reward.behaviours], np.float64)
        self._lateness, self._dedup = round(config.join.lateness_s * 1000), round(config.join.dedup_s * 1000)
        self._require_shown = config.join.require_shown
        self._newest: dict[str, int] = {}
        self._settled: dict[str, Counter[Bucket]] = {DECISIONS: Counter(), FEEDBACK: Counter()}
        self._seen: set[str] = set()
        self._seen_by_second: dict[int, list[str]] = {}
        self._pending: list[tuple[int, int, str, OpenStep | Feedback]] = []
        self._num_taken = 0  # of the pending ones, when the watermark last moved
        self._new_pending: list[OpenStep | Feedback] = []  # those that no snapshot has
        self._num_stored: dict[int, int] = {}  # second -> how many of its ids the last snapshot and those before it have
        self._bulks: dict[str, Bulk] = {}  # decision id -> what its first row needs
        self._lacking: dict[str, int] = {}
        self._keep_late = config.kafka.late_topics
        self._overdue: dict[str, Decision] = {}  # pushed behind the watermark since it last moved: a late decision is one of them
        self._late: list[Event] = []
        self.is_behind = False
        self._sessions = OpenSessions(config, self._settled, self._bulks, self._note_late)
        if state is not None:
            self._restore(read_chain(state, partition))

    @property
    def watermark_ms(self) -> int:
        """Event time up to which everything has been applied; 0 before there is one."""
        return self._sessions.now_ms

    @property
    def lead_ms(self) -> int:
        """How much further, in event time, `decisions` has been pushed than `feedback`; negative when it is behind."""
        return self._newest.get(DECISIONS, 0) - self._newest.get(FEEDBACK, 0)

    @property
    def num_open_sessions(self) -> int:
        """Sessions that have neither ended nor been truncated."""
        return len(self._sessions.open)

    @property
    def num_closed(self) -> int:
        """Distinct steps closed since the first event ever."""
        return self._sessions.num_closed

    @property
    def lacking(self) -> dict[str, int]:
        """Decision id -> offset of the decisions that are needed again."""
        return self._lacking

    @property
    def ledger(self) -> dict[tuple[str, Bucket], int]:
        """(topic, bucket) -> events since the first event ever; open sessions are counted from the state."""
        decisions, feedback = self._sessions.num_unsettled()
        pending = sum(isinstance(event, OpenStep) for *_, event in self._pending)
        return {
            **{(topic, bucket): amount for topic, settled in self._settled.items() for bucket, amount in settled.items()},
            (DECISIONS, Bucket.IN_OPEN_SESSION): decisions + pending,
            (FEEDBACK, Bucket.IN_OPEN_SESSION): feedback + len(self._pending) - pending,
        }

    def settle(self, topic: Topic, bucket: Bucket, amount: int = 1) -> None:
        """Count events that never reach the join (dead letters)."""
        self._settled[topic][bucket] += amount

    def give_back(self, offset: int, decoded: DecodedDecision) -> bool:
        """Take a decision that is lacking; False when it is not the one that stood at that offset."""
        decision_id = decoded.event.decision_id
        if self._lacking.get(decision_id) != offset:
            return False
        del self._lacking[decision_id]
        self._take_bulk(decoded)
        return True

    def skip_lacking(self) -> None:
        """Go on without the decisions that are lacking: their lists will have no row, and are counted as skipped with their feedback."""
        self._lacking = {}

    def push(self, decisions: Sequence[tuple[int, DecodedDecision]], feedback: Sequence[tuple[int, Feedback]]) -> None:
        """Take events, each topic's in the order of its offsets: (offset, event)."""
        for offset, decoded in decisions:
            decision = decoded.event
            if self._is_new(DECISIONS, decision, decision.decision_id):
                self._take_bulk(decoded)
                self._push(open_step(decoded, offset, require_shown=self._require_shown))
        seen, by_second, horizon = self._seen, self._seen_by_second, self.watermark_ms - self._dedup
        newest = self._newest.get(FEEDBACK, 0)
        for _, event in feedback:
            event_id, time_ms = event.event_id, event.event_time_ms
            if time_ms < horizon or (key := FEEDBACK[0] + event_id) in seen:
                self._is_new(FEEDBACK, event, event_id)  # it is not, and is counted
                continue
            # What _is_new and _push do, without two calls for each of the most frequent events.
            newest = time_ms if time_ms > newest else newest
            seen.add(key)
            second = time_ms // 1000
            if second in by_second:
                by_second[second].append(key)
            else:
                by_second[second] = [key]
            self._pending.append((time_ms, _LAST_LEAVE if event.behaviour == LEAVE else _THEN_FEEDBACK, event_id, event))
        if feedback:
            self._newest[FEEDBACK] = max(newest, self._newest.get(FEEDBACK, 0))

    def advance(self, *, clock_ms: int, decisions_at_end: bool, feedback_at_end: bool, limit: float = math.inf) -> list[StepRow]:
        """Move the watermark, apply what it has passed, and return the rows that this makes.

        After a pause the label age of everything open may have passed: with a limit the watermark then moves in parts, `is_behind` until
        it has come where it could be. To the join a slower watermark is like any other.

        Args:
            clock_ms: Now; the rows' `closed_ms`.
            decisions_at_end: Everything in the topic `decisions` of this partition has been pushed.
            feedback_at_end: The same for `feedback`.
            limit: Rows after which the watermark goes no further; those that are due in the same millisecond come all the same.
        """
        assert not self._lacking, "a row without its bulk"
        marks = []
        for topic, at_end in ((DECISIONS, decisions_at_end), (FEEDBACK, feedback_at_end)):
            newest = max(self._newest.get(topic, 0), clock_ms if at_end else 0)
            marks.append(newest - self._lateness)
        watermark = max(self.watermark_ms, min(marks))
        self._run(watermark, limit)
        self.is_behind = self.watermark_ms < watermark
        return self._rows(clock_ms)

    def close(self, *, clock_ms: int) -> list[StepRow]:
        """End of the data: apply everything pushed, truncate what is open, and return the rows that this makes, however many."""
        self.is_behind = False
        self._run(max([self.watermark_ms, *(pending[0] + 1 for pending in self._pending)]))
        self._sessions.close()
        return self._rows(clock_ms)

    def take_late(self) -> list[Event]:
        """What was counted late since the last call; nothing when `kafka.late_topics` is off."""
        late, self._late = self._late, []
        return late

    def undecided(self) -> Iterator[str]:
        """Ids of feedback that may yet be counted late: it is not applied, or waits for its decision."""
        yield from (event.event_id for *_, event in self._pending if isinstance(event, Feedback))
        yield from self._sessions.waiting()

    def snapshot(self, *, whole: bool = True) -> bytes:
        """What is needed to go on from here; the rows of `advance` so far count as delivered. Call it after `advance`, before `push`.

        Args:
            whole: Everything; else what is new since the last snapshot of this joiner, to be read after it.
        """
        assert self._num_taken == len(self._pending), "events were pushed since the last advance"
        pending = [event for *_, event in self._pending] if whole else self._new_pending
        stored = {} if whole else self._num_stored
        seen = {s: ids[stored.get(s, 0) :] for s, ids in self._seen_by_second.items() if len(ids) > stored.get(s, 0)}
        self._num_stored = {second: len(ids) for second, ids in self._seen_by_second.items()}
        self._new_pending = []
        state = JoinState(
            version=STATE_VERSION,
            partition=self._partition,
            watermark_ms=self.watermark_ms,
            newest_ms=self._newest,
            settled={topic: dict(settled) for topic, settled in self._settled.items()},
            seen=seen,
            seen_from_s=self._seen_from_s(),
            pending_decisions=[event for event in pending if isinstance(event, OpenStep)],
            pending_feedback=[event for event in pending if isinstance(event, Feedback)],
        )
        self._sessions.store(state, whole=whole)
        return encode_state(state)

    def _restore(self, state: JoinState) -> None:
        self._newest, self._seen_by_second = state.newest_ms, state.seen
        self._seen = set(chain.from_iterable(state.seen.values()))
        for topic, settled in state.settled.items():
            self._settled[topic].update(settled)
        events: list[OpenStep | Feedback] = [*state.pending_decisions, *state.pending_feedback]
        for event in events:
            self._push(event)
        self._num_taken = len(self._pending)
        self._num_stored = {second: len(ids) for second, ids in state.seen.items()}
        self._sessions.restore(state)
        self._lacking = {step.step_id: step.offset for step in [*state.pending_decisions, *self._sessions.unclosed()]}

    def _is_new(self, topic: Topic, event: Event, event_id: str) -> bool:
        event_time_ms = event.event_time_ms
        self._newest[topic] = max(event_time_ms, self._newest.get(topic, event_time_ms))
        key = topic[0] + event_id
        if event_time_ms < self.watermark_ms - self._dedup:
            self.settle(topic, Bucket.LATE)
            self._note_late(event)
        elif key in self._seen or (topic == DECISIONS and self._sessions.knows(event_id)):
            self.settle(topic, Bucket.DUPLICATE)
        else:
            self._seen.add(key)
            self._seen_by_second.setdefault(event_time_ms // 1000, []).append(key)
            return True
        return False

    def _take_bulk(self, decoded: DecodedDecision) -> None:
        decision = decoded.event
        self._bulks[decision.decision_id] = bulk_of(decoded)
        if decision.event_time_ms < self.watermark_ms:
            self._overdue[decision.decision_id] = decision

    def _note_late(self, event: Event | OpenStep) -> None:
        if self._keep_late:
            self._late.append(self._overdue[event.step_id] if isinstance(event, OpenStep) else event)

    def _push(self, event: OpenStep | Feedback) -> None:
        if isinstance(event, OpenStep):
            order, event_id = _FIRST_DECISIONS, event.step_id
        else:
            order, event_id = _LAST_LEAVE if event.behaviour == LEAVE else _THEN_FEEDBACK, event.event_id
        self._pending.append((event.event_time_ms, order, event_id, event))

    def _run(self, watermark: int, limit: float = math.inf) -> None:
        """Events and timers in the order of their time. A timer is due at the watermark; an event there may still have company to come.

        With a limit it ends early, at a time of which all timers and no event have been applied.
        """
        sessions, timers, pending = self._sessions, self._sessions.timers, self._pending
        apply: tuple[Callable[[Any], None], ...] = (sessions.apply_decision, sessions.apply_feedback, sessions.apply_leave)
        new, at = pending[self._num_taken :], 0
        before, last = self.watermark_ms, -1  # it never goes down; time of the last event applied
        pending.sort()  # mostly in order already; no two are equal in all but the event
        for time_ms, order, _, event in pending:
            if (timers and timers[0][0] <= time_ms) or len(sessions.changed) >= limit:
                floor = max(before, last + 1)
                reached = sessions.fire_until(min(time_ms, watermark), floor_ms=floor, limit=limit)
                if len(sessions.changed) >= limit and reached >= floor:
                    watermark = reached
                    break
            if time_ms >= watermark:
                break
            sessions.now_ms = max(sessions.now_ms, time_ms)
            apply[order](event)
            last = time_ms
            at += 1
        watermark = sessions.fire_until(watermark, floor_ms=max(before, last + 1), limit=limit)
        del pending[:at]
        sessions.now_ms = watermark
        sessions.forget()
        self._new_pending = [event for event in self._new_pending if event.event_time_ms >= watermark]
        self._new_pending += [event for time_ms, _, _, event in new if time_ms >= watermark]
        self._num_taken = len(pending)
        self._overdue = {}
        horizon = self._seen_from_s()
        for second in [second for second in self._seen_by_second if second < horizon]:
            self._seen.difference_update(self._seen_by_second.pop(second))

    def _seen_from_s(self) -> int:
        """Ids of earlier seconds are forgotten."""
        return (self.watermark_ms - self._dedup) // 1000

    def _rows(self, closed_ms: int) -> list[StepRow]:
        steps, b = list(self._sessions.changed.values()), len(self._caps)
        if not steps:
            return []
        self._sessions.changed = {}
        ends = list(accumulate(len(step.item_ids) for step in steps))
        starts = [0, *ends[:-1]]
        values = np.zeros(ends[-1] * b, np.float64)
        cells = [start * b + cell for step, start in zip(steps, starts, strict=True) for cell in step.values]
        values[cells] = [value for step in steps for value in step.values.values()]
        behaviours: Floats = np.clip(values.reshape(-1, b), -self._caps, self._caps).astype(np.float32)
        shown = np.array([seen for step in steps for seen in step.shown], np.bool_)
        rewards = rewards_of(behaviours, self._reward) * shown[:, None]
        rows = []
        for step, start, end in zip(steps, starts, ends, strict=True):
            step.revision += 1
            rows.append(
                step_row(
                    step,
                    {} if step.revision else self._bulks.pop(step.step_id),
                    shown=shown[start:end],
                    behaviours=behaviours[start:end],
                    rewards=rewards[start:end],
                    partition=self._partition,
                    closed_ms=closed_ms,
                )
            )
        return rows
