"""The step log: one atomic commit, state before it, fencing, damage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from esrl_ray.config import Config, load_config
from esrl_ray.errors import Fenced, LogError
from esrl_ray.normaliser import mean_input
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Ended
from streaming import logfiles, statefiles, steplog, stepreader, steptable
from streaming.erase import erase_user
from streaming.statefiles import STATE_FOLDER
from streaming.steplog import (
    CommitInfo,
    StepLog,
    WorkerState,
    commit_history,
    list_workers,
    read_commits,
    read_newest,
    read_steps,
)
from streaming.stepreader import FILES_AT_ONCE
from streaming.steptable import merge_steps, rows_to_table, step_schema
from tests.unit.test_replay import step


@pytest.fixture
def config() -> Config:
    return load_config("configs/demo.yaml")


def state(n: int, incarnation: str = "one") -> WorkerState:
    return WorkerState(commit=n, incarnation=incarnation, positions={"decisions/0": 10 * n}, joiners={0: [b"x" * n]}, committed_ms=n)


def log_of(root: Path, config: Config, incarnation: str = "one") -> StepLog:
    return StepLog(root, "w", incarnation, config.spec.build())


def fill(root: Path, config: Config) -> StepLog:
    log = log_of(root, config)
    log.commit(state(0), rows_to_table([step(config, "a"), step(config, "b")]))
    log.commit(state(1), rows_to_table([]))
    log.commit(state(2), rows_to_table([step(config, "a", revision=1, next_id="b", ended=Ended.HAS_NEXT, reward=7.0)]))
    return log


def test_a_commit_holds_rows_and_state_together(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config)
    restored = log_of(tmp_path, config, "two").restore()
    assert restored == state(2)
    assert list_workers(tmp_path) == ["w"]
    commits = list(read_commits(tmp_path, "w"))
    assert [(n, len(rows)) for n, rows in commits] == [(0, 2), (1, 0), (2, 1)]
    assert commits[0][1]["commit"].to_pylist() == [0, 0]
    assert [n for n, _ in read_commits(tmp_path, "w", after=0)] == [1, 2] and list(read_commits(tmp_path, "other")) == []
    assert commit_history(tmp_path, "w") == [
        CommitInfo("w", n, rows, n, "one", {"decisions/0": 10 * n}) for n, rows in enumerate((2, 0, 1))
    ]  # fmt: skip


def test_steps_are_merged_over_revisions_and_can_be_read_as_of_a_commit(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config)
    now, then = read_steps(tmp_path), read_steps(tmp_path, as_of={"w": 1})
    assert now["step_id"].to_pylist() == then["step_id"].to_pylist() == ["a", "b"]
    assert now["ended"].to_pylist() == ["has_next", "open"] and then["ended"].to_pylist() == ["open", "open"]
    assert now["rewards"][0].as_py() == [0, 0, 7, 7, 7, 7] and now["item_ids"][0].as_py() == ["a0", "a1", "a2"]
    assert np.isclose(now["states"][0].as_py(), ord("a")).all()


@pytest.mark.parametrize("widths", [(3, 3, 3), (3, 4, 2)])
def test_merging_keeps_every_value_with_lists_of_one_width_and_of_several(config: Config, widths: tuple[int, ...]) -> None:
    names = ("x", "y", "z")
    first = [step(config, name, pairs=pairs, reward=1.0) for name, pairs in zip(names, widths, strict=True)]
    again = [step(config, "y", pairs=widths[1], revision=1, reward=9.0), step(config, "gone", revision=1)]
    chunks = [rows_to_table([again[1], first[2], first[1]]), rows_to_table([again[0], first[0]])]
    merged = merge_steps(pa.concat_tables(chunks))
    expected = rows_to_table(first).to_pylist()
    expected[1] |= {"revision": 1, "rewards": rows_to_table(again)["rewards"][0].as_py()}
    assert merged.to_pylist() == expected


def test_the_newest_steps_that_count_are_read_from_the_end_of_a_long_log(tmp_path: Path, config: Config) -> None:
    log, count = log_of(tmp_path, config), 2 * FILES_AT_ONCE + 3
    assert len(read_newest(tmp_path, 5, lambda rows: np.ones(len(rows), np.bool_))) == 0
    for n in range(count):
        rows = [step(config, f"{n:03d}{x}") for x in "ab"]
        amended = [step(config, f"{n - 1:03d}a", revision=1, ended=Ended.TERMINATED, reward=7.0)] if n else []
        log.commit(state(n), rows_to_table([*rows, *amended]))
    looked: list[int] = []

    def only_a(rows: pa.Table) -> np.ndarray:
        looked.append(len(rows))
        return np.array([name.endswith("a") for name in rows["step_id"].to_pylist()])

    newest = read_newest(tmp_path, FILES_AT_ONCE, only_a)
    assert newest["step_id"].to_pylist() == [f"{n:03d}a" for n in range(count - FILES_AT_ONCE, count)]
    assert newest["ended"].to_pylist() == [Ended.TERMINATED] * (FILES_AT_ONCE - 1) + [Ended.OPEN]
    assert looked == [3 * FILES_AT_ONCE]
    assert len(read_newest(tmp_path, 10**6, only_a)) == count
    assert len(read_newest(tmp_path, 10**6, only_a, max_rows=1)) == FILES_AT_ONCE


def test_a_second_incarnation_fences_the_first(tmp_path: Path, config: Config) -> None:
    old = fill(tmp_path, config)
    new = log_of(tmp_path, config, "two")
    new.commit(state(3, "two"), rows_to_table([step(config, "c")]))
    with pytest.raises(Fenced, match="commit 3 of w follows commit 3"):
        old.commit(state(3), rows_to_table([step(config, "d")]))
    assert log_of(tmp_path, config, "three").restore() == state(3, "two")
    assert read_steps(tmp_path)["step_id"].to_pylist() == ["a", "b", "c"]


def test_two_that_pass_the_check_together_do_not_both_commit(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fill(tmp_path, config)
    new = log_of(tmp_path, config, "two")

    def check_then_pause(self: DeltaTable) -> None:
        """The old one has checked; now the new one commits; then the old one goes on."""
        monkeypatch.undo()
        new.commit(state(3, "two"), rows_to_table([step(config, "c")]))

    monkeypatch.setattr(DeltaTable, "update_incremental", check_then_pause)
    with pytest.raises(Fenced, match="made by another incarnation two"):
        old.commit(state(3), rows_to_table([step(config, "d")]))
    assert log_of(tmp_path, config, "three").restore() == state(3, "two"), "the fenced one did not overwrite the state"
    assert read_steps(tmp_path)["step_id"].to_pylist() == ["a", "b", "c"]


def test_a_state_file_without_its_commit_is_ignored(tmp_path: Path, config: Config) -> None:
    log = fill(tmp_path, config)
    log._states.write(state(3), "one")
    assert log_of(tmp_path, config, "two").restore() == state(2)


@pytest.mark.parametrize("damage", ["bit", "empty", "half", "gone"])
def test_a_damaged_state_file_voids_its_commit(tmp_path: Path, config: Config, damage: str) -> None:
    fill(tmp_path, config)
    (path,) = (tmp_path / "w" / STATE_FOLDER).glob(f"{2:012d}.*")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"bit": content[:-1] + bytes([content[-1] ^ 1]), "empty": b"", "half": content[: len(content) // 2]}[damage])
    log = log_of(tmp_path, config, "two")
    restored = log.restore()
    assert restored is not None and restored.positions == state(1).positions and restored.commit == 2
    assert read_steps(tmp_path)["ended"].to_pylist() == ["open", "open"], "the rows of commit 2 are void"
    log.commit(state(3, "two"), rows_to_table([step(config, "a", revision=1, next_id="b", ended=Ended.HAS_NEXT)]))
    assert read_steps(tmp_path)["ended"].to_pylist() == ["has_next", "open"]
    assert log_of(tmp_path, config, "three").restore() == state(3, "two")


def test_rows_of_another_width_are_refused(tmp_path: Path, config: Config) -> None:
    other = load_config("configs/demo.yaml", ["spec.scores=[click]", "spec.power_base=[1.0]"])
    with pytest.raises(LogError, match=r"scores of step a \(first row\) has 3 values, expected 3 pairs x 5"):
        log_of(tmp_path, config).commit(state(0), rows_to_table([step(other, "a")]))
    assert log_of(tmp_path, config).restore() is None


def test_what_is_no_first_row_and_no_amendment_is_refused(tmp_path: Path, config: Config) -> None:
    log, rows = log_of(tmp_path, config), rows_to_table([step(config, "a"), step(config, "b")])
    torn = rows.set_column(rows.column_names.index("states"), "states", pa.nulls(2, pa.list_(pa.float32())))
    with pytest.raises(LogError, match=r"states of step a \(first row\) has null, expected 3 pairs x 18"):
        log.commit(state(0), torn)
    rewards = pa.array([[0.0] * 6, [0.0] * 5], pa.list_(pa.float32()))
    with pytest.raises(LogError, match=r"rewards of step b \(first row\) has 5 values, expected 3 pairs x 2"):
        log.commit(state(0), rows.set_column(rows.column_names.index("rewards"), "rewards", rewards))
    assert log.committed == -1


def test_means_of_the_candidates_are_of_the_step_and_may_be_missing(tmp_path: Path, config: Config) -> None:
    width, log = 23, log_of(tmp_path, config)
    told = msgspec.structs.replace(step(config, "a"), candidate_means=np.arange(width, dtype=np.float32))
    log.commit(state(0), rows_to_table([told, step(config, "b"), step(config, "a", revision=1, reward=7.0)]))
    found = dict(zip(*read_steps(tmp_path).select(["step_id", "candidate_means"]).to_pydict().values(), strict=True))
    assert found == {"a": list(range(width)), "b": None}
    with pytest.raises(LogError, match=r"candidate_means of step a \(first row\) has 22 values, expected 23$"):
        log.commit(state(1), rows_to_table([msgspec.structs.replace(told, candidate_means=np.zeros(width - 1, np.float32))]))
    amendment = step(config, "a", revision=2)
    with pytest.raises(LogError, match=r"candidate_means of step a \(amendment\) has 23 values, expected null"):
        log.commit(state(1), rows_to_table([msgspec.structs.replace(amendment, candidate_means=np.zeros(width, np.float32))]))


def older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tables be made and written as before there were means of the candidates."""
    older = pa.schema([field for field in step_schema() if field.name != "candidate_means"])
    for module in (steplog, steptable, logfiles, stepreader):
        if hasattr(module, "step_schema"):
            monkeypatch.setattr(module, "step_schema", lambda: older)
    monkeypatch.setattr(steptable, "_SCHEMA", older)
    monkeypatch.setattr(steplog, "check_widths", lambda *_: None)


def test_a_log_that_goes_back_to_before_the_means_of_the_candidates_goes_on(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        older_version(before)
        fill(tmp_path, config)
    log_of(tmp_path, config, "two").rewrite(msgspec.structs.replace(state(3, "two"), reward="another"), lambda rows: rows)
    (path,) = (tmp_path / "w" / STATE_FOLDER).glob(f"{3:012d}.*")
    path.unlink()
    log = log_of(tmp_path, config, "three")
    assert log.restore() is not None and "candidate_means" not in {field.name for field in DeltaTable(tmp_path / "w").schema().fields}
    means = np.ones(23, np.float32)
    log.commit(state(4, "three"), rows_to_table([msgspec.structs.replace(step(config, "c"), candidate_means=means)]))
    found = dict(zip(*read_steps(tmp_path).select(["step_id", "candidate_means"]).to_pydict().values(), strict=True))
    assert found == {"a": None, "b": None, "c": means.tolist()}


def test_a_log_of_before_the_means_of_the_candidates_is_read_and_goes_on(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = step_schema()
    with monkeypatch.context() as before:
        older_version(before)
        log = fill(tmp_path, config)
        log.commit(state(3), rows_to_table([msgspec.structs.replace(step(config, "d"), user_id="v")]))
    (folder,) = tmp_path.rglob("_delta_log")
    assert "candidate_means" not in {field.name for field in DeltaTable(folder.parent).schema().fields}
    assert read_steps(tmp_path)["candidate_means"].to_pylist() == [None, None, None]
    erased = erase_user(tmp_path, "w", {"v"}, now_ms=3, dry_run=False)  # by a newer version, before a worker of it has committed
    assert erased.rows == 1 and read_steps(tmp_path)["step_id"].to_pylist() == ["a", "b"]
    log, means = log_of(tmp_path, config, "two"), np.ones(23, np.float32)
    assert log.restore() == state(3)
    assert "candidate_means" not in {field.name for field in DeltaTable(folder.parent).schema().fields}, (
        "whoever only looks changes nothing"
    )
    log.commit(state(4, "two"), rows_to_table([msgspec.structs.replace(step(config, "c"), candidate_means=means)]))
    merged = read_steps(tmp_path)
    assert merged.schema.equals(schema)
    found = dict(zip(merged["step_id"].to_pylist(), merged["candidate_means"].to_pylist(), strict=True))
    assert found == {"a": None, "b": None, "c": means.tolist()}
    log.rewrite(state(5, "two"), lambda rows: rows)  # what recomputes rewards, merges and erases writes files like this
    assert read_steps(tmp_path).equals(merged)
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"list_size": 1, "num_unshown": 2})})
    steps = Steps.from_table(merged, config)
    expected = mean_input(*(steps.columns[name] for name in ("states", "scores", "valid")))
    for number, name in enumerate(merged["step_id"].to_pylist()):
        np.testing.assert_array_equal(steps.columns["candidate_means"][number], means if name == "c" else expected[number])


def test_a_commit_whose_answer_was_lost_is_done(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fill(tmp_path, config)

    def commit_then_fail(*args: object, **kwargs: object) -> None:
        monkeypatch.undo()
        write_deltalake(*args, **kwargs)
        raise OSError("connection reset after the commit")

    monkeypatch.setattr("streaming.steplog.write_deltalake", commit_then_fail)
    log.commit(state(3), rows_to_table([step(config, "c")]))
    log.commit(state(4), rows_to_table([step(config, "d")]))
    assert read_steps(tmp_path)["step_id"].to_pylist() == ["a", "b", "c", "d"] and log_of(tmp_path, config, "two").restore() == state(4)


def test_a_commit_that_failed_did_not_happen_and_can_be_made_again(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fill(tmp_path, config)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    for part in ("streaming.steplog.write_deltalake", "os.fsync"):  # the commit itself, then already its state file
        with monkeypatch.context() as patch:
            patch.setattr(part, fail)
            with pytest.raises(OSError, match="no space left"):
                log.commit(state(3), rows_to_table([step(config, "c")]))
        assert log_of(tmp_path, config, "two").restore() == state(2)
        assert not list((tmp_path / "w" / STATE_FOLDER).glob("*.writing"))
    log.commit(state(3), rows_to_table([step(config, "c")]))
    assert read_steps(tmp_path)["step_id"].to_pylist() == ["a", "b", "c"]


def test_a_failure_to_tidy_up_does_not_undo_the_commit(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = fill(tmp_path, config)

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(statefiles.StateFiles, "sweep", fail)
    log.commit(state(3), rows_to_table([]))
    assert log.committed == 3 and "step log not tidied commit=3" in caplog.text


def test_old_state_files_and_orphans_are_swept(tmp_path: Path, config: Config) -> None:
    log = fill(tmp_path, config)
    log._states.write(state(3, "killed"), "killed")
    for n in range(3, 8):
        log.commit(state(n), rows_to_table([]))
    assert sorted(path.name for path in (tmp_path / "w" / STATE_FOLDER).iterdir()) == [f"{n:012d}.one.msgpack" for n in (5, 6, 7)]


def test_a_crash_while_a_commit_is_voided_is_repaired_by_the_next_restart(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, config)
    next((tmp_path / "w" / STATE_FOLDER).glob(f"{2:012d}.*")).write_bytes(b"")

    def crash(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("streaming.steplog.rewrite", crash)
        log_of(tmp_path, config, "two").restore()
    for incarnation in ("three", "four"):  # the second one finds it done
        restored = log_of(tmp_path, config, incarnation).restore()
        assert restored is not None and (restored.commit, restored.positions) == (2, state(1).positions)
        assert [len(rows) for _, rows in read_commits(tmp_path, "w")] == [2, 0, 0]


def test_a_uri_is_as_good_as_a_path(tmp_path: Path, config: Config) -> None:
    root = tmp_path.as_uri()
    log = StepLog(root, "w", "one", config.spec.build())
    log.commit(state(0), rows_to_table([step(config, "a")]))
    assert StepLog(root, "w", "two", config.spec.build()).restore() == state(0)
    assert list_workers(root) == list_workers(tmp_path) == ["w"] and read_steps(root).equals(read_steps(tmp_path))


def test_state_files_live_in_any_store() -> None:
    files = statefiles.StateFiles("mock:///log/w/_state")  # Arrow's in-memory store, which has no fsync and no rename
    with pytest.raises(LogError, match="0 state files for commit 0"):
        files.read(0, None)
    for n in range(6):
        files.write(state(n), "one")
        files.sweep(n)
    assert files.read(5, "one") == files.read(5, None) == state(5)
    with pytest.raises(LogError, match="cannot read the state file"):
        files.read(2, "one")


def test_a_folder_that_is_not_there_has_no_workers(tmp_path: Path) -> None:
    assert list_workers(tmp_path / "nothing") == [] and len(read_steps(tmp_path / "nothing")) == 0


def test_a_buffer_refills_itself_from_the_log_on_disk(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config)
    buffer = ReplayBuffer(config, seed=0, read_log=partial(read_commits, str(tmp_path)))
    buffer.refill(["w"])
    assert buffer.lineage == {"w": 2} and buffer.samplable_ids() == {"a"} and buffer.chain("a", 2) == ["a", "b"]
