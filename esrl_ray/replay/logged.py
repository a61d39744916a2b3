"""From a table of steps that someone else may have written to `Steps`: every way in which it does not fit is said by name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.config import Config
from esrl_ray.errors import InputDataError
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Arm, Ended

_TEXTS = ("step_id", "session_id", "user_id", "arm", "ended")
_PER_STEP = (*_TEXTS, "round", "event_time_ms", "next_id")
_SAME = "use the configuration that the log was written with"


def logged_steps(table: pa.Table, config: Config, where: str) -> Steps:
    """Steps of a table of the step log's columns, in order of event time.

    Args:
        table: One whole row per step.
        config: Deployment: widths, G, reward groups.
        where: Its file or folder, for messages.

    Raises:
        InputDataError: a column is missing, of another type or width than the deployment's, or holds what cannot be.
    """
    if not len(table):
        raise InputDataError("there are no steps in it", where, "give a log that has some")
    table = with_means(table)
    _check_columns(table, config, where)
    times = table["event_time_ms"].to_numpy()
    if (np.diff(times) < 0).any():
        table = table.take(pa.array(np.argsort(times, kind="stable")))
    steps = Steps.from_table(table, config)
    _check_values(steps, config, where)
    return steps


def with_means(table: pa.Table) -> pa.Table:
    """With the column of the candidates' means, nulls if it is not there: logs of before it are read as well."""
    if "candidate_means" in table.column_names:
        return table
    return table.append_column("candidate_means", pa.nulls(len(table), pa.list_(pa.float32())))


def _check_columns(table: pa.Table, config: Config, where: str) -> None:
    """Names, types, widths, and words of a fixed set."""
    spec = config.spec.build()
    widths = {  # values per pair, and what says so
        "shown": (1, "the step's pairs"),
        "states": (spec.num_features, "spec features"),
        "categorical": (spec.num_categorical, "spec.categorical_features"),
        "scores": (spec.num_scores, "spec.scores"),
        "actions": (spec.num_actions, "2 x spec.scores"),
        "anchor_actions": (spec.num_actions, "2 x spec.scores"),
        "rewards": (config.reward.num_groups, "reward.groups"),
        "behaviours": (len(config.reward.behaviours), "reward.behaviours"),
    }
    if missing := [name for name in (*_PER_STEP, *widths) if name not in table.column_names]:
        raise InputDataError(
            f"column {missing[0]!r} is missing, found {table.column_names}", where, "give a table of the step log's schema"
        )
    for name in _TEXTS:
        if not (pa.types.is_string(kind := table[name].type) or pa.types.is_large_string(kind)) or table[name].null_count:
            raise InputDataError(f"column {name!r} is {kind} with {table[name].null_count} nulls, expected string without", where)
    for name in ("event_time_ms", "round"):
        if not pa.types.is_integer(kind := table[name].type) or table[name].null_count:
            raise InputDataError(f"column {name!r} is {kind} with {table[name].null_count} nulls, expected integers without", where)
    if (twice := len(table) - pc.count_distinct(table["step_id"]).as_py()) > 0:
        raise InputDataError(f"{twice} rows have the step_id of another", where, "give one whole row per step")
    for name, known in (("arm", set(Arm)), ("ended", set(Ended))):
        if odd := set(pc.unique(table[name]).to_pylist()) - {str(k) for k in known}:
            raise InputDataError(f"column {name!r} holds {sorted(odd)[0]!r}, expected one of {sorted(known)}", where)
    for name in (*widths, "candidate_means"):
        kind = table[name].type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _fits(name, kind.value_type):
            raise InputDataError(f"column {name!r} is {kind}, expected a list of {_expected(name)}", where)
        if name in widths and (nulls := table[name].null_count):
            text = f"column {name!r} is null in {nulls} of {len(table)} rows: those are later revisions of a step"
            raise InputDataError(text, where, "merge revisions first, as `esrl train --log FOLDER` does")
    pairs = _lengths(table["shown"])
    if (pairs < 1).any():
        raise InputDataError(f"step {table['step_id'][int(pairs.argmin())]} has no pairs", where)
    for name, (width, key) in widths.items():
        if (wrong := np.flatnonzero(_lengths(table[name]) != pairs * width)).size:
            i = int(wrong[0])
            found = f"{name} of step {table['step_id'][i]} has {_lengths(table[name])[i]} values for {pairs[i]} pairs"
            raise InputDataError(f"{found}, expected {width} per pair ({key})", where, _SAME)
    means, width = table["candidate_means"].drop_null(), spec.num_features + spec.num_scores
    if (wrong := _lengths(means)[_lengths(means) != width]).size:
        raise InputDataError(f"candidate_means of a step has {wrong[0]} values, expected {width} (spec features and scores)", where, _SAME)


def _check_values(steps: Steps, config: Config, where: str) -> None:
    """What networks could not take: codes out of range, and numbers that are none."""
    for c, feature in enumerate(config.spec.categorical_features):
        codes = steps.columns["categorical"][..., c]
        if codes.min() < 0 or codes.max() >= feature.cardinality:
            odd = codes.min() if codes.min() < 0 else codes.max()
            raise InputDataError(f"code {odd} of feature {feature.name!r} is not in 0..{feature.cardinality - 1}", where, _SAME)
    for name in ("states", "scores", "actions", "anchor_actions", "rewards", "candidate_means"):
        if not (finite := np.isfinite(steps.columns[name])).all():
            raise InputDataError(f"{name} of {(~finite.reshape(len(steps), -1)).any(1).sum()} steps are not finite numbers", where)


def _expected(name: str) -> str:
    return {"shown": "bool", "categorical": "int32"}.get(name, "float32")


def _fits(name: str, kind: pa.DataType) -> bool:
    tests = {"shown": pa.types.is_boolean, "categorical": pa.types.is_integer}
    fits: bool = tests.get(name, pa.types.is_floating)(kind)
    return fits


def _lengths(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = pc.list_value_length(column).to_numpy().astype(np.int64)
    return lengths
