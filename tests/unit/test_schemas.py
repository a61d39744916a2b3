"""What a request may be, and which field a refusal names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from esrl_ray.config import CategoricalConfig, Config, SpecConfig
from esrl_ray.errors import RequestError
from esrl_ray.spec import Spec
from serve.schemas import LARGEST, parse

CONFIG = Config(
    spec=SpecConfig(
        user_features=("act", "pat"),
        item_features=("duration", "age"),
        context_features=("hour",),
        categorical_features=(
            CategoricalConfig(name="country", cardinality=5, side="user"),
            CategoricalConfig(name="genre", cardinality=7, side="item"),
            CategoricalConfig(name="tab", cardinality=3, side="context"),
            CategoricalConfig(name="author", cardinality=9, side="item"),
        ),
        scores=("click", "watch"),
    )
)
SPEC: Spec = CONFIG.spec.build()
NAN, INF = float("nan"), float("inf")


def request(num_candidates: int = 5) -> dict[str, Any]:
    return {
        "request_id": "r",
        "session_id": "s",
        "user_id": "u",
        "user_features": [0.5, -0.5],
        "context_features": {"hour": 3},
        "user_categorical": [4],
        "context_categorical": {"tab": 2},
        "candidates": [
            {
                "item_id": f"i{n}",
                "features": [1.0 + n, 2.0] if n % 2 == 0 else {"age": 2.0, "duration": 1.0 + n},
                "scores": [0.1, 0.2 + n] if n % 2 == 0 else {"watch": 0.2 + n, "click": 0.1},
                "categorical": [6, n] if n % 2 == 0 else {"author": n, "genre": 6},
            }
            for n in range(num_candidates)
        ],
    }


def refusal(body: bytes, config: Config = CONFIG) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        parse(body, SPEC, config)
    return caught.value.where, caught.value.what


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    tree = copy.deepcopy(request())
    change(tree)
    return json.dumps(tree).encode()


def put(*path: str | int, value: Any = None, remove: bool = False) -> Callable[[dict[str, Any]], object]:
    def change(tree: Any) -> None:
        for part in path[:-1]:
            tree = tree[part]
        if remove:
            del tree[path[-1]]
        else:
            tree[path[-1]] = value

    return change


def test_arrays_and_objects_give_the_same_states() -> None:
    parsed = parse(json.dumps(request()).encode(), SPEC, CONFIG)
    expected = np.array([[0.5, -0.5, 1.0 + n, 2.0, 3.0] for n in range(5)], np.float32)
    np.testing.assert_array_equal(parsed.states, expected)
    assert parsed.states.dtype == parsed.scores.dtype == np.float32
    np.testing.assert_array_equal(parsed.scores, np.array([[0.1, 0.2 + n] for n in range(5)], np.float32))
    np.testing.assert_array_equal(parsed.categorical, np.array([[4, 6, 2, n] for n in range(5)], np.int32))
    assert parsed.list_size == 5


def test_the_list_is_never_longer_than_the_candidates() -> None:
    assert parse(json.dumps(request(3)).encode(), SPEC, CONFIG).list_size == 3
    assert parse(changed(put("list_size", value=2)), SPEC, CONFIG).list_size == 2


C = "candidates"
BAD = [
    (put(C, 3, "scores", "click", remove=True), "candidates[3].scores.click"),
    (put(C, 3, "scores", "click", value=NAN), "candidates[3].scores.click"),
    (put(C, 2, "scores", 1, value=NAN), "candidates[2].scores.watch"),
    (put(C, 2, "scores", 1, value=-INF), "candidates[2].scores.watch"),
    (put(C, 2, "scores", 1, value=2 * LARGEST), "candidates[2].scores.watch"),
    (put(C, 2, "scores", 1, value=10**400), "candidates[2].scores.watch"),
    (put(C, 2, "scores", 1, value="0.5"), "candidates[2].scores.watch"),
    (put(C, 2, "scores", 1, value=True), "candidates[2].scores.watch"),
    (put(C, 2, "scores", 1, value=None), "candidates[2].scores.watch"),
    (put(C, 3, "scores", "watch", value="0.5"), "candidates[3].scores.watch"),
    (put(C, 3, "scores", "share", value=0.5), "candidates[3].scores.share"),
    (put(C, 2, "scores", value=0.5), "candidates[2].scores"),
    (put(C, 2, "scores", remove=True), "candidates[2].scores"),
    (put(C, 2, "features", value=[1.0]), "candidates[2].features"),
    (put(C, 2, "features", value=[1.0, 2.0, 3.0]), "candidates[2].features"),
    (put(C, 1, "features", "colour", value=1.0), "candidates[1].features.colour"),
    (put(C, 2, "price", value=3), "candidates[2].price"),
    (put(C, 1, "item_id", value="i0"), "candidates[1].item_id"),
    (put(C, 1, "item_id", value="é" * 100), "candidates[1].item_id"),
    (put(C, 1, "item_id", value=""), "candidates[1].item_id"),
    (put(C, 1, "item_id", value=7), "candidates[1].item_id"),
    (put(C, 0, value=5), "candidates[0]"),
    (put(C, value={}), "candidates"),
    (put(C, value=[]), "candidates"),
    (put(C, remove=True), "candidates"),
    (put(C, 1, "categorical", "genre", value=7), "candidates[1].categorical.genre"),
    (put(C, 1, "categorical", "genre", value=-1), "candidates[1].categorical.genre"),
    (put(C, 1, "categorical", "genre", value=1.5), "candidates[1].categorical.genre"),
    (put(C, 0, "categorical", 1, value=2**40), "candidates[0].categorical.author"),
    (put(C, 0, "categorical", remove=True), "candidates[0].categorical"),
    (put("user_categorical", value=[5]), "user_categorical.country"),
    (put("context_categorical", "tab", value=3), "context_categorical.tab"),
    (put("user_features", value=[1.0]), "user_features"),
    (put("user_features", 1, value=NAN), "user_features.pat"),
    (put("context_features", "hour", remove=True), "context_features.hour"),
    (put("mood", value=1), "mood"),
    (put("session_id", remove=True), "session_id"),
    (put("session_id", value="x" * 129), "session_id"),
    (put("list_size", value=0), "list_size"),
    (put("list_size", value=CONFIG.max_pairs + 1), "list_size"),
    (put("list_size", value="3"), "list_size"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=[f"{i}-{field}" for i, (_, field) in enumerate(BAD)])
def test_a_bad_value_is_refused_with_its_field(change: Callable[[dict[str, Any]], object], field: str) -> None:
    where, what = refusal(changed(change))
    assert where == field
    assert what


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"request_id": "a\\ud800"}'])
def test_what_is_no_json_object_is_refused_as_a_whole(body: bytes) -> None:
    assert refusal(body)[0] in ("body", "request_id")


def test_too_many_candidates_are_refused_with_both_numbers() -> None:
    many = json.dumps(request(CONFIG.serve.max_candidates + 1)).encode()
    where, what = refusal(many)
    assert where == "candidates" and "501" in what and "500" in what


def test_every_single_byte_changed_is_either_refused_or_decoded() -> None:
    """No input may raise anything but RequestError: what it raised would be a 500."""
    body = json.dumps(request(2)).encode()
    rng = np.random.default_rng(0)
    for _ in range(3_000):
        broken = bytearray(body)
        broken[rng.integers(len(body))] = rng.integers(256)
        try:
            parsed = parse(bytes(broken), SPEC, CONFIG)
        except RequestError as error:
            assert error.where
        else:
            assert np.isfinite(parsed.states).all() and np.isfinite(parsed.scores).all()


def test_the_published_schema_accepts_what_is_accepted() -> None:
    from serve.schemas import FuseRequest

    schema = msgspec.json.schema(FuseRequest)["$defs"]
    assert set(schema["FuseRequest"]["required"]) == {"request_id", "session_id", "user_id", "candidates"}
    assert set(schema["FuseRequest"]["properties"]) >= set(request())
    assert schema["Candidate"]["additionalProperties"] is False
