"""What the session join remembers between events, in the form in which it is stored: msgspec structs.

It is stored as a chain: a whole state, then what changed since the one before. `read_chain` puts a chain together again.

The wide part of a decision (`Bulk`) is not in it: a step keeps its offset, and after a restart its bulk is read from the topic again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypedDict

import msgspec
import numpy as np

from esrl_ray.errors import LogError
from esrl_ray.vocabulary import Bools, Bucket, Ended, Floats, Ints, StepRow
from streaming.wire import DecodedDecision, Feedback

STATE_VERSION = 3

Topic = Literal["decisions", "feedback"]
SessionKey = tuple[str, int]
"""Session id of the app, number of the visit."""
DECISIONS: Topic = "decisions"
FEEDBACK: Topic = "feedback"


class Bulk(TypedDict, total=False):
    """The wide part of a decision, under the names of `StepRow`; forgotten once its row is written, and never stored."""

    item_ids: tuple[str, ...]  # G
    positions: Ints  # (G,)
    states: Floats  # (G, F)
    categorical: Ints  # (G, C)
    scores: Floats  # (G, k)
    actions: Floats  # (G, A)
    anchor_actions: Floats  # (G, A)
    fused_scores: Floats  # (G,)
    candidate_means: Floats | None  # (F + k,)


class OpenStep(msgspec.Struct, array_like=True, eq=False, gc=False):
    """A step that can still change: its label age is not reached (`closed` False), or its session is open."""

    step_id: str
    session_id: str  # as the app sent it
    user_id: str
    offset: int
    event_time_ms: int
    arm: str
    policy_version: int
    round: int
    num_candidates: int
    item_ids: list[str]  # G
    listed: list[bool]  # (G,) position >= 0: what `shown` without an item stands for
    shown: list[bool]  # (G,)
    kept: bool  # it has a shown pair, so it is or will be logged
    values: dict[int, float] = {}  # g * num_behaviours + behaviour -> combined value, not capped yet
    newest: dict[int, tuple[int, str]] = {}  # the same cell -> (event_time_ms, event_id) behind it, for `last`
    num_feedback: int = 0  # applied while not closed
    closed: bool = False
    name: str = ""  # the session with `#n`
    index: int = 0
    revision: int = -1  # of the newest row
    next_id: str | None = None
    ended: Ended = Ended.OPEN

    @property
    def place(self) -> tuple[int, str]:
        """Order of the steps of a session."""
        return self.event_time_ms, self.step_id


class Session(msgspec.Struct, array_like=True, eq=False, gc=False):
    """One visit: a session id of the app may come back, as session `id#1`, `id#2`, ..."""

    session_id: str
    number: int
    first_ms: int
    last_ms: int  # of any activity
    steps: list[OpenStep] = []  # by (event_time_ms, step_id); dropped and retired ones are gone
    num_unclosed: int = 0
    num_retired: int = 0  # steps that were retired before the session
    ended: Ended | None = None  # terminated or truncated
    end_ms: int = 0  # a late decision up to here still belongs to it

    @property
    def key(self) -> SessionKey:
        """Of this session."""
        return self.session_id, self.number

    @property
    def name(self) -> str:
        """The session id of rows."""
        return f"{self.session_id}#{self.number}" if self.number else self.session_id


class JoinState(msgspec.Struct):
    """Everything that a join of one partition needs to go on, or what of it is new since the state before; timers are derived from it."""

    version: int
    partition: int
    watermark_ms: int
    newest_ms: dict[str, int]  # topic -> newest event time seen
    settled: dict[str, dict[Bucket, int]]  # topic -> bucket -> events, since the first event ever
    seen: dict[int, list[str]]  # event time // 1 s -> new event ids with a prefix for the topic
    seen_from_s: int  # those of earlier seconds are forgotten
    pending_decisions: list[OpenStep]  # new ones; those before the watermark are pending no longer
    pending_feedback: list[Feedback]
    num_closed: int = 0
    waiting: dict[str, list[Feedback]] = {}  # decision id -> all that waits for it; empty: nothing does any longer
    left_steps: list[str] = []
    left_sessions: list[SessionKey] = []
    sessions: list[Session] = []  # changed ones, or all that ended; their steps as far as they changed
    active: list[Session] = []  # the same of those that go to the end of the order of activity, or all open ones
    gone: dict[str, tuple[int, Bucket]] = {}  # new ones: decision id -> forgotten at, bucket of its feedback; oldest first
    numbers: dict[str, tuple[int, int]] = {}  # new ones: session id -> forgotten at, last number; oldest first


@dataclass(slots=True)
class Changes:
    """What is new in the open sessions since the last state."""

    steps: dict[str, OpenStep] = field(default_factory=dict)
    sessions: dict[SessionKey, Session] = field(default_factory=dict)
    active: dict[SessionKey, Session] = field(default_factory=dict)  # touched while open, in this order
    left_steps: list[str] = field(default_factory=list)
    left_sessions: list[SessionKey] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)  # decision ids for which what waits has changed
    gone: dict[str, tuple[int, Bucket]] = field(default_factory=dict)
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def put_into(
        self, state: JoinState, steps: Mapping[str, tuple[OpenStep, Session]], waiting: Mapping[str, Mapping[str, Feedback]]
    ) -> None:
        """Fill a state that builds on another.

        Args:
            state: Of now.
            steps: All steps, each with its session.
            waiting: Decision id -> event id -> feedback that waits for the decision.
        """
        changed: dict[SessionKey, list[OpenStep]] = {}
        for step_id, step in self.steps.items():
            session = steps[step_id][1]
            changed.setdefault(session.key, []).append(step)
            self.sessions[session.key] = session
        others = [session for key, session in self.sessions.items() if key not in self.active]
        state.sessions, state.active = (
            [msgspec.structs.replace(session, steps=changed.get(session.key, [])) for session in sessions]
            for sessions in (others, self.active.values())
        )
        state.waiting = {decision_id: list(waiting.get(decision_id, {}).values()) for decision_id in self.waiting}
        state.left_steps, state.left_sessions, state.gone, state.numbers = self.left_steps, self.left_sessions, self.gone, self.numbers


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(JoinState)


def encode_state(state: JoinState) -> bytes:
    """Msgpack bytes of a join's state."""
    return _encoder.encode(state)


def read_chain(payloads: Sequence[bytes], partition: int) -> JoinState:
    """The whole state at the end of a chain: a whole one, then changes.

    Raises:
        LogError: it is damaged, of another version, or of another partition.
    """
    states = [_decode(payload, partition) for payload in payloads]
    return states[0] if len(states) == 1 else _put_together(states)


def users_in(payload: bytes) -> set[str]:
    """Ids of the users whose steps a state holds, or has new.

    Raises:
        MsgspecError, UnicodeDecodeError: it is damaged, or of another version.
    """
    state = _decoder.decode(payload)
    steps = chain(state.pending_decisions, *(session.steps for session in chain(state.sessions, state.active)))
    return {step.user_id for step in steps}


def drop_forgotten(memory: dict[str, tuple[int, Any]], now_ms: int) -> None:
    """Drop the oldest entries, as far as they are to be forgotten before now."""
    while memory and memory[first := next(iter(memory))][0] < now_ms:
        del memory[first]


def _put_together(states: Sequence[JoinState]) -> JoinState:
    whole = states[0]
    sessions: dict[SessionKey, Session] = {}  # open ones in the order of their activity, ended ones anywhere
    steps: dict[SessionKey, dict[str, OpenStep]] = {}
    key_of: dict[str, SessionKey] = {}
    for state in states:
        for step_id in state.left_steps:
            if (key := key_of.pop(step_id, None)) is not None:
                del steps[key][step_id]
        for key in state.left_sessions:
            sessions.pop(key, None)
            steps.pop(key, None)
        for session in state.active:
            sessions.pop(session.key, None)
        for session in chain(state.sessions, state.active):
            key = session.key
            sessions[key] = session
            steps.setdefault(key, {}).update((step.step_id, step) for step in session.steps)
            key_of.update((step.step_id, key) for step in session.steps)
        if state is not whole:
            for second, ids in state.seen.items():
                whole.seen.setdefault(second, []).extend(ids)
            whole.pending_decisions += state.pending_decisions
            whole.pending_feedback += state.pending_feedback
            whole.waiting |= state.waiting
            whole.gone |= state.gone
            for session_id, number in state.numbers.items():
                whole.numbers.pop(session_id, None)
                whole.numbers[session_id] = number
    last = states[-1]
    for key, session in sessions.items():
        session.steps = sorted(steps[key].values(), key=lambda step: step.place)
    drop_forgotten(whole.gone, last.watermark_ms)
    drop_forgotten(whole.numbers, last.watermark_ms)
    return msgspec.structs.replace(
        last,
        seen={second: ids for second, ids in whole.seen.items() if second >= last.seen_from_s},
        pending_decisions=[step for step in whole.pending_decisions if step.event_time_ms >= last.watermark_ms],
        pending_feedback=[event for event in whole.pending_feedback if event.event_time_ms >= last.watermark_ms],
        waiting={decision_id: events for decision_id, events in whole.waiting.items() if events},
        left_steps=[],
        left_sessions=[],
        sessions=[session for session in sessions.values() if session.ended is not None],
        active=[session for session in sessions.values() if session.ended is None],
        gone=whole.gone,
        numbers=whole.numbers,
    )


def _decode(payload: bytes, partition: int) -> JoinState:
    try:
        state = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LogError(f"the state of the join cannot be read: {error}", f"partition {partition}") from error
    if state.version != STATE_VERSION or state.partition != partition:
        raise LogError(
            f"the state of the join has version {state.version} of partition {state.partition}, expected {STATE_VERSION} of {partition}",
            f"partition {partition}",
        )
    return state


def open_step(decoded: DecodedDecision, offset: int, *, require_shown: bool) -> OpenStep:
    """The step that a decision begins."""
    event = decoded.event
    listed = [position >= 0 for position in event.positions]
    return OpenStep(
        step_id=event.decision_id,
        session_id=event.session_id,
        user_id=event.user_id,
        offset=offset,
        event_time_ms=event.event_time_ms,
        arm=event.arm,
        policy_version=event.policy_version,
        round=event.round,
        num_candidates=event.num_candidates,
        item_ids=event.item_ids,
        listed=listed,
        shown=[False] * len(listed) if require_shown else list(listed),
        kept=not require_shown and any(listed),
    )


def bulk_of(decoded: DecodedDecision) -> Bulk:
    """What a step's first row needs beside the step."""
    return {
        "item_ids": tuple(decoded.event.item_ids),
        "positions": np.array(decoded.event.positions, np.int32),
        "states": decoded.states,
        "categorical": decoded.categorical,
        "scores": decoded.scores,
        "actions": decoded.actions,
        "anchor_actions": decoded.anchor_actions,
        "fused_scores": decoded.fused_scores,
        "candidate_means": decoded.candidate_means,
    }


def step_row(step: OpenStep, bulk: Bulk, *, shown: Bools, behaviours: Floats, rewards: Floats, partition: int, closed_ms: int) -> StepRow:
    """The row of a step as it is now.

    Args:
        step: The closed step, its revision already counted up.
        bulk: For its first row; empty for an amendment.
        shown: (G,).
        behaviours: (G, num_behaviours) combined values.
        rewards: (G, q).
        partition: Of both topics.
        closed_ms: Clock.
    """
    return StepRow(
        step_id=step.step_id,
        revision=step.revision,
        session_id=step.name,
        user_id=step.user_id,
        index=step.index,
        partition=partition,
        offset=step.offset,
        event_time_ms=step.event_time_ms,
        closed_ms=closed_ms,
        arm=step.arm,
        policy_version=step.policy_version,
        round=step.round,
        num_candidates=step.num_candidates,
        shown=shown,
        behaviours=behaviours,
        rewards=rewards,
        next_id=step.next_id,
        ended=step.ended,
        **bulk,
    )
