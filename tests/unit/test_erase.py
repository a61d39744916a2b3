"""`esrl log forget`: a user goes out of tables whose owners go on, out of their files, and out of the replay; policies are named."""

from __future__ import annotations

import string
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from pyarrow import parquet

from esrl_ray import actors
from esrl_ray.cli.log import log_group
from esrl_ray.config import Config, LogConfig, load_config
from esrl_ray.errors import ConfigError, LogError
from esrl_ray.learning.replay_shard import ReplayShard
from esrl_ray.policy.policy import Manifest, PolicyKind
from esrl_ray.reward import RewardConfig
from esrl_ray.secret import pseudonym
from esrl_ray.vocabulary import Ended
from streaming import erase, logfiles
from streaming.erase import COMMIT_MS, Erased, erase_user
from streaming.recompute import check_rewards
from streaming.sessions import SessionJoiner
from streaming.steplog import StepLog, WorkerState, commit_history, last_state, read_commits, read_steps, rows_to_table
from tests.unit.test_log_command import SPEC, first, later
from tests.unit.test_sessions import CONFIG, T0, decision

NOW_MS = 1_700_000_000_000


def commit(log: StepLog, n: int, users: str, joiners: bytes = b"") -> None:
    """Commit n: a step of each user, and what became of those of the commit before."""
    rows = [msgspec.structs.replace(first(f"{n}{user}", n), user_id=user) for user in users]
    amended = [later(first(f"{n - 1}{user}", n - 1), next_id=f"{n}{user}", ended=Ended.HAS_NEXT, reward=n) for user in users if n]
    rows += [msgspec.structs.replace(row, user_id=user) for row, user in zip(amended, users, strict=False)]
    state = WorkerState(commit=n, incarnation=log.incarnation, positions={}, joiners={0: [joiners]}, committed_ms=NOW_MS)
    log.commit(state, rows_to_table(rows))


def log_of(root: Path, worker: str = "w", **care: Any) -> StepLog:
    return StepLog(root, worker, "one", SPEC, LogConfig(**care))


def users_of(root: Path) -> set[str]:
    return set(read_steps(root)["user_id"].to_pylist())


def on_disk(root: Path, user: str) -> list[str]:
    """Data files that hold the user, whether the table names them or not."""
    files = root.glob("*/date=*/*.parquet")
    return [path.name for path in files if user in parquet.read_table(path, columns=["user_id"])["user_id"].to_pylist()]


def test_a_user_is_gone_from_rows_and_files_and_everything_else_stays(tmp_path: Path) -> None:
    log = log_of(tmp_path, tidy_every=4)
    for n in range(6):
        commit(log, n, "ab" if n != 2 else "b")
        log.tidy(lambda: NOW_MS, 1_000)
    before = {n: [row for row in rows.to_pylist() if row["user_id"] != "a"] for n, rows in read_commits(tmp_path, "w")}
    counted = erase_user(tmp_path, "w", {"a"}, now_ms=NOW_MS, dry_run=True)
    assert (counted.rows, counted.num_steps, counted.commits) == (9, 6, (0, 1, 3, 4, 5)) and users_of(tmp_path) == {"a", "b"}
    assert erase_user(tmp_path, "w", {"a"}, now_ms=NOW_MS, dry_run=False) == counted
    assert {n: rows.to_pylist() for n, rows in read_commits(tmp_path, "w")} == before
    assert on_disk(tmp_path, "a") == [], "neither the files that were merged nor those that were rewritten are left"
    again = erase_user(tmp_path, "w", {"a"}, now_ms=NOW_MS, dry_run=False)
    assert (again.rows, again.num_steps, again.commits) == (0, 0, ())
    commit(log, 6, "b")
    assert log_of(tmp_path).restore() is not None and len(list(read_commits(tmp_path, "w"))) == 7, "the owner has noticed nothing"


def test_a_crash_before_the_files_are_removed_is_made_good_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(log_of(tmp_path), 0, "ab")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DeltaTable, "vacuum", crash)
        erase_user(tmp_path, "w", {"a"}, now_ms=NOW_MS, dry_run=False)
    assert on_disk(tmp_path, "a") and users_of(tmp_path) == {"b"}
    assert erase_user(tmp_path, "w", {"a"}, now_ms=NOW_MS, dry_run=False).rows == 0 and on_disk(tmp_path, "a") == []


def test_a_merge_at_the_same_moment_makes_it_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path, tidy_every=2)
    commit(log, 0, "ab")
    commit(log, 1, "ab")

    def after_a_merge(*args: Any, **options: Any) -> int:
        monkeypatch.undo()
        log.tidy(lambda: NOW_MS, 1_000)
        return logfiles.rewrite(*args, **options)

    monkeypatch.setattr(erase, "rewrite", after_a_merge)
    assert erase_user(tmp_path, "w", {"a"}, now_ms=NOW_MS, dry_run=False).rows == 3
    assert users_of(tmp_path) == {"b"} and on_disk(tmp_path, "a") == [] and len(read_steps(tmp_path)) == 2


def test_a_state_that_names_the_user_is_told(tmp_path: Path) -> None:
    """A step of user "u" with items "i0" to "i2" is pending in the first state, and in an open session in the second."""
    log, joiner = log_of(tmp_path), SessionJoiner(0, CONFIG)
    for n, (seconds, is_named) in enumerate([(1, True), (8, True), (60, True), (60, True), (60, False)]):
        joiner.push([(0, decision("d", 1.0))] if n == 0 else [], [])
        joiner.advance(clock_ms=T0 + 1_000 * seconds, decisions_at_end=True, feedback_at_end=True)
        commit(log, n, "b", joiner.snapshot())
        for name in ("u", "i0", "d"):
            erased = erase_user(tmp_path, "w", {name}, now_ms=NOW_MS, dry_run=False)
            assert erased.open_sessions == (is_named and name == "u"), (n, name)
    commit(log, 5, "b", msgspec.msgpack.encode("i0"))  # of another version
    assert erase_user(tmp_path, "w", {"i0"}, now_ms=NOW_MS, dry_run=False).open_sessions, "nobody can tell"


@pytest.mark.parametrize("half", [False, True])
def test_files_that_the_table_has_forgotten_or_never_knew_go_when_no_commit_can_name_them(tmp_path: Path, half: bool) -> None:
    log = log_of(tmp_path, tidy_every=2, keep_hours=0, history_minutes=0)
    for n in range(4):
        commit(log, n, "ab")
        log.tidy(lambda: round(time.time() * 1000), 1_000)
    orphan = tmp_path / "w" / "date=2023-11-14" / "part-of-a-commit-that-crashed.parquet"
    written = Path(DeltaTable(tmp_path / "w").file_uris()[0]).read_bytes()
    orphan.write_bytes(written[: len(written) // 2] if half else written)
    now_ms = round(time.time() * 1000)
    assert erase_user(tmp_path, "w", {"a"}, now_ms=now_ms, dry_run=False).unsettled > 1 and orphan.exists()
    assert erase_user(tmp_path, "w", {"nobody"}, now_ms=now_ms + 2 * COMMIT_MS, dry_run=False).unsettled == 0
    assert erase_user(tmp_path, "w", {"a"}, now_ms=now_ms + 2 * COMMIT_MS, dry_run=False).unsettled == 0
    assert not orphan.exists() and on_disk(tmp_path, "a") == [] and users_of(tmp_path) == {"b"}


def test_what_the_last_commit_says_is_found_behind_any_number_of_erased_users(tmp_path: Path) -> None:
    """Which reward made the rewards, and which of two states is that of the commit: one stands there of a worker that was killed."""
    reward, users = RewardConfig(), string.ascii_letters[:25]
    log = log_of(tmp_path)
    commit(log, 0, users)
    log._states.write(WorkerState(commit=1, incarnation="killed", positions={}, joiners={}, committed_ms=NOW_MS), "killed")
    state = WorkerState(commit=1, incarnation="one", positions={}, joiners={}, committed_ms=NOW_MS, reward=reward.canonical)
    log.commit(state, rows_to_table([]))
    for user in users[:22]:
        erase_user(tmp_path, "w", [user], now_ms=NOW_MS, dry_run=False)
    with pytest.raises(LogError, match="recompute-rewards"):
        check_rewards(tmp_path, reward.model_copy(update={"scale": 7.0}))
    assert log_of(tmp_path).restore() == last_state(tmp_path, "w") == state
    assert users_of(tmp_path) == set(users[22:]) and [info.commit for info in commit_history(tmp_path, "w", 1)] == [1]


@pytest.fixture
def deployment(tmp_path: Path) -> Config:
    """Two workers, three policies: of before, with, and beside the user's data."""
    config = load_config(None, [f"run.dir={tmp_path}"])
    root = Path(config.log_root)
    a, b = log_of(root, "ingest-0"), log_of(root, "ingest-1")
    commit(a, 0, "b")
    commit(a, 1, "ab")
    commit(b, 0, "b")
    for version, lineage in enumerate([{"ingest-0": 0}, {"ingest-0": 1, "ingest-1": 0}, {"ingest-1": 5}, {}], 1):
        manifest = Manifest(version=version, digest="", kind=PolicyKind.PAIR, spec=SPEC, lineage=lineage)
        folder = tmp_path / "policies" / f"{version:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return config


def forget(config: Config, *arguments: str) -> Result:
    path = Path(config.run.dir, "deployment.yaml")
    path.write_text(f"run: {{dir: {config.run.dir}}}\n")
    return CliRunner().invoke(log_group, ["forget", "--config", str(path), "--user-id", "a", *arguments])


def test_the_command_counts_erases_and_names_policies(deployment: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = ReplayShard(deployment, 0, partial(read_commits, deployment.log_root), lambda: NOW_MS, lambda: ["ingest-0", "ingest-1"])
    handle = SimpleNamespace(refill=SimpleNamespace(remote=shard.refill))
    monkeypatch.setattr(actors, "connect", lambda address: True)
    monkeypatch.setattr(actors, "present", lambda names: dict.fromkeys(names, handle))
    monkeypatch.setattr(actors, "insist", lambda call, **_: call())
    counted = forget(deployment, "--dry-run").output
    assert "ingest-0: 2 rows of 2 steps in commits 1 to 1 found\ningest-1: 0 rows of 0 steps found" in counted
    assert "policies trained on them: 2\n" in counted and "replay" not in counted and shard.stats()["size"] == 3
    done = forget(deployment).output
    assert "ingest-0: 2 rows of 2 steps in commits 1 to 1 erased" in done and "policies trained on them: 2\n" in done
    assert "replay-0: refilled from the log, 2 steps" in done and users_of(Path(deployment.log_root)) == {"b"}


def test_the_policies_are_named_before_anything_is_gone(deployment: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "connect", lambda address: False)
    calls = []

    def rewritten(root: str, worker: str, names: set[str], *, now_ms: int, dry_run: bool) -> Erased:
        calls.append((worker, dry_run))
        if worker == "ingest-1" and not dry_run:
            raise CommitFailedError("others came first")
        return erase_user(root, worker, names, now_ms=now_ms, dry_run=dry_run)

    monkeypatch.setattr("esrl_ray.cli.forget.erase_user", rewritten)
    result = forget(deployment)
    assert isinstance(result.exception, LogError) and "ingest-1 is rewritten by others" in str(result.exception)
    assert "policies trained on them: 2\n" in result.output and calls[:2] == [("ingest-0", True), ("ingest-1", True)]
    assert users_of(Path(deployment.log_root)) == {"b"}, "what is erased stays erased"


def test_nothing_is_erased_when_the_cluster_that_is_named_does_not_answer(deployment: Config) -> None:
    for address, reason in (("foo", "'foo' is no address"), ("127.0.0.1:1", "no Ray cluster answers"), ("127.0.0.1:x", "is no address")):
        result = forget(deployment, "--address", address)
        assert isinstance(result.exception, ConfigError) and reason in str(result.exception)
    assert users_of(Path(deployment.log_root)) == {"a", "b"}
    assert "there is no replay to refill" in forget(deployment, "--address", "none").output and users_of(Path(deployment.log_root)) == {"b"}


def test_with_a_user_key_rows_with_the_id_itself_go_too_and_so_do_both_forms_in_rejects(
    deployment: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of before the key was set, and of an import then."""
    key = "a key of a deployment that hashes its users"
    monkeypatch.setenv("ESRL_USER_KEY", key)
    hashed = pseudonym("a", load_config(None, [], environment={"ESRL_USER_KEY": key}).serve.user_key)
    root, rejects = Path(deployment.log_root), deployment.run.path / "rejects" / "import-0.jsonl"
    commit(log_of(root, "import-0"), 0, "ab")
    log = log_of(root, "ingest-2")
    state = WorkerState(commit=0, incarnation="one", positions={}, joiners={0: [msgspec.msgpack.encode("a")]}, committed_ms=NOW_MS)
    log.commit(
        state,
        rows_to_table([msgspec.structs.replace(first(name, 0), user_id=user) for name, user in (("x", hashed), ("y", "a"), ("z", "b"))]),
    )
    rejects.parent.mkdir()
    lines = [
        {"table": "t", "topic": "decisions", "row": row, "code": "malformed", "reason": "?", "sample": user}
        for row, user in enumerate((hashed, "a", "b"))
    ]
    rejects.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    result = forget(deployment, "--address", "none")
    assert "import-0: 1 rows of 1 steps in commits 0 to 0 erased" in result.output
    assert "ingest-2: 2 rows of 2 steps in commits 0 to 0 erased" in result.output and users_of(root) == {"b"}
    assert f"{rejects}: 2 refused rows that quote the user blanked" in result.output
    assert [msgspec.json.decode(line)["sample"] for line in rejects.read_bytes().splitlines()] == ["", "", "b"]
    assert "state of ingest-2 still names" in str(result.exception), "an open session of before the key"


def test_lines_of_rejects_that_nobody_knows_are_told_with_their_file(deployment: Config, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mine.jsonl"
    elsewhere.write_text("of a, cut o")
    result = forget(deployment, "--address", "none", "--rejects", str(elsewhere))
    assert isinstance(result.exception, LogError) and "the user's id is in 1 lines that are no refused rows" in str(result.exception)
    assert str(elsewhere) in str(result.exception) and users_of(Path(deployment.log_root)) == {"b"}


def test_without_a_cluster_the_log_is_erased_all_the_same(deployment: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "connect", lambda address: False)
    key = "a key of a deployment that hashes its users"
    monkeypatch.setenv("ESRL_USER_KEY", key)
    config = load_config(None, [], environment={"ESRL_USER_KEY": key})
    hashed = pseudonym("a", config.serve.user_key)
    log = log_of(Path(deployment.log_root), "ingest-2")
    commit(log, 0, "b")
    state = WorkerState(commit=1, incarnation="one", positions={}, joiners={0: [msgspec.msgpack.encode(hashed)]}, committed_ms=NOW_MS)
    log.commit(state, rows_to_table([msgspec.structs.replace(first("x", 0), user_id=hashed)]))
    result = forget(deployment)
    assert "ingest-0: 2 rows of 2 steps" in result.output and "ingest-2: 1 rows of 1 steps" in result.output
    assert "no Ray cluster runs here" in result.output
    assert isinstance(result.exception, LogError) and "state of ingest-2 still names the user" in str(result.exception)
