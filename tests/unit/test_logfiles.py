"""The step log's care for itself: merging, retention, clean-up; what readers see meanwhile, and what a crash leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyarrow import parquet

from esrl_ray.config import LogConfig
from esrl_ray.errors import LogError
from esrl_ray.vocabulary import Ended
from streaming import logfiles
from streaming.logfiles import LogFile, list_files, read_files, rewrite, runs_to_merge
from streaming.statefiles import STATE_FOLDER, open_store
from streaming.steplog import StepLog, WorkerState, read_commits, read_newest, read_steps, rows_to_table
from tests.unit.test_log_command import SPEC, first, later

DAY_MS = 24 * 3600 * 1000
NOW_MS = 20_000 * DAY_MS


def log_of(root: Path, incarnation: str = "one", **care: Any) -> StepLog:
    return StepLog(root, "w", incarnation, SPEC, LogConfig(**{"tidy_every": 10, **care}))


def commit(log: StepLog, n: int, at_ms: int = NOW_MS) -> None:
    """Commit n: one step, the amendment of the one before, and now and then nothing."""
    step = first(f"{n:03d}", n)
    rows = [] if n % 4 == 3 else [step, later(first(f"{n - 1:03d}", n - 1), next_id=f"{n:03d}", ended=Ended.HAS_NEXT, reward=n)]
    log.commit(WorkerState(commit=n, incarnation=log.incarnation, positions={}, joiners={}, committed_ms=at_ms), rows_to_table(rows))


def tidy(log: StepLog, at_ms: int = NOW_MS, budget_ms: int = 1_000) -> bool:
    return log.tidy(lambda: at_ms, budget_ms)


def files_of(root: Path) -> list[LogFile]:
    return list_files(DeltaTable(root / "w"))


def content(root: Path | str) -> list[tuple[int, list[Any]]]:
    return [(n, rows.to_pylist()) for n, rows in read_commits(root, "w")]


def test_a_table_merged_into_large_files_reads_the_same(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for n in range(20):
        commit(log, n)
        assert tidy(log) == (n in {9, 19})
    before, steps = content(tmp_path), read_steps(tmp_path)
    assert [(f.low, f.high, f.rows) for f in files_of(tmp_path)] == [(0, 18, 2 * 15)] and [n for n, _ in before] == list(range(20))
    assert [n for n, _ in read_commits(tmp_path, "w", 4)] == list(range(5, 20))
    assert read_steps(tmp_path, as_of={"w": 4})["step_id"].to_pylist() == ["000", "001", "002", "004"]
    assert read_newest(tmp_path, 1, lambda rows: [True] * len(rows)).equals(steps)  # type: ignore[arg-type,return-value]
    commit(log, 20)
    (path,) = (tmp_path / "w" / STATE_FOLDER).glob(f"{20:012d}.*")
    path.unlink()
    restored = log_of(tmp_path, "two").restore()
    assert restored is not None and restored.commit == 20
    assert content(tmp_path) == [*before, (20, [])], "commit 20 is void"


def test_a_damaged_state_voids_a_commit_that_was_merged_already(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for n in range(10):
        commit(log, n)
    tidy(log)
    before = content(tmp_path)
    next((tmp_path / "w" / STATE_FOLDER).glob(f"{9:012d}.*")).unlink()
    assert log_of(tmp_path, "two").restore() is not None
    assert content(tmp_path) == [*before[:9], (9, [])] and len(files_of(tmp_path)) == 1


def test_files_of_different_days_stay_apart_and_whole_days_are_dropped(tmp_path: Path) -> None:
    log = log_of(tmp_path, retention_days=2)
    for n in range(9):
        commit(log, n, NOW_MS + n // 3 * DAY_MS)
    commit(log, 9, NOW_MS + 4 * DAY_MS)
    before = content(tmp_path)
    assert tidy(log, NOW_MS + 4 * DAY_MS)
    assert [(f.date, f.low, f.high) for f in files_of(tmp_path)] == [("2024-10-06", 6, 8), ("2024-10-08", 9, 9)]
    assert content(tmp_path) == before[6:], "what is left is read from the first commit that is kept"
    # 005 was dropped; its amendment, which commit 6 holds, is no step by itself
    assert read_steps(tmp_path)["step_id"].to_pylist() == ["006", "008", "009"]
    with pytest.raises(LogError, match=r"up to 5 were dropped by log.retention_days, asked for 4 .*: ask for 6 or later"):
        read_steps(tmp_path, as_of={"w": 4})
    assert len(read_steps(tmp_path, as_of={"w": 6})) == 1 and log.committed == 9


def test_a_log_without_a_commit_of_late_is_dropped_whole_and_goes_on(tmp_path: Path) -> None:
    log = log_of(tmp_path, retention_days=1)
    for n in range(10):
        commit(log, n)
    tidy(log, NOW_MS + 9 * DAY_MS)
    assert content(tmp_path) == [] == files_of(tmp_path)
    log = log_of(tmp_path, "two", retention_days=1)
    assert log.restore() is not None
    commit(log, 10, NOW_MS + 9 * DAY_MS)
    assert [n for n, _ in content(tmp_path)] == [10]


def test_what_nobody_needs_any_more_is_removed(tmp_path: Path) -> None:
    log = log_of(tmp_path, keep_hours=0)
    (tmp_path / "w" / "date=2024-10-04").mkdir(parents=True)
    orphan = tmp_path / "w" / "date=2024-10-04" / "part-of-a-crash.parquet"
    orphan.write_bytes(b"x")
    for n in range(10):
        commit(log, n)
    tidy(log)
    on_disk = {path.relative_to(tmp_path / "w").as_posix() for path in (tmp_path / "w").glob("date=*/*")}
    assert on_disk == {file.path for file in files_of(tmp_path)} and len(on_disk) == 1 and not orphan.exists()
    assert len(list((tmp_path / "w" / STATE_FOLDER).iterdir())) == 3 and log_of(tmp_path, "two").restore() is not None


def test_a_gap_is_read_from_a_large_file_without_the_rest_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfiles, "ROW_GROUP", 4)
    log = log_of(tmp_path)
    for n in range(10):
        commit(log, n)
    tidy(log)
    (merged,) = files_of(tmp_path)
    assert parquet.ParquetFile(tmp_path / "w" / merged.path).metadata.num_row_groups == 4
    assert [(n, len(rows)) for n, rows in read_commits(tmp_path, "w", 6)] == [(7, 0), (8, 2), (9, 2)]


def test_a_reader_whose_files_were_removed_meanwhile_goes_on_with_the_merged_ones(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for n in range(9):
        commit(log, n)
    before, reading = content(tmp_path), read_commits(tmp_path, "w")
    seen = [next(reading)[0] for _ in range(4)]
    commit(log, 9)
    tidy(log)
    DeltaTable(tmp_path / "w").vacuum(0, dry_run=False, enforce_retention_duration=False)
    assert [*seen, *(n for n, _ in reading)] == list(range(10)) and content(tmp_path)[:9] == before


def test_a_file_that_is_gone_for_good_is_an_error(tmp_path: Path) -> None:
    commit(log_of(tmp_path), 0)
    (tmp_path / "w" / files_of(tmp_path)[0].path).unlink()
    with pytest.raises(FileNotFoundError):
        list(read_commits(tmp_path, "w"))
    with pytest.raises(FileNotFoundError):
        read_steps(tmp_path)


@pytest.mark.parametrize("point", ["write_durably", "CommitProperties"])
def test_a_crash_while_files_are_merged_leaves_the_table_as_it_was(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path)
    for n in range(10):
        commit(log, n)
    before = content(tmp_path)

    def crash(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logfiles, point, crash)
        tidy(log)
    assert content(tmp_path) == before
    assert tidy(log_of(tmp_path, "two")) and content(tmp_path) == before and len(files_of(tmp_path)) == 1


def test_a_failure_of_the_store_is_logged_and_made_good_by_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_of(tmp_path)
    for n in range(10):
        commit(log, n)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logfiles, "write_durably", fail)
        assert tidy(log)
    assert "step log not tidied commit=9 reason=no space left" in caplog.text
    commit(log, 10)
    assert len(files_of(tmp_path)) == 9 and tidy(log_of(tmp_path, tidy_every=11)) and len(files_of(tmp_path)) == 1


def test_of_two_rewrites_at_the_same_time_one_is_refused(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for n in range(10):
        commit(log, n)
    before, zombie = content(tmp_path), DeltaTable(tmp_path / "w")
    files = list_files(zombie)
    assert tidy(log)
    with pytest.raises(DeltaError, match="Concurrent transaction"):
        rewrite(zombie, str(tmp_path / "w"), "w", [(files, read_steps(tmp_path))], now_ms=NOW_MS, rows_change=False)
    assert content(tmp_path) == before, "nothing is doubled"


def test_rows_are_taken_away_while_the_owner_goes_on(tmp_path: Path) -> None:
    """What erasing a user does: the owner appends between reading and writing, and neither is refused."""
    log = log_of(tmp_path)
    for n in range(3):
        commit(log, n)
    other = DeltaTable(tmp_path / "w")
    store, folder = open_store(str(tmp_path / "w"))
    commit(log, 3)
    commit(log, 4)
    file = list_files(other)[1]
    kept = read_files(store, folder, [file.path]).slice(1)
    assert rewrite(other, str(tmp_path / "w"), "w", [([file], kept)], now_ms=NOW_MS) == 1
    commit(log, 5)
    assert [(n, len(rows)) for n, rows in content(tmp_path)] == [(0, 2), (1, 1), (2, 2), (3, 0), (4, 2), (5, 2)]


def test_time_runs_out_between_two_merges(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for n in range(10):
        commit(log, n, NOW_MS + (n > 4) * DAY_MS)
    before, ticks = content(tmp_path), iter(range(NOW_MS, NOW_MS + 10**6, 400))
    assert log.tidy(lambda: next(ticks), 500)
    assert [(f.low, f.high) for f in files_of(tmp_path)] == [(0, 4), *((n, n) for n in (5, 6, 8, 9))] and content(tmp_path) == before


def file(low: int, num_bytes: int, date: str = "d") -> LogFile:
    return LogFile(f"{low}", num_bytes, 1, low, low, date)


def test_neighbours_of_one_day_are_merged_up_to_a_size() -> None:
    files = [file(0, 60), file(1, 20), file(2, 30), file(3, 40), file(4, 20), file(5, 10, "e"), file(6, 10, "e"), file(7, 10, "f")]
    assert [[f.low for f in run] for run in runs_to_merge(files, 100)] == [[1, 2, 3], [5, 6]]
    assert runs_to_merge([], 100) == []
    halves = [file(n, size) for n, size in enumerate([40, 8, 3, 1, 1])]  # a row is written again only when its file doubles
    assert [[f.low for f in run] for run in runs_to_merge(halves, 100)] == [[3, 4]]
    assert runs_to_merge([*halves, file(5, 2)], 100) == [[*halves[2:], file(5, 2)]]


def test_a_table_without_dates_is_refused(tmp_path: Path) -> None:
    DeltaTable.create(tmp_path / "w", schema=pa.schema([("commit", pa.int64())]))
    with pytest.raises(LogError, match=r"not partitioned by date.*: start with a new run.dir"):
        log_of(tmp_path)


def test_other_settings_are_taken_over(tmp_path: Path) -> None:
    commit(log_of(tmp_path), 0)
    log_of(tmp_path, "two", keep_hours=48)
    assert DeltaTable(tmp_path / "w").metadata().configuration["delta.deletedFileRetentionDuration"] == "interval 48 hours"
