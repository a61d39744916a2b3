"""State files of the step log: each builds on those before it, chains are kept, damage goes back to the newest whole one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from esrl_ray.config import Config
from esrl_ray.errors import LogError
from streaming import statefiles
from streaming.statefiles import STATE_FOLDER
from streaming.steplog import StepLog, WorkerState, read_commits, read_steps
from streaming.steptable import rows_to_table
from tests.unit.test_replay import step
from tests.unit.test_steplog import fill, log_of, state


def fill_chains(root: Path, config: Config) -> StepLog:
    """Commits 0 to 11, each with a step; whole states are 0, 4 and 8, since three changes exceed them."""
    log = log_of(root, config)
    for n in range(12):
        part = str(n).encode().ljust(300 if log.base is None else 50)
        log.commit(msgspec.structs.replace(state(n), joiners={0: [part]}, builds_on=log.base), rows_to_table([step(config, f"{n:02d}")]))
    return log


def numbers_of(states: WorkerState | None) -> list[int]:
    assert states is not None and states.builds_on is None
    return [int(part) for part in states.joiners[0]]


def test_a_state_is_read_with_all_that_it_builds_on_and_two_chains_are_kept(tmp_path: Path, config: Config) -> None:
    fill_chains(tmp_path, config)
    assert numbers_of(log_of(tmp_path, config, "two").restore()) == [8, 9, 10, 11]
    kept = sorted(path.name for path in (tmp_path / "w" / STATE_FOLDER).iterdir())
    assert kept == [f"{n:012d}.one.msgpack" for n in range(4, 12)]


def test_the_first_state_of_an_incarnation_is_whole_and_what_it_found_is_kept(tmp_path: Path, config: Config) -> None:
    fill_chains(tmp_path, config)
    log = log_of(tmp_path, config, "two")
    log.restore()
    for n in (12, 13):
        assert log.base == (None if n == 12 else 12)
        log.commit(
            msgspec.structs.replace(state(n, "two"), joiners={0: [str(n).encode().ljust(100)]}, builds_on=log.base), rows_to_table([])
        )
    assert numbers_of(log_of(tmp_path, config, "three").restore()) == [12, 13]
    assert {path.name[:12] for path in (tmp_path / "w" / STATE_FOLDER).iterdir()} == {f"{n:012d}" for n in range(8, 14)}


def test_a_chain_is_never_longer_than_a_restart_should_read(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefiles, "MAX_CHAIN", 2)
    fill_chains(tmp_path, config)
    assert numbers_of(log_of(tmp_path, config, "two").restore()) == [9, 10, 11]


@pytest.mark.parametrize(("damaged", "left"), [([11], [8, 9, 10]), ([9], [8]), ([8], [4, 5, 6, 7]), ([8, 6], [4, 5])])
def test_damage_anywhere_in_a_chain_goes_back_to_the_newest_commit_before_it(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture, damaged: list[int], left: list[int]
) -> None:
    fill_chains(tmp_path, config)
    for n in damaged:
        next((tmp_path / "w" / STATE_FOLDER).glob(f"{n:012d}.*")).write_bytes(b"")
    log = log_of(tmp_path, config, "two")
    restored = log.restore()
    assert restored is not None and restored.commit == 11 and numbers_of(restored) == left
    assert f"commits are void, their events are read again first={left[-1] + 1} last=11" in caplog.text
    assert read_steps(tmp_path)["step_id"].to_pylist() == [f"{n:02d}" for n in range(left[-1] + 1)]
    log.commit(state(12, "two"), rows_to_table([step(config, "again")]))
    assert [len(rows) for _, rows in read_commits(tmp_path, "w")] == [*(int(n <= left[-1]) for n in range(12)), 1]
    assert log_of(tmp_path, config, "three").restore() == state(12, "two")


def test_all_damaged_is_an_error_that_names_the_newest_file(tmp_path: Path, config: Config) -> None:
    fill(tmp_path, config)
    for path in (tmp_path / "w" / STATE_FOLDER).iterdir():
        path.write_bytes(b"")
    with pytest.raises(LogError, match=r"sha256 .* no commit before 2 to go back to \(at .*000000000002.one.msgpack\)"):
        log_of(tmp_path, config, "two").restore()
