"""Producers change before and after we do: what each change of an event's fields becomes, in both encodings, for both events."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from esrl_ray.config import CategoricalConfig, Config
from esrl_ray.errors import WireError
from esrl_ray.vocabulary import Refusal
from streaming.wire import JSON, MSGPACK, Decision, Feedback, decode_decision, decode_feedback
from tests.unit.test_wire import FEEDBACK
from tests.unit.test_wire import decision as decision_fields

Fields = Mapping[str, Any]
ENCODERS = {JSON: msgspec.json.encode, MSGPACK: msgspec.msgpack.encode}
ACCEPTED = None
MISSING, WRONG = Refusal.MISSING_FIELD, Refusal.WRONG_FIELD


def without(name: str) -> Any:
    return lambda fields: {n: value for n, value in fields.items() if n != name}


def changed(**changes: object) -> Any:
    return lambda fields: {**fields, **changes}


def reordered(fields: Fields) -> Fields:
    return dict(reversed(list(fields.items())))


def next_version(fields: Fields) -> Fields:
    """Version 2 also renamed and retyped fields: its number is what matters."""
    return {"schema_version": 2, "session": fields["session_id"], "event_time_ms": "now"}


# event, change, what is done to the fields, code of the refusal (None: accepted), what the reason names
MATRIX = [
    ("decision", "field added", changed(device="tv", nested={"a": [1]}), ACCEPTED, ""),
    ("decision", "fields reordered", reordered, ACCEPTED, ""),
    ("decision", "required field removed", without("user_id"), MISSING, "user_id"),
    ("decision", "required field renamed", lambda f: {**without("arm")(f), "branch": "x"}, MISSING, "arm"),
    ("decision", "retyped, text for a number", changed(event_time_ms="5"), WRONG, "event_time_ms"),
    ("decision", "retyped, number for a text", changed(session_id=7), WRONG, "session_id"),
    ("decision", "retyped, one value for a list", changed(item_ids="a"), WRONG, "item_ids"),
    ("decision", "retyped, whole float for an integer", changed(num_candidates=9.0), WRONG, "num_candidates"),
    ("decision", "retyped, float for a code", changed(categorical=[[1.7], [0]]), WRONG, "categorical"),
    ("decision", "optional field removed", without("candidate_means"), ACCEPTED, ""),
    ("decision", "nullable field null", changed(candidate_means=None), ACCEPTED, ""),
    ("decision", "required field null", changed(states=None), WRONG, "states"),
    ("decision", "null in a list", changed(item_ids=["a", None]), WRONG, "item_ids"),
    ("decision", "unknown schema version", changed(schema_version=2), Refusal.UNKNOWN_SCHEMA_VERSION, "schema_version 2"),
    ("decision", "unknown schema version, other fields", next_version, Refusal.UNKNOWN_SCHEMA_VERSION, "schema_version 2"),
    ("decision", "schema version removed", without("schema_version"), MISSING, "schema_version"),
    ("decision", "another spec digest", changed(spec_digest="other"), Refusal.OTHER_SPEC, "spec_digest other"),
    ("decision", "another width, same digest", changed(scores=[[1.0]] * 2), Refusal.WRONG_WIDTH, "scores"),
    ("feedback", "field added", changed(device="tv", nested={"a": [1]}), ACCEPTED, ""),
    ("feedback", "fields reordered", reordered, ACCEPTED, ""),
    ("feedback", "required field removed", without("behaviour"), MISSING, "behaviour"),
    ("feedback", "optional field removed", without("value"), ACCEPTED, ""),
    ("feedback", "item removed where one is needed", without("item_id"), MISSING, "item_id"),
    ("feedback", "retyped, text for a number", changed(value="1"), WRONG, "value"),
    ("feedback", "retyped, integer for a float", changed(value=3), ACCEPTED, ""),
    ("feedback", "retyped, list for a text", changed(item_id=["a"]), WRONG, "item_id"),
    ("feedback", "required field null", changed(event_id=None), WRONG, "event_id"),
    ("feedback", "nullable field null", changed(item_id=None, behaviour="leave"), ACCEPTED, ""),
    ("feedback", "optional field that is not nullable, null", changed(value=None), WRONG, "value"),
    ("feedback", "unknown schema version", changed(schema_version=2), Refusal.UNKNOWN_SCHEMA_VERSION, "schema_version 2"),
    ("feedback", "unknown schema version, other fields", next_version, Refusal.UNKNOWN_SCHEMA_VERSION, "schema_version 2"),
    ("feedback", "schema version removed", without("schema_version"), MISSING, "schema_version"),
]


@pytest.mark.parametrize("encoding", list(ENCODERS), ids=["json", "msgpack"])
@pytest.mark.parametrize("row", MATRIX, ids=[f"{row[0]}: {row[1]}" for row in MATRIX])
def test_a_change_of_the_schema_is_accepted_or_refused_with_the_fields_name(
    config: Config, encoding: bytes, row: tuple[str, str, Any, Refusal | None, str]
) -> None:
    event, _, apply, code, named = row
    fields = apply(decision_fields(config) if event == "decision" else {**FEEDBACK, "value": 2.0})
    payload = ENCODERS[encoding](fields)

    def decode() -> Decision | Feedback:
        return decode_decision(payload, config.spec.build(), encoding).event if event == "decision" else decode_feedback(payload, encoding)

    if code is not ACCEPTED:
        with pytest.raises(WireError, match=named) as caught:
            decode()
        assert caught.value.code is code
    else:
        read = msgspec.structs.asdict(decode())
        for name, value in fields.items():
            if isinstance(found := read.get(name, value), bytes):  # an array
                assert found == np.asarray(value, "<f4").tobytes()
            else:
                assert found == value


@pytest.mark.parametrize("encoding", list(ENCODERS), ids=["json", "msgpack"])
@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([[3], [0]], ACCEPTED),
        ([3, 0], ACCEPTED),
        ([[1.7], [0]], WRONG),
        ([[1.0], [0]], WRONG),
        ([[True], [0]], WRONG),
        ([[2**31], [0]], WRONG),
        ([[4], [0]], Refusal.UNKNOWN_CATEGORY),
        ([[-1], [0]], Refusal.UNKNOWN_CATEGORY),
        ([[], []], Refusal.WRONG_WIDTH),
    ],
    ids=str,
)
def test_the_code_of_a_category_is_an_integer(config: Config, encoding: bytes, codes: list[Any], code: Refusal | None) -> None:
    tab = CategoricalConfig(name="tab", cardinality=4, side="item")
    coded = config.model_copy(update={"spec": config.spec.model_copy(update={"categorical_features": (tab,)})})
    payload = ENCODERS[encoding](decision_fields(coded, categorical=codes))
    if code is not ACCEPTED:
        with pytest.raises(WireError, match="categorical") as caught:
            decode_decision(payload, coded.spec.build(), encoding)
        assert caught.value.code is code
    else:
        assert decode_decision(payload, coded.spec.build(), encoding).categorical.tolist() == [[3], [0]]


@pytest.mark.parametrize(
    ("payload", "content_type", "code"),
    [
        (None, JSON, Refusal.NO_VALUE),
        (b"", MSGPACK, Refusal.NO_VALUE),
        (b"{", JSON, Refusal.MALFORMED),
        (b"\xc1", MSGPACK, Refusal.MALFORMED),
        (b'{"x":' + b"[" * 100_000, JSON, Refusal.MALFORMED),
        (b"[]", JSON, Refusal.WRONG_FIELD),
        (b" " * (4 * 2**20 + 1), JSON, Refusal.TOO_LARGE),
        (b"{}", b"text/csv", Refusal.UNKNOWN_CONTENT_TYPE),
        (msgspec.json.encode({**FEEDBACK, "event_id": ""}), JSON, Refusal.WRONG_ID),
    ],
)
def test_bytes_that_are_no_event_have_a_code_too(payload: bytes | None, content_type: bytes, code: Refusal) -> None:
    with pytest.raises(WireError) as caught:
        decode_feedback(payload, content_type)
    assert caught.value.code is code
    assert pickle.loads(pickle.dumps(caught.value)).code is code
