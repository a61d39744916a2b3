"""The step log: one atomic commit, state before it, fencing, damage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from esrl_ray.config import Config, load_config
from esrl_ray.errors import Fenced, LogError
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.vocabulary import Ended
from streaming.steplog import STATE_FOLDER, StepLog, WorkerState, commit_history, list_workers, read_commits, read_steps
from streaming.steptable import rows_to_table
from tests.unit.test_replay import step


@pytest.fixture
def config() -> Config:
    return load_config("configs/demo.yaml")


def state(n: int, incarnation: str = "one") -> WorkerState:
    return WorkerState(commit=n, incarnation=incarnation, positions={"decisions/0": 10 * n}, joiners={0: b"x" * n}, committed_ms=n)


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
    assert [(i.commit, i.rows, i.committed_ms, i.incarnation) for i in commit_history(tmp_path, "w")] == [
        (0, 2, 0, "one"),
        (1, 0, 1, "one"),
        (2, 1, 2, "one"),
    ]


def test_steps_are_merged_over_revisions_and_can_be_read_as_of_a_commit(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config)
    now, then = read_steps(tmp_path), read_steps(tmp_path, as_of={"w": 1})
    assert now["step_id"].to_pylist() == then["step_id"].to_pylist() == ["a", "b"]
    assert now["ended"].to_pylist() == ["has_next", "open"] and then["ended"].to_pylist() == ["open", "open"]
    assert now["rewards"][0].as_py() == [0, 0, 7, 7, 7, 7] and now["item_ids"][0].as_py() == ["a0", "a1", "a2"]
    assert np.isclose(now["states"][0].as_py(), ord("a")).all()


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
    log._write_state(state(3))
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
    with pytest.raises(LogError, match=r"scores of step a has 3 values, expected 3 pairs x 5"):
        log_of(tmp_path, config).commit(state(0), rows_to_table([step(other, "a")]))
    assert log_of(tmp_path, config).restore() is None


def test_a_buffer_refills_itself_from_the_log_on_disk(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config)
    buffer = ReplayBuffer(config, seed=0, read_log=partial(read_commits, str(tmp_path)))
    buffer.refill(["w"])
    assert buffer.lineage == {"w": 2} and buffer.samplable_ids() == {"a"} and buffer.chain("a", 2) == ["a", "b"]
