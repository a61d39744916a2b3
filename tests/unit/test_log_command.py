"""`esrl log show`, on a step log that really was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from esrl_ray.cli.log import log_group
from esrl_ray.config import load_config
from esrl_ray.errors import ConfigError
from esrl_ray.evaluation.arms import arm_rewards, session_rewards
from esrl_ray.evaluation.waterfall import drawable_steps
from esrl_ray.evaluation.weights import weights_by_version
from esrl_ray.vocabulary import Ended, StepRow
from streaming.steplog import StepLog, WorkerState, read_commits, read_steps, rows_to_table

SPEC = load_config(None).spec.build()
HOUR_MS = 1_700_000_000_000


def first(step_id: str, at_ms: int, *, session: str = "s", reward: float = 1.0) -> StepRow:
    """A step when it closes: two pairs, one shown."""
    k, a = SPEC.num_scores, SPEC.num_actions
    return StepRow(
        step_id=step_id,
        revision=0,
        session_id=session,
        user_id="u",
        index=0,
        partition=0,
        offset=at_ms,
        event_time_ms=HOUR_MS + at_ms,
        closed_ms=HOUR_MS + at_ms + 9_000,
        arm="exploit",
        policy_version=3,
        round=0,
        num_candidates=2,
        shown=np.array([True, False]),
        behaviours=np.zeros((2, 1), np.float32),
        rewards=np.array([[reward], [50.0]], np.float32),
        next_id=None,
        ended=Ended.OPEN,
        item_ids=("i", "j"),
        positions=np.array([0, -1], np.int32),
        states=np.zeros((2, SPEC.num_features), np.float32),
        categorical=np.zeros((2, SPEC.num_categorical), np.int32),
        scores=np.ones((2, k), np.float32),
        actions=np.full((2, a), 0.1, np.float32),
        anchor_actions=np.zeros((2, a), np.float32),
        fused_scores=np.zeros(2, np.float32),
    )


def later(row: StepRow, *, next_id: str | None, ended: Ended, reward: float) -> StepRow:
    """What became known of it afterwards."""
    fields = {
        name: getattr(row, name) for name in ("step_id", "session_id", "user_id", "index", "partition", "offset", "event_time_ms", "arm")
    }
    return StepRow(
        **fields,
        revision=1,
        closed_ms=row.closed_ms + 2_000,
        policy_version=row.policy_version,
        round=0,
        num_candidates=2,
        shown=row.shown,
        behaviours=row.behaviours,
        rewards=np.array([[reward], [0.0]], np.float32),
        next_id=next_id,
        ended=ended,
    )


A, B = first("step-a", 0), first("step-b", 3_000, reward=2.0)
COMMITS: dict[str, list[Sequence[StepRow]]] = {
    "ingest-0": [
        [A],
        [],
        [B, later(A, next_id="step-b", ended=Ended.HAS_NEXT, reward=4.0)],
        [later(B, next_id=None, ended=Ended.TERMINATED, reward=2.0)],
    ],
    "ingest-1": [[first("step-z", 1_000, session="t")]],
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose step log has two workers."""
    folder = tmp_path_factory.mktemp("run")
    for worker, commits in COMMITS.items():
        log = StepLog(folder / "log" / SPEC.digest, worker, "one", SPEC)
        for n, rows in enumerate(commits):
            positions = {"decisions/0": 10 * n, "feedback/0": 70 * n}
            state = WorkerState(commit=n, incarnation="one", positions=positions, joiners={}, committed_ms=HOUR_MS + 1_000 * n)
            log.commit(state, rows_to_table(rows))
    return folder


def show(run_dir: Path, *arguments: str) -> Result:
    """`esrl log show` in a wide window."""
    return CliRunner().invoke(log_group, ["show", "--set", f"run.dir={run_dir}", *arguments], env={"COLUMNS": "200"})


def failed(run_dir: Path, *arguments: str) -> str:
    """The text of the error that the command leaves with."""
    result = show(run_dir, *arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_commits_are_listed_with_rows_and_offsets(run_dir: Path) -> None:
    result = show(run_dir)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines() if line.strip().startswith("ingest-")]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        *(("ingest-0", str(n), str(len(rows))) for n, rows in enumerate(COMMITS["ingest-0"])),
        ("ingest-1", "0", "1"),
    ]
    assert "decisions/0@30 feedback/0@210" in result.output
    assert "2023-11-14 22:13:23.000" in result.output


def test_the_newest_commits_of_one_worker(run_dir: Path) -> None:
    output = show(run_dir, "--worker", "ingest-0", "--limit", "2").output
    commits = [line.split()[1] for line in output.splitlines() if line.strip().startswith("ingest-")]
    assert commits == ["2", "3"]


def test_one_commit_is_read_back(run_dir: Path) -> None:
    output = show(run_dir, "--worker", "ingest-0", "--commit", "2").output
    assert "commit 2 of ingest-0: 2 rows, 2 shown" in output
    assert "step-a" in output and "step-b" in output and "has_next" in output
    assert "0 rows" in show(run_dir, "--worker", "ingest-0", "--commit", "1").output


def test_steps_are_read_as_of_a_commit(run_dir: Path) -> None:
    assert "2 steps in 2 sessions: 2 open" in show(run_dir, "--as-of", "0").output
    assert "1 steps in 1 sessions: 1 open" in show(run_dir, "--as-of", "ingest-0=1").output
    assert "2 steps in 1 sessions: 1 has_next, 1 terminated" in show(run_dir, "--as-of", "ingest-0=3").output


def test_what_does_not_exist_is_named(run_dir: Path, tmp_path: Path) -> None:
    assert "no step log" in failed(tmp_path)
    assert "'ingest-7'" in failed(run_dir, "--worker", "ingest-7")
    assert "no commit 9" in failed(run_dir, "--worker", "ingest-0", "--commit", "9")
    assert "--worker" in failed(run_dir, "--commit", "0")
    assert "'x'" in failed(run_dir, "--as-of", "x=1")
    assert "worker=N" in failed(run_dir, "--as-of", "x")


def test_the_evaluation_reads_what_the_log_holds(run_dir: Path) -> None:
    root = run_dir / "log" / SPEC.digest
    steps = read_steps(root)
    # step-a's reward was amended from 1 to 4; the hidden pair's 50 never counts.
    sessions = session_rewards(steps)
    assert dict(zip(sessions.session_ids.tolist(), sessions.rewards.tolist(), strict=True)) == {"s": 6.0, "t": 1.0}
    assert arm_rewards(sessions, before_ms=HOUR_MS + 500)["exploit"].mean == 6.0
    (point,) = weights_by_version(steps, SPEC, published_ms={3: HOUR_MS}, start_ms=HOUR_MS)
    assert point.pairs == 3 and point.powers == pytest.approx((1.12, 1.12))
    table = drawable_steps("ingest-0", read_commits(root, "ingest-0"))
    assert table.select(["step_id", "commit", "drawable_commit"]).to_pylist() == [
        {"step_id": "step-a", "commit": 0, "drawable_commit": 2},
        {"step_id": "step-b", "commit": 2, "drawable_commit": 3},
    ]
