"""Loop delay: from the closing of a step to a served policy whose training could draw it, stage by stage.

A step can be drawn from the commit on at which its own row, what follows it, and its next list's row have been inserted. It has come
round at the first served version whose lineage holds that commit. What never comes round counts as infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.evaluation.report import Delay, Percentiles, Stage
from esrl_ray.policy.policy import Manifest
from esrl_ray.vocabulary import Ended

Times = npt.NDArray[np.float64]  # (n,) epoch milliseconds, inf = never

STAGES = ("committed", "inserted", "drawable", "learnt", "published", "served")
NEVER = -1
"""`drawable_commit` of a step that no commit made drawable."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When each of n steps reached each stage, in epoch milliseconds; inf = never."""

    event_time_ms: Times  # (n,) of the decision
    closed_ms: Times
    committed_ms: Times
    inserted_ms: Times
    drawable_ms: Times
    learnt_ms: Times
    published_ms: Times
    served_ms: Times
    num_undrawable: int  # truncated steps, left out: training never draws them
    num_before: int  # steps closed before the stretch that counts, left out

    @property
    def label_delay_s(self) -> Percentiles:
        """From the decision to the closing of its step."""
        return Percentiles.of((self.closed_ms - self.event_time_ms) / 1e3)

    @property
    def loop_delay_s(self) -> Delay:
        """From the closing of a step to a served policy whose training could draw it."""
        return Delay.of((self.served_ms - self.closed_ms) / 1e3)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Time in each stage, over the steps that reached its beginning, and time since the step was closed."""
        stages, before = [], self.closed_ms
        for name in STAGES:
            at: Times = getattr(self, f"{name}_ms")
            begun = np.isfinite(before)
            stages.append(Stage(name, Delay.of((at[begun] - before[begun]) / 1e3), Delay.of((at - self.closed_ms) / 1e3)))
            before = at
        return tuple(stages)


def drawable_steps(worker: str, commits: Iterable[tuple[int, pa.Table]], *, sample_without_next: bool = False) -> pa.Table:
    """For each step of one worker, the commit of its first row and the one that made it drawable.

    Args:
        worker: Whose step log it is.
        commits: (commit, rows) in order, as `read_commits` gives them.
        sample_without_next: Every step can be drawn as soon as it is inserted (`replay.sample_without_next`).

    Returns:
        Columns worker, step_id, event_time_ms, closed_ms (of the first row), commit, drawable_commit (`NEVER` = not yet) and
        ended (of the highest revision); one row per step, in the order of the log.
    """
    columns = ("step_id", "revision", "event_time_ms", "closed_ms", "next_id", "ended")
    tables = [rows.select(columns).append_column("commit", pa.array(np.full(len(rows), n, np.int64))) for n, rows in commits if len(rows)]
    if not tables:
        empty = {"worker": pa.string(), "step_id": pa.string(), "event_time_ms": pa.int64(), "closed_ms": pa.int64()}
        return pa.schema(empty | {"commit": pa.int64(), "drawable_commit": pa.int64(), "ended": pa.string()}).empty_table()
    rows = pa.concat_tables(tables).combine_chunks()
    ids = pc.unique(rows["step_id"])
    code = pc.index_in(rows["step_id"], ids).to_numpy()  # (rows,) -> step
    commit, revision = rows["commit"].to_numpy(), rows["revision"].to_numpy()
    ended = rows["ended"].to_numpy(zero_copy_only=False).astype(str)
    order = np.lexsort((revision, code))
    starts = np.searchsorted(code[order], np.arange(len(ids)))
    first, last = order[starts], order[np.append(starts[1:], len(order)) - 1]

    never = np.iinfo(np.int64).max
    own = commit[first]
    linked = np.full(len(ids), never)
    known = (ended != Ended.OPEN) & (ended != Ended.TRUNCATED)
    np.minimum.at(linked, code[known], commit[known])
    following = pc.fill_null(pc.index_in(rows["next_id"].take(pa.array(last)), ids), -1).to_numpy()
    has_next = ended[last] == Ended.HAS_NEXT
    next_own = np.where(has_next, np.where(following >= 0, own[following], never), own)
    drawable = own if sample_without_next else np.maximum(np.maximum(own, linked), next_own)
    return pa.table(
        {
            "worker": pa.array([worker] * len(ids)),
            "step_id": ids,
            "event_time_ms": rows["event_time_ms"].take(pa.array(first)),
            "closed_ms": rows["closed_ms"].take(pa.array(first)),
            "commit": pa.array(own),
            "drawable_commit": pa.array(np.where(drawable == never, NEVER, drawable)),
            "ended": pa.array(ended[last]),
        }
    )


def step_times(
    steps: pa.Table,
    *,
    commits: Mapping[tuple[str, int], tuple[float, float]],
    manifests: Sequence[Manifest],
    published_ms: Mapping[int, float],
    served_ms: Mapping[int, float],
    stop_ms: float,
    start_ms: float = 0.0,
    margin_s: float = 20.0,
) -> StepTimes:
    """Follow each step through the loop.

    Args:
        steps: `drawable_steps` of all workers.
        commits: {(worker, commit): (committed_ms, inserted_ms)}; one that is missing was never inserted.
        manifests: Of the published versions; `lineage` and `learnt_ms` are read.
        published_ms: {version: when the store published it}; a missing one takes the manifest's `created_ms`.
        served_ms: {version: when every replica had served it or a later one}; a missing one was never served.
        stop_ms: End of the run.
        start_ms: Steps closed before this are left out and counted (the learner had not begun).
        margin_s: Steps closed later than this before the end are left out: they had no time to come round.

    Returns:
        Times of the steps that count.
    """
    closed = steps["closed_ms"].to_numpy().astype(np.float64)
    in_time = closed <= stop_ms - margin_s * 1e3
    undrawable = (steps["drawable_commit"].to_numpy() == NEVER) & (
        steps["ended"].to_numpy(zero_copy_only=False).astype(str) == Ended.TRUNCATED
    )
    counted = in_time & (closed >= start_ms) & ~undrawable
    rows = steps.filter(pa.array(counted))
    worker = rows["worker"].to_numpy(zero_copy_only=False).astype(str)
    own, drawable_commit = rows["commit"].to_numpy(), rows["drawable_commit"].to_numpy()

    served = sorted(
        (m for m in manifests if np.isfinite(served_ms.get(m.version, np.inf))), key=lambda m: (served_ms[m.version], m.version)
    )
    served_at = np.array([served_ms[m.version] for m in served] + [np.inf])
    published_at = np.array([published_ms.get(m.version, m.created_ms) for m in served] + [np.inf])
    learnt_at = np.array([float(m.learnt_ms) for m in served] + [np.inf])

    committed, inserted, drawable = (np.full(len(rows), np.inf) for _ in range(3))
    version = np.full(len(rows), len(served))  # index into `served`; the last one means never
    for name in np.unique(worker):
        mine = np.flatnonzero(worker == name)
        numbers = np.array(sorted(n for w, n in commits if w == name), np.int64)
        moments = np.array([commits[name, int(n)] for n in numbers], np.float64).reshape(-1, 2)
        committed[mine], inserted[mine] = _look_up(numbers, moments, own[mine]).T
        drawable[mine] = _look_up(numbers, moments, drawable_commit[mine])[:, 1]
        # A rollback serves an older lineage again: the first version that holds a commit is the first to raise the maximum to it.
        reached = np.maximum.accumulate(np.array([m.lineage.get(name, NEVER) for m in served], np.int64))
        found = np.searchsorted(reached, drawable_commit[mine], side="left")
        version[mine] = np.where(np.isfinite(drawable[mine]), found, len(served))
    # A commit can be drawn between its insertion and the clock readings around it, so a stage never ends before it began.
    learnt = np.maximum(drawable, learnt_at[version])
    published = np.maximum(learnt, published_at[version])
    return StepTimes(
        event_time_ms=rows["event_time_ms"].to_numpy().astype(np.float64),
        closed_ms=closed[counted],
        committed_ms=committed,
        inserted_ms=inserted,
        drawable_ms=drawable,
        learnt_ms=learnt,
        published_ms=published,
        served_ms=np.maximum(published, served_at[version]),
        num_undrawable=int((in_time & undrawable).sum()),
        num_before=int((in_time & ~undrawable & (closed < start_ms)).sum()),
    )


def _look_up(numbers: npt.NDArray[np.int64], moments: Times, wanted: npt.NDArray[np.int64]) -> Times:
    """(n, 2) moments of the wanted commits; inf where one is missing."""
    if not len(numbers):
        return np.full((len(wanted), 2), np.inf)
    at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    return np.where((numbers[at] == wanted)[:, None], moments[at], np.inf)
