"""Events on the wire: what is refused, with its field, so that nothing refused later can stop a worker."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from esrl_ray.config import Config
from esrl_ray.errors import WireError
from streaming.wire import JSON, MSGPACK, SCHEMA_VERSION, Decision, Feedback, decode_decision, decode_feedback, encode

FEEDBACK = {
    "schema_version": 1,
    "event_id": "e",
    "decision_id": "d",
    "session_id": "s",
    "behaviour": "click",
    "event_time_ms": 5,
    "item_id": "a",
}


def decision(config: Config, **changes: object) -> dict[str, object]:
    spec = config.spec.build()
    rows = {name: [[1.0] * width] * 2 for name, width in (("states", spec.num_features), ("scores", spec.num_scores))}
    rows |= {name: [[0.0] * spec.num_actions] * 2 for name in ("actions", "anchor_actions")}
    fields: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "decision_id": "d",
        "request_id": "r",
        "session_id": "s",
        "user_id": "u",
        "event_time_ms": 5,
        "policy_version": 1,
        "round": 0,
        "arm": "control",
        "spec_digest": spec.digest,
        "num_candidates": 9,
        "item_ids": ["a", "b"],
        "positions": [0, -1],
        "categorical": [],
        "fused_scores": [1.0, 0.5],
        "candidate_means": [0.5] * (spec.num_features + spec.num_scores),
    }
    return fields | rows | changes


def test_both_encodings_give_the_same_event(config: Config) -> None:
    text = decode_decision(msgspec.json.encode(decision(config)), config.spec.build(), JSON)
    assert text.event.states == text.states.tobytes(), "a list of numbers is not kept"
    binary = decode_decision(encode(text.event), config.spec.build(), MSGPACK)
    assert binary.event == text.event
    np.testing.assert_array_equal(binary.states, text.states)
    np.testing.assert_array_equal(binary.scores, text.scores)
    means = text.candidate_means
    assert means is not None and (means == 0.5).all() and text.event.candidate_means == means.tobytes()
    np.testing.assert_array_equal(binary.candidate_means, text.candidate_means)
    untold = decode_decision(msgspec.json.encode(decision(config, candidate_means=None)), config.spec.build(), JSON)
    assert untold.candidate_means is None and (untold.fused_scores == text.fused_scores).all()
    event = decode_feedback(msgspec.json.encode(FEEDBACK))
    assert decode_feedback(encode(event), MSGPACK) == event == Feedback(**FEEDBACK)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"positions": [2**40, 1]}, "positions"),
        ({"positions": [-2, 1]}, "positions"),
        ({"num_candidates": 2**40}, "num_candidates"),
        ({"round": 2**40}, "round"),
        ({"policy_version": 2**63 + 5}, "policy_version"),
        ({"event_time_ms": -1}, "event_time_ms"),
        ({"item_ids": ["a", "a"]}, "item_ids"),
        ({"scores": [[1.0]] * 2}, "scores"),
        ({"scores": [[1.0], [1.0, 2.0]]}, "scores"),
        ({"fused_scores": [1.0, 1e39]}, "fused_scores"),
        ({"fused_scores": [[1.0], [2.0]]}, "fused_scores"),
        ({"fused_scores": [1.0]}, "fused_scores"),
        ({"candidate_means": [1.0]}, "candidate_means"),
        ({"candidate_means": [[1.0] * 23] * 2}, "candidate_means"),
        ({"candidate_means": [*[1.0] * 22, 1e39]}, "candidate_means"),
        ({"spec_digest": "other"}, "spec_digest"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_decision_that_the_log_cannot_hold_is_refused(config: Config, changes: dict[str, object], named: str) -> None:
    with pytest.raises(WireError, match=named):
        decode_decision(msgspec.json.encode(decision(config, **changes)), config.spec.build(), JSON)


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (None, "no value"),
        (b"{", "not a Feedback"),
        (b"\xff\xfe", "not a Feedback"),
        (msgspec.json.encode({**FEEDBACK, "event_time_ms": -(10**26)}), "event_time_ms"),
        (msgspec.json.encode({**FEEDBACK, "item_id": None}), "needs an item_id"),
        (msgspec.json.encode({**FEEDBACK, "event_id": "e" * 129}), "event_id"),
        (msgspec.json.encode({k: v for k, v in FEEDBACK.items() if k != "behaviour"}), "behaviour"),
    ],
)
def test_feedback_that_is_none_is_refused(payload: bytes | None, named: str) -> None:
    with pytest.raises(WireError, match=named):
        decode_feedback(payload)


def test_the_decision_struct_is_what_serving_sends(config: Config) -> None:
    assert set(decision(config)) == set(Decision.__struct_fields__)
