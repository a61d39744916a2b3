"""What `POST /v1/fuse` takes and gives, decoded from the raw body with msgspec (pydantic is too slow for 500 candidates).

`parse` returns a request that is right in every respect or raises `RequestError`, which names the field in the request's own words, such
as `candidates[3].scores.click`. The checks on the whole request are vectorised; only a refusal looks at single values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from esrl_ray.config import Config
from esrl_ray.errors import RequestError
from esrl_ray.spec import Side, Spec
from esrl_ray.vocabulary import Floats, Ints
from serve.explain import MAX_CODE, explain
from streaming.wire import MAX_ID_BYTES

MAX_BODY_BYTES = 16 * 2**20
LARGEST = float(np.finfo(np.float32).max)

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_BYTES, description=f"1 to {MAX_ID_BYTES} bytes.")]
Numbers = Annotated[
    list[float] | dict[str, float],
    msgspec.Meta(description="Values in the deployment's order, or an object name -> value with every name."),
]
Code = Annotated[int, msgspec.Meta(ge=0, le=MAX_CODE)]
Codes = Annotated[
    list[Code] | dict[str, Code],
    msgspec.Meta(description="Codes 0..cardinality-1 of this side's categorical features, in order, or an object name -> code."),
]


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One item that may be shown."""

    item_id: Id
    scores: Numbers
    features: Numbers = []
    categorical: Codes = []


class FuseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One list request: a user, the context, the candidates with their upstream scores."""

    request_id: Id
    session_id: Id
    user_id: Id
    candidates: list[Candidate]
    user_features: Numbers = []
    context_features: Numbers = []
    user_categorical: Codes = []
    context_categorical: Codes = []
    list_size: (
        Annotated[int, msgspec.Meta(ge=1, description="How many of the ranked items will be shown; default of the deployment.")] | None
    ) = None


class FuseReply(msgspec.Struct, frozen=True):
    """The ranking: all candidates, best first; the first `list_size` are the list that was logged as shown."""

    decision_id: str
    request_id: str
    item_ids: list[str]
    fused_scores: list[float]
    list_size: int
    policy_version: int
    arm: str
    round: int


class Refusal(msgspec.Struct, frozen=True):
    """Body of a 401, 413 or 422."""

    error: str
    field: str


class SwapTime(msgspec.Struct, frozen=True, array_like=True):
    """When a replica began to serve a version: `[version, published_ms, swapped_ms]`."""

    version: int
    published_ms: int
    swapped_ms: int


class PolicyReply(msgspec.Struct, frozen=True):
    """What the replica that answers serves now."""

    version: int
    digest: str
    kind: str
    round: int
    anchor_version: int
    pinned: bool
    published_ms: int
    swapped_ms: int
    replica: str
    swaps: list[SwapTime]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request that was checked, with the enhanced states of its N pairs."""

    request: FuseRequest
    list_size: int
    states: Floats  # (N, F)
    categorical: Ints  # (N, C)
    scores: Floats  # (N, k)


_decoder = msgspec.json.Decoder(FuseRequest)


def parse(body: bytes, spec: Spec, config: Config) -> Parsed:
    """Decode and check one request.

    Args:
        body: JSON.
        spec: Of the deployment.
        config: Limits.

    Raises:
        RequestError: with the field.
    """
    try:
        request = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise explain(body, error, spec) from error
    n, most = len(request.candidates), config.serve.max_candidates
    if not 1 <= n <= most:
        raise RequestError(f"{n} candidates, expected 1 to {most}", "candidates")
    list_size = config.serve.list_size if request.list_size is None else request.list_size
    if list_size > config.max_pairs:
        raise RequestError(f"list_size {list_size}, expected 1 to {config.max_pairs}", "list_size")
    for name in ("request_id", "session_id", "user_id"):
        _check_id(getattr(request, name), name)
    items: dict[str, int] = {}
    for i, candidate in enumerate(request.candidates):
        _check_id(candidate.item_id, "candidates[{}].item_id", i)
        if (first := items.setdefault(candidate.item_id, i)) != i:
            raise RequestError(f"item_id {candidate.item_id!r} is also that of candidates[{first}]", f"candidates[{i}].item_id")
    sides = (
        _numbers([request.user_features], spec.user_features, "user_features"),
        _numbers([c.features for c in request.candidates], spec.item_features, "candidates[{}].features"),
        _numbers([request.context_features], spec.context_features, "context_features"),
    )
    return Parsed(
        request=request,
        list_size=min(list_size, n),
        states=np.concatenate([np.broadcast_to(side, (n, side.shape[1])) for side in sides], axis=1),
        categorical=_categorical(request, spec),
        scores=_numbers([c.scores for c in request.candidates], spec.scores, "candidates[{}].scores"),
    )


def _check_id(value: str, field: str, i: int = 0) -> None:
    if len(value) * 4 > MAX_ID_BYTES and (num_bytes := len(value.encode())) > MAX_ID_BYTES:
        raise RequestError(f"the id has {num_bytes} bytes, expected 1 to {MAX_ID_BYTES}", field.format(i))


def _ordered(row: dict[str, Any], names: Sequence[str], field: str) -> list[Any]:
    if missing := [name for name in names if name not in row]:
        raise RequestError(f"missing, expected {', '.join(names)}", f"{field}.{missing[0]}")
    if len(row) > len(names):
        unknown = next(name for name in row if name not in names)
        raise RequestError(f"unknown, expected {', '.join(names) or 'none'}", f"{field}.{unknown}")
    return [row[name] for name in names]


def _rows(rows: Sequence[list[Any] | dict[str, Any]], names: Sequence[str], field: str) -> list[list[Any]]:
    """Every row as a list in the order of `names`."""
    lists = [row if isinstance(row, list) else _ordered(row, names, field.format(i)) for i, row in enumerate(rows)]
    for i, row in enumerate(lists):
        if len(row) != len(names):
            raise RequestError(f"{len(row)} values, expected {len(names)} ({', '.join(names) or 'none'})", field.format(i))
    return lists


def _numbers(rows: Sequence[list[float] | dict[str, float]], names: Sequence[str], field: str) -> Floats:
    """(len(rows), len(names)) float32, all finite."""
    values = np.array(_rows(rows, names, field), np.float64).reshape(len(rows), len(names))
    if not (fine := np.abs(values) <= LARGEST).all():
        i, j = np.argwhere(~fine)[0]
        raise RequestError(f"{values[i, j]:g} is not a finite float32", f"{field.format(i)}.{names[j]}")
    return values.astype(np.float32)


def _categorical(request: FuseRequest, spec: Spec) -> Ints:
    """(N, C) int32 codes, each below its cardinality."""
    codes = np.zeros((len(request.candidates), spec.num_categorical), np.int32)
    sides: tuple[tuple[Side, Sequence[list[int] | dict[str, int]], str], ...] = (
        ("user", [request.user_categorical], "user_categorical"),
        ("item", [c.categorical for c in request.candidates], "candidates[{}].categorical"),
        ("context", [request.context_categorical], "context_categorical"),
    )
    for side, rows, field in sides:
        columns = [c for c, feature in enumerate(spec.categorical_features) if feature.side == side]
        names = [spec.categorical_features[c].name for c in columns]
        values = np.array(_rows(rows, names, field), np.int32).reshape(len(rows), len(names))
        cardinality = np.array([spec.categorical_features[c].cardinality for c in columns], np.int32)
        if not (fine := values < cardinality).all():
            i, j = np.argwhere(~fine)[0]
            raise RequestError(f"code {values[i, j]}, expected 0 to {cardinality[j] - 1}", f"{field.format(i)}.{names[j]}")
        codes[:, columns] = values
    return codes
