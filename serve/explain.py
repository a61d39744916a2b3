"""Where a request is wrong, in the request's own words; runs only for requests that were refused by the decoder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from esrl_ray.errors import RequestError
from esrl_ray.spec import Side, Spec

MAX_CODE = 2**31 - 1
MAX_EXPLAINED_BYTES = 2 * 2**20  # a larger body is not built a second time: 16 MiB of empty arrays would hold up the replica for 4 s
_AT = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_FIELD = re.compile(r"^Object (?:missing required|contains unknown) field `(.*)`$")
_PART = re.compile(r"(\w+)|\[(\d+|\.\.\.)\]")

Path = list[str | int]


def explain(body: bytes, error: Exception, spec: Spec) -> RequestError:
    """Name the field that msgspec stumbled over.

    Args:
        body: Of the request.
        error: Of the decoder. It stops at NaN without saying where, and it does not name the keys of objects.
        spec: Names of the values.
    """
    if len(body) > MAX_EXPLAINED_BYTES:
        return RequestError(str(error), "body")
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return RequestError(f"not JSON: {error}", "body")
    for path, value in _leaves(tree, []):
        if isinstance(value, float) and not math.isfinite(value):
            return RequestError(f"{value} is not finite", _path_text(path, spec))
    text, at = _AT.sub("", str(error)), _AT.search(str(error))
    try:
        path = _resolve(tree, at.group(1)) if at else []
    except (AttributeError, LookupError, TypeError):  # a key came twice: msgspec stops at the first, the tree has the last
        return RequestError(text, "body")
    if field := _FIELD.match(text):
        return RequestError("missing" if "missing" in text else "unknown", _path_text([*path, field.group(1)], spec))
    return RequestError(text, _path_text(path, spec) or "body")


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Paths and values of all that is not a container."""
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(value, [*path, key])


def _resolve(tree: Any, text: str) -> Path:
    """Path of msgspec's `candidates[3].scores[...]`, where `...` is the first key with a value of the wrong type."""
    path: Path = []
    for name, index in _PART.findall(text):
        if index == "...":
            codes = str(path[-1]).endswith("categorical")
            wrong = (
                k
                for k, v in tree.items()
                if isinstance(v, bool) or not isinstance(v, int if codes else int | float) or (codes and not 0 <= v <= MAX_CODE)
            )
            key: str | int | None = next(wrong, None)
        else:
            key = int(index) if index else name
        if key is None:
            break
        path.append(key)
        tree = tree[key]
    return path


def _path_text(path: Path, spec: Spec) -> str:
    """`candidates[3].scores.click`: a position in an array of values becomes the name that the deployment gives it."""
    text = ""
    for depth, part in enumerate(path):
        names = _names(str(path[depth - 1]), spec) if depth else ()
        if isinstance(part, str):
            text += f".{part}" if text else part
        else:
            text += f".{names[part]}" if part < len(names) else f"[{part}]"
    return text


def _names(field: str, spec: Spec) -> Sequence[str]:
    """Names of the values of one array of a request."""
    sides: dict[str, Side] = {"user_categorical": "user", "context_categorical": "context", "categorical": "item"}
    if field in sides:
        return [feature.name for feature in spec.categorical_features if feature.side == sides[field]]
    numeric = {
        "user_features": spec.user_features,
        "context_features": spec.context_features,
        "features": spec.item_features,
        "scores": spec.scores,
    }
    return numeric.get(field, ())
