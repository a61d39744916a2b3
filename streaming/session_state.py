"""What the session join remembers between events, in the form in which it is stored: msgspec structs.

The wide part of a decision (`Bulk`) is not in it: a step keeps its offset, and after a restart its bulk is read from the topic again.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec
import numpy as np

from esrl_ray.errors import LogError
from esrl_ray.vocabulary import Bools, Bucket, Ended, Floats, Ints, StepRow
from streaming.wire import DecodedDecision, Feedback

STATE_VERSION = 2

Topic = Literal["decisions", "feedback"]
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
    def name(self) -> str:
        """The session id of rows."""
        return f"{self.session_id}#{self.number}" if self.number else self.session_id


class JoinState(msgspec.Struct):
    """Everything that a join of one partition needs to go on; timers are derived from it."""

    version: int
    partition: int
    watermark_ms: int
    newest_ms: dict[str, int]  # topic -> newest event time seen
    settled: dict[str, dict[Bucket, int]]  # topic -> bucket -> events, since the first event ever
    seen: dict[int, list[str]]  # event time // 1 s -> event ids with a prefix for the topic
    pending_decisions: list[OpenStep]
    pending_feedback: list[Feedback]
    num_closed: int = 0
    waiting: list[Feedback] = []
    open_sessions: list[Session] = []  # least recently active first
    ended_sessions: list[Session] = []
    gone: dict[str, tuple[int, Bucket]] = {}  # decision id -> forgotten at, bucket of its feedback; oldest first
    numbers: dict[str, tuple[int, int]] = {}  # session id -> forgotten at, last number; oldest first


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(JoinState)


def encode_state(state: JoinState) -> bytes:
    """Msgpack bytes of a join's state."""
    return _encoder.encode(state)


def decode_state(payload: bytes, partition: int) -> JoinState:
    """Read a stored state.

    Raises:
        LogError: it is damaged, of another version, or of another partition.
    """
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
