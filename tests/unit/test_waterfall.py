"""The loop delay of each step, worked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from esrl_ray.config import SpecConfig
from esrl_ray.evaluation.report import Delay, Percentiles
from esrl_ray.evaluation.waterfall import NEVER, STAGES, StepTimes, drawable_steps, step_times
from esrl_ray.policy.policy import Manifest, PolicyKind

INF = float("inf")
SPEC = SpecConfig().build()

Row = tuple[str, int, int, int, str | None, str]  # step_id, revision, event_time_ms, closed_ms, next_id, ended


def commit(*rows: Row) -> pa.Table:
    """Rows of one commit, as the step log returns them."""
    schema = {"step_id": pa.string(), "revision": pa.int64(), "event_time_ms": pa.int64(), "closed_ms": pa.int64()}
    names = [*schema, "next_id", "ended"]
    return pa.Table.from_pylist(
        [dict(zip(names, row, strict=True)) for row in rows], pa.schema(schema | {"next_id": pa.string(), "ended": pa.string()})
    )


def manifest(version: int, lineage: dict[str, int], learnt_ms: int, created_ms: int) -> Manifest:
    """A published policy."""
    return Manifest(
        version=version, digest="", kind=PolicyKind.PAIR, spec=SPEC, lineage=lineage, learnt_ms=learnt_ms, created_ms=created_ms
    )


def steps(*rows: tuple[str, int, int, int, str], closed_ms: Sequence[int] | int = 1_000) -> pa.Table:
    """(worker, event_time_ms, commit, drawable_commit, ended) of steps."""
    closed = [closed_ms] * len(rows) if isinstance(closed_ms, int) else list(closed_ms)
    worker, event, own, drawable, ended = zip(*rows, strict=True)
    return pa.table(
        {
            "worker": pa.array(worker),
            "step_id": [f"s{i}" for i in range(len(rows))],
            "event_time_ms": event,
            "closed_ms": closed,
            "commit": own,
            "drawable_commit": drawable,
            "ended": pa.array(ended),
        }
    )


def drawable(*commits: pa.Table, sample_without_next: bool = False) -> dict[str, tuple[int, int]]:
    """{step_id: (commit, drawable_commit)}."""
    table = drawable_steps("ingest-0", list(enumerate(commits)), sample_without_next=sample_without_next)
    return {r["step_id"]: (r["commit"], r["drawable_commit"]) for r in table.to_pylist()}


def test_a_step_is_drawable_once_its_next_lists_row_is_there() -> None:
    first = commit(("a", 0, 10, 100, None, "open"))
    link_before_row = commit(("a", 1, 10, 200, "b", "has_next"))
    row_of_b = commit(("b", 0, 20, 300, None, "open"))
    assert drawable(first, link_before_row, row_of_b) == {"a": (0, 2), "b": (2, NEVER)}


def test_a_step_is_drawable_once_its_link_is_there() -> None:
    assert drawable(
        commit(("a", 0, 10, 100, None, "open")),
        commit(("b", 0, 20, 200, None, "open")),
        commit(("a", 1, 10, 300, "b", "has_next"), ("b", 1, 20, 300, None, "terminated")),
    ) == {"a": (0, 2), "b": (1, 2)}


def test_late_feedback_does_not_make_a_step_drawable_later() -> None:
    assert drawable(
        commit(("a", 0, 10, 100, "b", "has_next"), ("b", 0, 20, 100, None, "terminated")),
        commit(("a", 1, 10, 200, "b", "has_next")),
    ) == {"a": (0, 0), "b": (0, 0)}


def test_a_step_whose_next_list_never_came_is_not_drawable() -> None:
    assert drawable(commit(("a", 0, 10, 100, "b", "has_next"))) == {"a": (0, NEVER)}


def test_steps_without_a_next_list_are_drawable_only_when_configured() -> None:
    rows = [commit(("a", 0, 10, 100, None, "open")), commit(("a", 1, 10, 200, None, "truncated"))]
    assert drawable(*rows) == {"a": (0, NEVER)}
    assert drawable(*rows, sample_without_next=True) == {"a": (0, 0)}


def test_times_are_those_of_the_first_row() -> None:
    table = drawable_steps("w", [(4, commit(("a", 0, 10, 100, None, "open"))), (7, commit(("a", 1, 10, 900, None, "terminated")))])
    assert table.to_pylist() == [
        {"worker": "w", "step_id": "a", "event_time_ms": 10, "closed_ms": 100, "commit": 4, "drawable_commit": 7, "ended": "terminated"}
    ]


def test_a_worker_without_rows_has_no_steps() -> None:
    assert drawable_steps("w", []).num_rows == 0
    assert pa.concat_tables([drawable_steps("w", []), drawable_steps("w", [(0, commit(("a", 0, 1, 2, None, "open")))])]).num_rows == 1


def test_each_stage_of_a_step_worked_by_hand() -> None:
    # Closed at 1 s, committed 1.5, inserted 1.6; drawable with commit 3 at 4.0; version 7 is the first whose lineage holds commit 3.
    times = step_times(
        steps(("ingest-0", 200, 2, 3, "has_next")),
        commits={("ingest-0", 2): (1_500, 1_600), ("ingest-0", 3): (3_900, 4_000)},
        manifests=[
            manifest(6, {"ingest-0": 2}, 3_000, 3_100),
            manifest(7, {"ingest-0": 3}, 4_400, 4_700),
            manifest(8, {"ingest-0": 9}, 6_000, 6_100),
        ],
        published_ms={6: 3_150, 7: 4_800, 8: 6_150},
        served_ms={6: 3_200, 7: 4_850, 8: 6_200},
        stop_ms=60_000,
    )
    assert times.label_delay_s == Percentiles(0.8, 0.8)
    assert times.loop_delay_s == Delay(3.85, 3.85, 0, 1)
    assert [s.name for s in times.stages] == list(STAGES)
    assert [s.seconds.p50 for s in times.stages] == pytest.approx([0.5, 0.1, 2.4, 0.4, 0.4, 0.05])
    assert [s.since_closed_s.p50 for s in times.stages] == pytest.approx([0.5, 0.6, 3.0, 3.4, 3.8, 3.85])


def served(drawable_commit: int, lineages: Sequence[int], served_s: Sequence[float]) -> float:
    """When a step of this commit came round, in seconds, given the lineage and serving time of versions 1, 2, ..."""
    times = step_times(
        steps(("w", 0, 0, drawable_commit, "terminated"), closed_ms=0),
        commits={("w", n): (0, 0) for n in range(20)},
        manifests=[manifest(v, {"w": n}, 0, 0) for v, n in enumerate(lineages, 1)],
        published_ms={},
        served_ms={v: s * 1e3 for v, s in enumerate(served_s, 1)},
        stop_ms=1e6,
    )
    return float(times.served_ms[0] / 1e3)


def test_a_version_that_holds_exactly_the_commit_counts_and_one_commit_less_does_not() -> None:
    assert served(5, [4, 5, 6], [1, 2, 3]) == 2
    assert served(6, [4, 5, 6], [1, 2, 3]) == 3
    assert served(4, [4, 5, 6], [1, 2, 3]) == 1
    assert served(7, [4, 5, 6], [1, 2, 3]) == INF


def test_a_version_that_was_never_served_is_passed_over() -> None:
    assert served(5, [4, 5, 6], [1, INF, 3]) == 3
    assert served(5, [4, 5], [1, INF]) == INF


def test_a_rollback_to_an_older_lineage_does_not_hide_an_earlier_version() -> None:
    assert served(5, [4, 6, 2, 7], [1, 2, 3, 4]) == 2
    assert served(7, [4, 6, 2, 7], [1, 2, 3, 4]) == 4


def test_serving_order_counts_and_not_the_order_of_manifests() -> None:
    assert served(5, [6, 5], [9, 2]) == 2


def test_a_policy_without_lineage_holds_no_step() -> None:
    times = step_times(
        steps(("w", 0, 0, 0, "terminated")),
        commits={("w", 0): (1_000, 1_000)},
        manifests=[manifest(1, {}, 0, 0)],
        published_ms={1: 500},
        served_ms={1: 600},
        stop_ms=60_000,
    )
    assert times.loop_delay_s == Delay(None, None, 1, 1)


def test_workers_are_followed_apart() -> None:
    times = step_times(
        steps(("ingest-0", 0, 0, 1, "terminated"), ("ingest-1", 0, 0, 1, "terminated")),
        commits={(w, n): (1_100 + i, 1_200 + i) for i, w in enumerate(("ingest-0", "ingest-1")) for n in (0, 1)},
        manifests=[manifest(1, {"ingest-0": 1, "ingest-1": 0}, 2_000, 2_000), manifest(2, {"ingest-0": 2, "ingest-1": 1}, 3_000, 3_000)],
        published_ms={},
        served_ms={1: 2_500, 2: 3_500},
        stop_ms=60_000,
    )
    assert times.served_ms.tolist() == [2_500, 3_500]
    assert times.inserted_ms.tolist() == [1_200, 1_201]
    assert times.published_ms.tolist() == [2_000, 3_000]


def test_a_commit_that_was_never_inserted_counts_as_infinite() -> None:
    times = step_times(
        steps(("w", 0, 0, 0, "terminated"), ("w", 0, 0, NEVER, "open"), ("w", 0, 3, 3, "terminated")),
        commits={("w", 0): (1_100, INF)},
        manifests=[manifest(1, {"w": 9}, 2_000, 2_000)],
        published_ms={},
        served_ms={1: 2_500},
        stop_ms=60_000,
    )
    assert times.loop_delay_s == Delay(None, None, 3, 3)
    assert times.committed_ms.tolist() == [1_100, 1_100, INF]
    # Each stage counts the steps that began it: three were closed, two committed, none inserted.
    assert [s.seconds.steps for s in times.stages] == [3, 2, 0, 0, 0, 0]


def test_only_steps_that_had_time_to_come_round_are_counted() -> None:
    rows = [("w", 0, 0, 0, "terminated")] * 4
    times = step_times(
        steps(*rows, closed_ms=[4_999, 5_000, 40_000, 40_001]),
        commits={("w", 0): (1, 1)},
        manifests=[],
        published_ms={},
        served_ms={},
        stop_ms=60_000,
        start_ms=5_000,
    )
    assert times.closed_ms.tolist() == [5_000, 40_000]
    assert times.num_before == 1


def test_truncated_steps_are_left_out_and_counted_but_open_ones_are_infinite() -> None:
    times = step_times(
        steps(("w", 0, 0, NEVER, "truncated"), ("w", 0, 0, NEVER, "open")),
        commits={("w", 0): (1_100, 1_200)},
        manifests=[],
        published_ms={},
        served_ms={},
        stop_ms=60_000,
    )
    assert (times.num_undrawable, times.loop_delay_s) == (1, Delay(None, None, 1, 1))


def test_no_steps_give_no_percentiles() -> None:
    times = step_times(drawable_steps("w", []), commits={}, manifests=[], published_ms={}, served_ms={}, stop_ms=60_000)
    assert times.loop_delay_s == Delay(None, None, 0, 0)
    assert times.label_delay_s == Percentiles(None, None)


def slow(
    table: pa.Table, commits: dict[tuple[str, int], tuple[float, float]], manifests: list[Manifest], served_ms: dict[int, float]
) -> list[float]:
    """Serving times by going through all versions for each step."""
    out = []
    for row in table.to_pylist():
        ready = commits.get((row["worker"], row["drawable_commit"]), (INF, INF))[1]
        holding = [served_ms.get(m.version, INF) for m in manifests if m.lineage.get(row["worker"], NEVER) >= row["drawable_commit"]]
        out.append(max(ready, min(holding, default=INF)) if np.isfinite(ready) else INF)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_random_runs_agree_with_a_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    workers, num = ["ingest-0", "ingest-1"], 300
    commits = {(w, n): (n * 100.0, n * 100.0 + 10) for w in workers for n in range(50) if rng.random() < 0.95}
    manifests = [manifest(v, {w: int(v + rng.integers(-3, 3)) for w in workers if rng.random() < 0.9}, 0, 0) for v in range(1, 50)]
    served_ms = {v: v * 100.0 + rng.uniform(0, 300) for v in range(1, 50) if rng.random() < 0.9}
    own = rng.integers(0, 48, num)
    rows = [(str(rng.choice(workers)), 0, int(n), int(n + rng.integers(0, 3)), "has_next") for n in own]
    table = steps(*rows, closed_ms=0)
    times = step_times(table, commits=commits, manifests=manifests, published_ms={}, served_ms=served_ms, stop_ms=1e9)
    assert times.served_ms.tolist() == slow(table, commits, manifests, served_ms)
    assert isinstance(times, StepTimes)
