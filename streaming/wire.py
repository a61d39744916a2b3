"""The two events on the wire, and how bytes become them.

Our own records are msgpack with arrays as little-endian bytes; anyone's may be JSON with arrays as (nested) lists or base64. The
header `content-type` picks the decoder (`application/msgpack` or `application/json`, the default); `schema_version` is in each event.
Records are keyed by the session id; Kafka's default murmur2 partitioner gives both topics' records of a session the same partition.
"""

from __future__ import annotations

import math
import struct
from itertools import accumulate
from typing import Annotated, Any

import msgspec
import numpy as np

from esrl_ray.errors import WireError
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Arm, Floats, Ints, Refusal

SCHEMA_VERSION = 1
MSGPACK, JSON = b"application/msgpack", b"application/json"
SHOWN, LEAVE = "shown", "leave"  # built-in behaviours; both may come without an item
MAX_ID_BYTES, MAX_EVENT_BYTES, MAX_PAIRS = 128, 4 * 2**20, 1_000
SHORT = MAX_ID_BYTES // 4
"""Text of at most so many characters cannot have too many bytes: most ids need no closer look."""
FLOAT, INT = np.dtype("<f4"), np.dtype("<i4")
_FLOATS: tuple[str, ...] = ("states", "scores", "actions", "anchor_actions", "fused_scores")
_ALL_FLOATS = (*_FLOATS, "candidate_means")

Array = bytes | list[float | list[float]]
Code = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Codes = bytes | list[Code | list[Code]]
"""Of its own type: a decoder gives floats for the numbers of an `Array`, and a code of 1.7 would be cut to 1."""


Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""What the step log keeps in 32 bits."""
Version = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
EpochMs = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Position = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
ArmName = Annotated[str, msgspec.Meta(pattern=rf"\A({'|'.join(Arm)})\Z")]
Pairs = msgspec.Meta(max_length=MAX_PAIRS)
"""Checked by the decoder: four million empty texts fit into one event, and would take 800 MB as a list."""


class _Versioned(msgspec.Struct):
    """Any event of any version."""

    schema_version: int


class Decision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What serving computed for one request: l shown pairs, then K unshown candidates drawn at random (G in all)."""

    schema_version: int
    decision_id: str  # minted by serving; also the event id and the step id
    request_id: str
    session_id: str
    user_id: str
    event_time_ms: EpochMs
    policy_version: Version
    round: Count
    arm: ArmName
    spec_digest: str
    num_candidates: Count
    item_ids: Annotated[list[str], Pairs]  # G
    positions: Annotated[list[Position], Pairs]  # G, -1 = not shown
    states: Array  # (G, F) float32
    categorical: Codes  # (G, C) int32
    scores: Array  # (G, k) float32, raw
    actions: Array  # (G, A) float32
    anchor_actions: Array  # (G, A) float32
    fused_scores: Array  # (G,) float32
    candidate_means: Array | None = None  # (F + k,) float32, of states and log scores over all candidates; None: not told


class Feedback(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the user did to one item of one list. `leave`, and `shown` of a whole list, carry no item."""

    schema_version: int
    event_id: str
    decision_id: str
    session_id: str
    behaviour: str
    event_time_ms: EpochMs
    item_id: str | None = None
    value: float = 1.0


Event = Decision | Feedback


class DecodedDecision(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A checked decision with its arrays."""

    event: Decision
    states: Floats  # (G, F)
    categorical: Ints  # (G, C)
    scores: Floats  # (G, k)
    actions: Floats  # (G, A)
    anchor_actions: Floats  # (G, A)
    fused_scores: Floats  # (G,)
    candidate_means: Floats | None = None  # (F + k,)


_decision_decoders: dict[bytes, Any] = {MSGPACK: msgspec.msgpack.Decoder(Decision).decode, JSON: msgspec.json.Decoder(Decision).decode}
_feedback_decoders: dict[bytes, Any] = {MSGPACK: msgspec.msgpack.Decoder(Feedback).decode, JSON: msgspec.json.Decoder(Feedback).decode}
_version_decoders: dict[bytes, Any] = {MSGPACK: msgspec.msgpack.Decoder(_Versioned), JSON: msgspec.json.Decoder(_Versioned)}
_encoder = msgspec.msgpack.Encoder()


def encode(event: Event) -> bytes:
    """Msgpack bytes of one of our own events; send with header `content-type: application/msgpack`."""
    return _encoder.encode(event)


def _packed(value: Any, shape: tuple[int, ...], name: str, code: str = "f") -> bytes:
    """The bytes of an array: a list of numbers or of rows becomes four little-endian bytes for each number."""
    if isinstance(value, bytes):
        if len(value) != 4 * math.prod(shape):
            raise WireError(f"{name} has {len(value)} bytes, expected 4 for each value of shape {shape}", Refusal.WRONG_WIDTH)
        return value
    nested = len(shape) > 1 and bool(value) and isinstance(value[0], list)
    if len(value) != (shape[0] if nested else math.prod(shape)):
        raise WireError(f"{name} has {len(value)} {'rows' if nested else 'values'}, expected shape {shape}", Refusal.WRONG_WIDTH)
    rows, width = (value, shape[1]) if nested else ([value], len(value))
    pack = struct.Struct(f"<{width}{code}").pack  # numpy needs three times as long for a list
    try:
        return b"".join([pack(*row) for row in rows])
    except (struct.error, TypeError, ValueError) as error:
        raise WireError(f"{name}: {error}, expected shape {shape}", Refusal.WRONG_WIDTH) from error
    except OverflowError as error:
        raise WireError(f"{name}: {error}", Refusal.NOT_FINITE) from error


def _check_ids(**ids: str | None) -> None:
    for name, value in ids.items():
        if value is not None and not 0 < len(value.encode()) <= MAX_ID_BYTES:
            raise WireError(f"{name} has {len(value.encode())} bytes, expected 1 to {MAX_ID_BYTES}", Refusal.WRONG_ID)


def _decode(payload: bytes | None, content_type: bytes, decoders: dict[bytes, Any]) -> Any:
    if not payload:
        raise WireError("the record has no value", Refusal.NO_VALUE)
    if len(payload) > MAX_EVENT_BYTES:
        raise WireError(f"the record has {len(payload)} bytes, at most {MAX_EVENT_BYTES} are read", Refusal.TOO_LARGE)
    decode = decoders.get(content_type)
    if decode is None:
        raise WireError(f"content-type {content_type!r} is unknown, expected {MSGPACK!r} or {JSON!r}", Refusal.UNKNOWN_CONTENT_TYPE)
    kind = "Decision" if decoders is _decision_decoders else "Feedback"
    try:
        event = decode(payload)
    except msgspec.ValidationError as error:
        _check_version(payload, content_type)  # another version's fields say nothing
        code = Refusal.MISSING_FIELD if "missing required field" in str(error) else Refusal.WRONG_FIELD
        raise WireError(f"not a {kind}: {error}", code) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a {kind}: {error}", Refusal.MALFORMED) from error
    if event.schema_version != SCHEMA_VERSION:
        _check_version(payload, content_type)
    return event


def _check_version(payload: bytes, content_type: bytes) -> None:
    try:
        version = _version_decoders[content_type].decode(payload).schema_version
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # the event's own decoder says more
    if version != SCHEMA_VERSION:
        raise WireError(f"schema_version {version} is not supported, expected {SCHEMA_VERSION}", Refusal.UNKNOWN_SCHEMA_VERSION)


def decode_feedback(payload: bytes | None, content_type: bytes = JSON) -> Feedback:
    """Decode and check one feedback record.

    Raises:
        WireError: the bytes are not a valid `Feedback`; the text names the field.
    """
    event: Feedback = _decode(payload, content_type, _feedback_decoders)
    item_id = event.item_id
    if not (
        0 < len(event.event_id) <= SHORT
        and 0 < len(event.decision_id) <= SHORT
        and 0 < len(event.session_id) <= SHORT
        and 0 < len(event.behaviour) <= SHORT
        and (item_id is None or 0 < len(item_id) <= SHORT)
    ):
        _check_ids(
            event_id=event.event_id,
            decision_id=event.decision_id,
            session_id=event.session_id,
            item_id=item_id,
            behaviour=event.behaviour,
        )
    if not math.isfinite(event.value):
        raise WireError(f"value {event.value} is not finite", Refusal.NOT_FINITE)
    if item_id is None and event.behaviour not in (SHOWN, LEAVE):
        raise WireError(f"behaviour {event.behaviour!r} needs an item_id", Refusal.MISSING_FIELD)
    return event


def decode_decision(payload: bytes | None, spec: Spec, content_type: bytes = JSON) -> DecodedDecision:
    """Decode and check one decision record against the deployment's spec.

    Raises:
        WireError: the bytes are not a valid `Decision` of this spec; the text names the field, widths and digests.
    """
    event: Decision = _decode(payload, content_type, _decision_decoders)
    item_ids = event.item_ids
    lengths = [len(event.decision_id), len(event.request_id), len(event.session_id), len(event.user_id), *map(len, item_ids)]
    if not 0 < min(lengths) <= max(lengths) <= SHORT:
        _check_ids(decision_id=event.decision_id, request_id=event.request_id, session_id=event.session_id, user_id=event.user_id)
        _check_ids(**{f"item_ids[{i}]": item for i, item in enumerate(item_ids)})
    if event.spec_digest != spec.digest:
        raise WireError(f"spec_digest {event.spec_digest} differs from this deployment's {spec.digest}", Refusal.OTHER_SPEC)
    g, k, a = len(item_ids), spec.num_scores, spec.num_actions
    if not 0 < g <= MAX_PAIRS or len(event.positions) != g or len(set(item_ids)) != g:
        raise WireError(
            f"{g} item_ids ({len(set(item_ids))} different) with {len(event.positions)} positions, expected 1 to {MAX_PAIRS} of each",
            Refusal.WRONG_WIDTH,
        )
    shapes: list[tuple[int, ...]] = [(g, spec.num_features), (g, k), (g, a), (g, a), (g,)]
    given: list[Array | Codes] = [event.states, event.scores, event.actions, event.anchor_actions, event.fused_scores]
    names = _FLOATS
    if event.candidate_means is not None:
        names = _ALL_FLOATS
        shapes.append((spec.num_features + k,))
        given.append(event.candidate_means)
    given.append(event.categorical)
    packed = [*map(_packed, given, shapes, names), _packed(event.categorical, (g, spec.num_categorical), "categorical", "i")]
    if packed != given:  # lists of Python's numbers take eight times the memory
        event = msgspec.structs.replace(event, **dict(zip((*names, "categorical"), packed, strict=True)))
    floats = np.frombuffer(b"".join(packed[:-1]), FLOAT)
    if not np.isfinite(floats).all():
        wrong = [name for name, values in zip(names, packed, strict=False) if not np.isfinite(np.frombuffer(values, FLOAT)).all()]
        raise WireError(f"{wrong[0]} holds a value that is not finite", Refusal.NOT_FINITE)
    ends = list(accumulate(map(math.prod, shapes)))
    arrays = [floats[end - math.prod(shape) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]
    decoded = DecodedDecision(
        event=event,
        categorical=np.frombuffer(packed[-1], INT).reshape(g, spec.num_categorical),
        **dict(zip(names, arrays, strict=True)),
    )
    for c, feature in enumerate(spec.categorical_features):
        codes = decoded.categorical[:, c]
        if codes.min() < 0 or codes.max() >= feature.cardinality:
            raise WireError(
                f"categorical {feature.name} holds {int(codes.min())}..{int(codes.max())}, expected 0..{feature.cardinality - 1}",
                Refusal.UNKNOWN_CATEGORY,
            )
    return decoded
