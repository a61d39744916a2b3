"""What comes from outside and means harm: no bytes end the worker or the replica, take much memory, or pass half checked."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esrl_ray.config import Config
from esrl_ray.errors import RequestError, WireError
from esrl_ray.vocabulary import Arm
from serve.api import MAX_TOLD, application
from serve.explain import MAX_EXPLAINED_BYTES
from serve.schemas import MAX_BODY_BYTES, parse
from streaming.wire import JSON, MAX_EVENT_BYTES, MAX_ID_BYTES, MAX_PAIRS, MSGPACK, decode_decision, decode_feedback
from tests.unit.test_replica import deployment, http, replica_of, store_of
from tests.unit.test_schemas import CONFIG as DEPLOYMENT
from tests.unit.test_schemas import request
from tests.unit.test_wire import FEEDBACK, decision

MEBI = 2**20
TYPES = (JSON, MSGPACK)
_encode: dict[bytes, Callable[[Any], bytes]] = {JSON: msgspec.json.encode, MSGPACK: msgspec.msgpack.encode}

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=200) | st.binary(max_size=200),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=10,
)


def decode_both(config: Config, payload: bytes) -> None:
    """As both events in both encodings: a WireError, or an event whose every bound holds."""
    for content_type in TYPES:
        try:
            event = decode_feedback(payload, content_type)
            assert math.isfinite(event.value) and 0 < len(event.event_id.encode()) <= MAX_ID_BYTES
        except WireError as error:
            assert error.what and error.code
        try:
            decoded = decode_decision(payload, config.spec.build(), content_type)
            assert decoded.states.shape[0] == len(decoded.event.item_ids) <= MAX_PAIRS and Arm(decoded.event.arm)
        except WireError as error:
            assert error.what and error.code


@given(payload=st.binary(max_size=500))
def test_random_bytes_are_refused_by_a_wire_error(config: Config, payload: bytes) -> None:
    decode_both(config, payload)


@given(data=st.data(), content_type=st.sampled_from(TYPES), of_decision=st.booleans())
def test_events_with_other_values_bytes_or_ends_are_accepted_whole_or_refused(
    config: Config, data: st.DataObject, content_type: bytes, of_decision: bool
) -> None:
    event = decision(config) if of_decision else dict(FEEDBACK)
    name = data.draw(st.sampled_from(sorted(event)))
    payload = bytearray(_encode[content_type](event | {name: data.draw(anything)}))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(payload) - 1), st.integers(0, 255)), max_size=3)):
        payload[at] = byte
    decode_both(config, bytes(payload[: data.draw(st.none() | st.integers(0, len(payload)))]))


def crafted(event: dict[str, object], name: str, raw: bytes) -> bytes:
    """Msgpack of an event with raw bytes as one value, whatever they are."""
    pairs = [msgspec.msgpack.encode(key) + (raw if key == name else msgspec.msgpack.encode(value)) for key, value in event.items()]
    return b"\xde" + struct.pack(">H", len(pairs)) + b"".join(pairs)


def lists(num: int, inner: bytes = b"") -> bytes:
    """A msgpack array that says it has `num` values."""
    return b"\xdd" + struct.pack(">I", num) + inner


@pytest.mark.parametrize("name", ["item_ids", "positions", "states", "arm", "session_id", "not_in_the_schema"])
def test_hostile_sizes_and_depths_cost_little_memory_for_their_bytes(config: Config, name: str) -> None:
    event = {"not_in_the_schema": 0} | decision(config)
    payloads = [
        crafted(event, name, lists(2**32 - 1)),
        crafted(event, name, b"\xdf\xff\xff\xff\xff"),
        crafted(event, name, b"\xdb\xff\xff\xff\xff"),
    ]
    payloads += [crafted(event, name, lists(MEBI, byte * MEBI)) for byte in (b"\xa0", b"\x00", b"\x90", b"\xc0")]
    payloads += [
        crafted(event, name, b"\x91" * MEBI),
        crafted(event, name, b"\x81\xa0" * MEBI),
        crafted(event, name, b"\xdb\x00\x10\x00\x00" + b"x" * MEBI),
    ]
    payloads += [
        f'{{"{name}":{text}'.encode() for text in ("[" * MEBI, '{"a":' * MEBI, "9" * MEBI, "1e" + "9" * MEBI, "[" + "[]," * (MEBI // 3))
    ]
    for payload in payloads:
        tracemalloc.start()
        try:
            decode_both(config, payload)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100 * MEBI, (payload[:20], peak)


def test_more_items_than_a_decision_has_are_refused_before_they_are_read(config: Config) -> None:
    payload = crafted(decision(config), "item_ids", lists(MEBI, b"\xa0" * MEBI))
    tracemalloc.start()
    with pytest.raises(WireError, match=f"length <= {MAX_PAIRS}"):
        decode_decision(payload, config.spec.build(), MSGPACK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEBI


def test_an_event_above_the_limit_is_not_decoded(config: Config) -> None:
    for content_type in TYPES:
        with pytest.raises(WireError, match=f"at most {MAX_EVENT_BYTES} are read"):
            decode_feedback(b"[" * (MAX_EVENT_BYTES + 1), content_type)


@pytest.mark.parametrize("arm", ["", "x", "control\n", "Control"])
def test_an_arm_that_readers_of_the_log_do_not_know_is_refused(config: Config, arm: str) -> None:
    with pytest.raises(WireError, match="arm"):
        decode_decision(msgspec.json.encode(decision(config, arm=arm)), config.spec.build(), JSON)


@given(data=st.data())
def test_every_request_is_parsed_or_refused_with_a_field(data: st.DataObject) -> None:
    body = request()
    values = anything.filter(lambda value: "bytes" not in repr(type(value)))
    payload = bytearray(json.dumps(body | {data.draw(st.sampled_from(sorted(body))): data.draw(values)}, default=str).encode())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(payload) - 1), st.integers(0, 255)), max_size=3)):
        payload[at] = byte
    try:
        parse(bytes(payload), DEPLOYMENT.spec.build(), DEPLOYMENT)
    except RequestError as error:
        assert error.where


def test_the_endpoint_answers_hostile_bodies_with_413_and_422_in_few_words(tmp_path: Path) -> None:
    nested = [b'{"candidates":' + b"[" * depth + b"1" + b"]" * depth + b"}" for depth in (100, 500, 900, 990, 1_000, 10_000)]
    bodies = [b"", b"\xff", b"null", b"[" * MEBI, b'{"' + b"k" * MEBI + b'":1}', b'{"list_size":' + b"9" * MEBI + b"}", *nested]
    bodies += [
        b'{"candidates":[{"scores":{"a":{}},"scores":%s}],"candidates":%s}' % (v, w) for v in (b"[]", b"1") for w in (b"[1]", b"{}", b"2")
    ]
    bodies += [b'{"candidates":[{"scores":{"a":{}},"scores":[]}]}', b'{"user_features":{"a":{}},"user_features":[]}']
    bodies += [b'{"candidates":[' + b"[]," * (MAX_EXPLAINED_BYTES // 3) + b"[]]}"]

    async def scenario() -> None:
        config = deployment(tmp_path)
        replica, producer = replica_of(config, store_of(config))
        await replica.start()
        app = application(replica, None)
        for body in bodies:
            status, _, content = await http(app, "POST", "/v1/fuse", body)
            assert status == 422 and len(content) < 3 * MAX_TOLD, body[:20]
        assert (await http(app, "POST", "/v1/fuse", b"[" * (MAX_BODY_BYTES + 1)))[0] == 413
        assert not producer.sent
        await replica.stop()

    asyncio.run(scenario())
