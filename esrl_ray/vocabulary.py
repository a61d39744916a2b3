"""The nouns that code, YAML, Kafka, metrics and documents share. `Event`s live in `streaming.wire`, parts in their own files.

Dimensions used in shape comments: B steps in a batch, G pairs of a step (l shown + K unshown, padded), N candidates of a request,
F numeric features, C categorical features, k upstream scores, A = 2k action dimensions, q reward groups, m critics a group,
H next lists of a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NotRequired, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

Lineage = Mapping[str, int]
"""{worker: commit}: the last commit of each ingest worker's step log that something has seen."""


class Ended(StrEnum):
    """What follows a step: nothing known yet, a next list, the user left, or we stopped looking."""

    OPEN = "open"
    HAS_NEXT = "has_next"
    TERMINATED = "terminated"
    TRUNCATED = "truncated"


class Arm(StrEnum):
    """Which policy a user gets: anchor + noise, the newest gated policy, or the hand-made one."""

    EXPLORE = "explore"
    EXPLOIT = "exploit"
    CONTROL = "control"


class Bucket(StrEnum):
    """Where an acknowledged event ended up. Every event is in exactly one bucket (`NOT_YET_READ` is end offset - position)."""

    JOINED = "joined"
    DUPLICATE = "duplicate"
    LATE = "late"
    DEAD_LETTER = "dead_letter"
    NEVER_SHOWN = "never_shown"
    UNMATCHED = "unmatched"
    SKIPPED = "skipped"  # by `kafka.on_gap: skip`: deleted before it was read, or a list whose decision was before its row
    IN_OPEN_SESSION = "in_open_session"
    NOT_YET_READ = "not_yet_read"


class Refusal(StrEnum):
    """Why a record is no valid event: the header `code` of its dead letter, and a tag of metrics."""

    NO_VALUE = "no-value"
    TOO_LARGE = "too-large"
    UNKNOWN_CONTENT_TYPE = "unknown-content-type"
    MALFORMED = "malformed"  # neither JSON nor msgpack
    UNKNOWN_SCHEMA_VERSION = "unknown-schema-version"
    MISSING_FIELD = "missing-field"
    WRONG_FIELD = "wrong-field"  # type or range
    WRONG_ID = "wrong-id"
    OTHER_SPEC = "other-spec"
    WRONG_WIDTH = "wrong-width"
    NOT_FINITE = "not-finite"
    UNKNOWN_CATEGORY = "unknown-category"
    UNDECLARED_BEHAVIOUR = "undeclared-behaviour"
    FAR_FUTURE = "far-future"
    KEY_MISMATCH = "key-mismatch"
    WRONG_PARTITION = "wrong-partition"
    NOT_SIGNED = "not-signed"  # with a key of serve.decision_keys


class Round(msgspec.Struct, frozen=True):
    """One turn of progressive training: exploration is uniform in [low, high] around the anchor policy's action."""

    number: int
    anchor_version: int
    salt: int
    low: float
    high: float
    started_ms: int


class StepRow(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One row of the step log: a step when it closes (bulky fields set), or a later revision of it (bulky fields None).

    Behaviours, rewards, shown, next_id and ended are absolute: a reader keeps, per step_id, the fields of the highest revision and
    the bulky fields of the first row.
    """

    step_id: str
    revision: int
    session_id: str  # with `#n` after an inactivity gap
    user_id: str
    index: int  # position of the step in its session, from 0
    partition: int
    offset: int  # of the decision in its topic
    event_time_ms: int  # of the decision
    closed_ms: int  # clock when this row was made
    arm: str
    policy_version: int
    round: int
    num_candidates: int
    shown: Bools  # (G,)
    behaviours: Floats  # (G, num_behaviours) combined values, in the order of the configuration
    rewards: Floats  # (G, q)
    next_id: str | None
    ended: Ended
    item_ids: tuple[str, ...] | None = None  # G
    positions: Ints | None = None  # (G,) -1 = not shown
    states: Floats | None = None  # (G, F)
    categorical: Ints | None = None  # (G, C)
    scores: Floats | None = None  # (G, k)
    actions: Floats | None = None  # (G, A)
    anchor_actions: Floats | None = None  # (G, A)
    fused_scores: Floats | None = None  # (G,)
    candidate_means: Floats | None = None  # (F + k,) of the numeric input over all candidates; None also where the decision had none


class TransitionBatch(TypedDict):
    """Columns of B sampled transitions: a step and its next list. Padding pairs are 0 with valid = shown = 0."""

    states: Floats  # (B, G, F)
    categorical: Ints  # (B, G, C)
    scores: Floats  # (B, G, k) raw upstream scores; 1 in padding, so that logs stay finite
    actions: Floats  # (B, G, A)
    anchor_actions: Floats  # (B, G, A)
    rewards: Floats  # (B, G, q)
    shown: Floats  # (B, G) 1 = the user saw it
    valid: Floats  # (B, G) 1 = a real pair
    next_states: Floats  # (B, G, F) of the next list; 0 where there is none
    next_categorical: Ints  # (B, G, C)
    next_scores: Floats  # (B, G, k)
    next_shown: Floats  # (B, G)
    has_next: Floats  # (B,) 1 = bootstrap from the next list; 0 = terminated or truncated without one
    terminated: Floats  # (B,) 1 = the user left
    candidate_means: NotRequired[Floats]  # (B, F + k) of the raw numeric input over the request's candidates
    cohort: NotRequired[Ints]  # (B,) one number for lists of one round, arm and kind of means
    future_known: NotRequired[Floats]  # (B, H) of the next H lists of the session: 1 = that list is here
    future_terminated: NotRequired[Floats]  # (B, H) 1 = the user left after it
    future_change_known: NotRequired[Floats]  # (B,) 1 = the second next request is there, its means of the same kind
    future_change: NotRequired[Floats]  # (B, F + k) of the candidates' mean raw inputs, from this request to the second next; 0 without


def cut_lineage(lineage: Lineage) -> str:
    """Text of a lineage for logs: `ingest-0@12 ingest-1@9`."""
    return " ".join(f"{worker}@{commit}" for worker, commit in sorted(lineage.items()))
