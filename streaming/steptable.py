"""Step rows as Arrow tables: the columns of the step log, and merging a step's revisions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.errors import LogError
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import StepRow

_TEXTS = ("step_id", "session_id", "user_id", "arm", "ended")
_INTS = ("revision", "index", "partition", "round", "num_candidates")
_LONGS = ("offset", "event_time_ms", "closed_ms", "policy_version")
_SMALL = {"shown": pa.bool_(), "behaviours": pa.float32(), "rewards": pa.float32()}
MEANS = "candidate_means"
"""Of a step, not of its pairs; null where its decision had none, as in logs that are older than the column."""
_BULKY = {
    "positions": pa.int32(),
    "states": pa.float32(),
    "categorical": pa.int32(),
    "scores": pa.float32(),
    "actions": pa.float32(),
    "anchor_actions": pa.float32(),
    "fused_scores": pa.float32(),
    MEANS: pa.float32(),
}
BULKY = ("item_ids", *_BULKY)
"""Columns that only the first row of a step fills."""

_SCHEMA = pa.schema(
    [
        ("commit", pa.int64()),  # first, so that every file has its smallest and largest commit among its statistics
        *((name, pa.string()) for name in _TEXTS),
        *((name, pa.int32()) for name in _INTS),
        *((name, pa.int64()) for name in _LONGS),
        ("next_id", pa.string()),
        *((name, pa.list_(kind)) for name, kind in _SMALL.items()),
        ("item_ids", pa.list_(pa.string())),
        *((name, pa.list_(kind)) for name, kind in _BULKY.items()),
    ]
)


def step_schema() -> pa.Schema:
    """Columns of the step log: those of `StepRow`, arrays flattened row-major, and the number of the commit that wrote the row."""
    return _SCHEMA


def _lists(arrays: Sequence[np.ndarray | None], kind: pa.DataType) -> pa.ListArray:
    """A list column from arrays of any shape; None becomes null."""
    there = [a for a in arrays if a is not None]
    values = np.concatenate(there).reshape(-1) if there else np.zeros(0, kind.to_pandas_dtype())
    return _list_array([None if a is None else a.size for a in arrays], pa.array(values, kind))


def _list_array(lengths: Sequence[int | None], values: pa.Array) -> pa.ListArray:
    """Lists of these lengths over values that stand one after the other; None becomes null."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum([length or 0 for length in lengths], out=offsets[1:])
    mask = pa.array([length is None for length in lengths]) if None in lengths else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def rows_to_table(rows: Sequence[StepRow]) -> pa.Table:
    """Step rows as a table of `step_schema()`; `commit` is -1 until the log sets it."""
    columns: dict[str, pa.Array] = {"commit": pa.array(np.full(len(rows), -1, np.int64))}
    for names, kind in ((_TEXTS, pa.string()), (_INTS, pa.int32()), (_LONGS, pa.int64()), (("next_id",), pa.string())):
        columns |= {name: pa.array([getattr(row, name) for row in rows], kind) for name in names}
    columns |= {name: _lists([getattr(row, name) for row in rows], kind) for name, kind in (_SMALL | _BULKY).items()}
    ids = [row.item_ids for row in rows]
    texts = pa.array([item_id for row_ids in ids if row_ids is not None for item_id in row_ids], pa.string())
    columns["item_ids"] = _list_array([None if row_ids is None else len(row_ids) for row_ids in ids], texts)
    return pa.table([columns[field.name] for field in _SCHEMA], schema=_SCHEMA)


def check_widths(table: pa.Table, spec: Spec) -> None:
    """Refuse rows whose arrays have another width than the spec says, or than each other: Delta itself accepts them.

    Raises:
        LogError: names the column, the step and both widths.
    """
    if not len(table):
        return
    pairs = _lengths(table["shown"])
    whole = table["item_ids"].is_valid().to_numpy()
    widths = {
        "shown": 1,
        "positions": 1,
        "item_ids": 1,
        "fused_scores": 1,
        "states": spec.num_features,
        "categorical": spec.num_categorical,
        "scores": spec.num_scores,
        "actions": spec.num_actions,
        "anchor_actions": spec.num_actions,
        "rewards": int(_lengths(table["rewards"])[0]) // max(int(pairs[0]), 1),
        "behaviours": int(_lengths(table["behaviours"])[0]) // max(int(pairs[0]), 1),
        MEANS: spec.num_features + spec.num_scores,
    }
    for name, width in widths.items():
        lengths = _lengths(table[name])
        expected = np.where(whole, pairs * width, _NULL) if name in BULKY else pairs * width
        if name == MEANS:
            expected = np.where(whole & (lengths != _NULL), width, _NULL)
        wrong = (lengths != expected) | (pairs < 1)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            step, kind = table["step_id"][i].as_py(), "first row" if whole[i] else "amendment"
            found = "null" if lengths[i] == _NULL else f"{lengths[i]} values"
            wanted = "null" if expected[i] == _NULL else str(width) if name == MEANS else f"{pairs[i]} pairs x {width}"
            raise LogError(f"{name} of step {step} ({kind}) has {found}, expected {wanted}")


_NULL = -1


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(column), _NULL).to_numpy()
    return lengths


def merge_steps(rows: pa.Table) -> pa.Table:
    """One row per step: the fields of its highest revision, bulky ones from its first row, in order of event time.

    Args:
        rows: Of `step_schema()`, in the order of the log; a step without its first row is left out.
    """
    if not len(rows):
        return rows
    ids = pc.unique(rows["step_id"])
    code = pc.index_in(rows["step_id"], ids).to_numpy()
    order = np.lexsort((rows["revision"].to_numpy(), code))
    starts = np.searchsorted(code[order], np.arange(len(ids)))
    first, last = order[starts], order[np.append(starts[1:], len(order)) - 1]
    whole = rows["item_ids"].is_valid().to_numpy()[first]
    first, last = first[whole], last[whole]
    keys = pa.table({"time": rows["event_time_ms"].take(pa.array(last)), "id": rows["step_id"].take(pa.array(last))})
    by_time = pc.sort_indices(keys, [("time", "ascending"), ("id", "ascending")]).to_numpy()
    first, last = first[by_time], last[by_time]
    return pa.table([_take(rows[f.name], first if f.name in BULKY else last) for f in _SCHEMA], schema=_SCHEMA)


def _take(column: pa.ChunkedArray, index: np.ndarray) -> pa.Array | pa.ChunkedArray:
    """Rows of a column by number. For lists through their values: pyarrow 26's own `take` of lists needs several times as long."""
    if not pa.types.is_list(column.type):
        return column.take(pa.array(index))
    lists = column.combine_chunks()
    starts, lengths = lists.offsets.to_numpy()[:-1][index], _lengths(lists)[index]
    if (lengths == _NULL).any():  # the candidates' means alone
        return column.take(pa.array(index))
    ends = np.cumsum(lengths)
    width = int(lengths[0]) if len(lengths) else 0
    even = width > 0 and (lengths == width).all() and not len(lists.values) % width and not (starts % width).any()
    if even and pa.types.is_floating(lists.type.value_type):  # all lists are blocks of one width: no index per value
        values = pa.array(lists.values.to_numpy().reshape(-1, width)[starts // width].reshape(-1))
    else:
        values = lists.values.take(pa.array(np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), values, type=column.type)
