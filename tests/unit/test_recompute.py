"""Another reward for old steps: what the log, its state, a refilled buffer and the commands say of it, also after a crash in the middle."""

from __future__ import annotations

import fcntl
import gc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from esrl_ray import actors
from esrl_ray.cli import learning
from esrl_ray.cli.log import log_group
from esrl_ray.cli.logged import read_log
from esrl_ray.config import Config, RunConfig, load_config
from esrl_ray.errors import ConfigError, Fenced, LogError
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.reward import rewards_of
from esrl_ray.vocabulary import StepRow
from streaming.recompute import check_rewards, recompute_rewards
from streaming.sessions import SessionJoiner
from streaming.steplog import StepLog, WorkerState, commit_history, read_commits, read_steps
from streaming.steptable import rows_to_table
from tests.unit.test_sessions import SPEC, T0, configure, decision, feedback

BEFORE = configure(label_age_s=4, lateness_s=5, gap_s=60, amend_s=60, dedup_s=300)
AFTER_REWARD = {
    "behaviours": [
        {"name": "share"},  # new, and in front
        *(b.model_dump() for b in reversed(BEFORE.reward.behaviours)),
    ],
    "groups": [{"name": "all", "expression": "click * log1p(watch) + 10 * share - 1", "default": -2.0}],
    "scale": 2.0,
}
AFTER = Config.model_validate({**BEFORE.model_dump(), "reward": AFTER_REWARD})


def worker_state(n: int, joiner: SessionJoiner, config: Config, incarnation: str = "one") -> WorkerState:
    return WorkerState(
        commit=n,
        incarnation=incarnation,
        positions={"decisions/0": n},
        joiners={0: [joiner.snapshot()]},
        committed_ms=T0 + n,
        reward=config.reward.canonical,
    )


def advance(joiner: SessionJoiner, seconds: float) -> list[StepRow]:
    return joiner.advance(clock_ms=T0 + round(1e3 * seconds), decisions_at_end=True, feedback_at_end=True)


def live(root: Path, worker: str = "ingest-0") -> SessionJoiner:
    """A worker's log of three commits: a closed step, nothing, and a late behaviour of it; then another step is still open."""
    joiner, log = SessionJoiner(0, BEFORE), StepLog(root, worker, "one", SPEC)
    first, second = f"{worker}-d0", f"{worker}-d1"
    joiner.push(
        [(0, decision(first, 0.0)), (1, decision(second, 18.0))],
        [
            (0, feedback(first, "shown", 0.5)),
            (1, feedback(first, "click", 1.0, item="i0")),
            (2, feedback(first, "watch", 1.5, item="i0", value=3.0)),
            (3, feedback(second, "shown", 18.5)),
            (4, feedback(second, "click", 18.6, item="i1")),
        ],
    )
    rows = advance(joiner, 10)
    log.commit(worker_state(0, joiner, BEFORE), rows_to_table(rows))
    log.commit(worker_state(1, joiner, BEFORE), rows_to_table([]))
    joiner.push([], [(5, feedback(first, "watch", 16.0, item="i1", value=7.0))])
    rows = advance(joiner, 24)
    log.commit(worker_state(2, joiner, BEFORE), rows_to_table(rows))
    return joiner


def again(root: Path, worker: str = "ingest-0", config: Config = AFTER) -> tuple[str, int] | None:
    return recompute_rewards(StepLog(root, worker, "two", SPEC), config.reward, committed_ms=T0)


def rewards_in(root: Path, q: int) -> dict[str, list[list[float]]]:
    steps = read_steps(root)
    return {
        step: np.round(np.reshape(values, (-1, q)), 4).tolist()
        for step, values in zip(steps["step_id"].to_pylist(), steps["rewards"].to_pylist(), strict=True)
    }


def test_every_row_has_the_new_reward_and_nothing_else_changes(tmp_path: Path) -> None:
    live(tmp_path)
    before = dict(read_commits(tmp_path, "ingest-0"))
    assert again(tmp_path) == (BEFORE.reward.digest, 3)
    after = dict(read_commits(tmp_path, "ingest-0"))
    assert list(after) == [0, 1, 2, 3] and not len(after[3])
    for n, rows in before.items():
        same = [name for name in rows.column_names if name not in ("rewards", "behaviours")]
        assert after[n].select(same).equals(rows.select(same))
    # behaviours are now share | rating | watch | click; i0 clicked 1, watched 3; i1 watched 7; i2 was not shown
    clicked = round((np.log1p(3.0) - 1) / 2, 4)
    assert rewards_in(tmp_path, 1) == {"ingest-0-d0": [[pytest.approx(clicked, abs=1e-4)], [-0.5], [0.0]]}
    assert read_steps(tmp_path)["behaviours"][0].as_py() == [0, 0, 3, 1, 0, 0, 7, 0, 0, 0, 0, 0]
    assert commit_history(tmp_path, "ingest-0")[-1].reward == AFTER.reward.digest


def test_a_default_and_a_lower_cap_reach_the_past(tmp_path: Path) -> None:
    live(tmp_path)
    watch = {"name": "watch", "combine": "sum", "cap": 5.0}
    behaviours = [watch if b.name == "watch" else b.model_dump() for b in BEFORE.reward.behaviours]
    groups = [{"name": "a", "expression": "watch", "default": -1.0}, {"name": "b", "expression": "click", "default": -1.0}]
    reward = {"behaviours": behaviours, "groups": groups}
    again(tmp_path, config=Config.model_validate({**BEFORE.model_dump(), "reward": reward}))
    assert rewards_in(tmp_path, 2) == {"ingest-0-d0": [[3.0, 1.0], [5.0, 0.0], [0.0, 0.0]]}


def test_the_join_goes_on_with_the_new_reward_and_the_old_behaviours_of_open_steps(tmp_path: Path) -> None:
    old = live(tmp_path)
    again(tmp_path)
    log = StepLog(tmp_path, "ingest-0", "three", SPEC)
    state = log.restore()
    assert state is not None and (state.commit, state.reward) == (3, AFTER.reward.canonical)
    joiner = SessionJoiner(0, AFTER, state=state.joiners[0])
    assert joiner.give_back(1, decision("ingest-0-d1", 18.0))
    share = feedback("ingest-0-d1", "share", 19.5, item="i1")
    for one, events in ((old, []), (joiner, [(6, share)])):
        one.push([], events)
    rows, expected = advance(joiner, 40), advance(old, 40)
    assert [r.step_id for r in rows] == [r.step_id for r in expected] and "ingest-0-d1" in {r.step_id for r in rows}
    for row, before in zip(rows, expected, strict=True):
        assert row.behaviours[:, 1:].tolist() == before.behaviours[:, ::-1].tolist()
        np.testing.assert_array_equal(row.rewards, rewards_of(row.behaviours, AFTER.reward) * row.shown[:, None])
    log.commit(worker_state(4, joiner, AFTER, "three"), rows_to_table(rows))
    assert rewards_in(tmp_path, 1)["ingest-0-d1"][1] == [4.5]  # 10 share - 1, over 2; log1p(0 watched) is 0


def test_a_refilled_buffer_has_the_new_rewards(tmp_path: Path) -> None:
    live(tmp_path)
    again(tmp_path)
    buffer = ReplayBuffer(AFTER, seed=0, read_log=partial(read_commits, tmp_path))
    buffer.refill(["ingest-0"])
    got = buffer.step("ingest-0-d0")["rewards"]
    assert got.shape == (AFTER.max_pairs, 1) and buffer.lineage == {"ingest-0": 3}
    assert got[:2, 0].tolist() == pytest.approx([(np.log1p(3.0) - 1) / 2, -0.5])


def test_a_crash_before_the_commit_leaves_the_old_and_a_repetition_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for worker in ("ingest-0", "ingest-1"):
        live(tmp_path, worker)
    again(tmp_path, "ingest-0")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # after the state file and the data files, before the commit

    with monkeypatch.context() as patch:
        patch.setattr("deltalake.DeltaTable.create_write_transaction", crash)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path, "ingest-1")
    gc.collect()  # the process that died held its lock no longer
    ours = commit_history(tmp_path, "ingest-1")[-1]
    assert (ours.commit, ours.reward) == (2, BEFORE.reward.digest)
    restored = StepLog(tmp_path, "ingest-1", "three", SPEC).restore()
    assert restored is not None and restored.reward == BEFORE.reward.canonical
    for config in (BEFORE, AFTER):  # half old, half new: nobody reads it as either
        with pytest.raises(LogError, match="recompute-rewards"):
            check_rewards(tmp_path, config.reward)
    assert again(tmp_path, "ingest-0") is None
    assert again(tmp_path, "ingest-1") == (BEFORE.reward.digest, 3)
    check_rewards(tmp_path, AFTER.reward)


def test_the_way_back_gives_the_old_rewards(tmp_path: Path) -> None:
    live(tmp_path)
    before, other = rewards_in(tmp_path, 2), BEFORE.reward.model_copy(update={"scale": 7.0})
    config = BEFORE.model_copy(update={"reward": other})
    assert again(tmp_path, config=config) == (BEFORE.reward.digest, 3)
    assert rewards_in(tmp_path, 2) != before
    assert again(tmp_path, config=BEFORE) == (other.digest, 4)
    assert rewards_in(tmp_path, 2) == before


def test_a_running_worker_is_not_pulled_the_rug_from_under(tmp_path: Path) -> None:
    live(tmp_path)
    running = StepLog(tmp_path, "ingest-0", "running", SPEC)
    with pytest.raises(LogError, match="stop `esrl ingest` first"):
        again(tmp_path)
    assert running._alive is not None
    fcntl.flock(running._alive, fcntl.LOCK_UN)  # as on an object store, where nothing tells that it runs
    again(tmp_path)
    with pytest.raises(Fenced):
        running.commit(worker_state(3, SessionJoiner(0, BEFORE), BEFORE, "running"), rows_to_table([]))


@pytest.mark.parametrize(
    ("behaviours", "what"),
    [
        ([{"name": "click"}, {"name": "watch", "combine": "sum", "cap": 10.0}], "'rating'"),
        ([{"name": "click"}, {"name": "watch", "combine": "max"}, {"name": "rating", "combine": "last"}], "combined by sum .* now max"),
    ],
    ids=["a behaviour that is gone", "another way to combine"],
)
def test_what_would_lose_behaviours_is_refused(tmp_path: Path, behaviours: list[dict[str, object]], what: str) -> None:
    live(tmp_path)
    config = Config.model_validate({**BEFORE.model_dump(), "reward": {"behaviours": behaviours}})
    with pytest.raises(ConfigError, match=what):
        again(tmp_path, config=config)
    check_rewards(tmp_path, BEFORE.reward)


def test_a_log_that_does_not_say_its_reward_is_given_one(tmp_path: Path) -> None:
    live(tmp_path)
    log = StepLog(tmp_path, "ingest-0", "two", SPEC)
    log.commit(WorkerState(commit=3, incarnation="two", positions={}, joiners={}, committed_ms=T0), rows_to_table([]))
    check_rewards(tmp_path, AFTER.reward)
    del log
    assert again(tmp_path, config=BEFORE) == ("", 4)
    with pytest.raises(LogError, match="expected 4 a pair"):
        StepLog(tmp_path, "ingest-0", "x", SPEC).commit(
            WorkerState(commit=5, incarnation="x", positions={}, joiners={}, committed_ms=T0), rows_to_table([])
        )
        again(tmp_path)


def test_the_command_rewrites_all_workers_and_readers_want_the_same_reward(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path}}}\nspec: {{item_features: [age]}}\nreward: {{groups: [{{name: all, expression: 3 * click}}]}}\n"
    )
    config = load_config(path)
    root = tmp_path / "log" / config.spec.build().digest
    arguments = ["recompute-rewards", "--config", str(path)]
    with pytest.raises(ConfigError, match="no step log"):
        CliRunner().invoke(log_group, arguments, standalone_mode=False, catch_exceptions=False)
    old = Config.model_validate({**config.model_dump(), "reward": {}})
    joiner = SessionJoiner(0, old)
    joiner.push([(0, decision("d", 0.0))], [(0, feedback("d", "shown", 0.5)), (1, feedback("d", "click", 1.0, item="i0"))])
    for worker in ("ingest-0", "ingest-1"):
        rows = advance(joiner, 10) if worker == "ingest-0" else []
        StepLog(root, worker, "one", SPEC).commit(worker_state(0, joiner, old), rows_to_table(rows))
    assert read_log(str(tmp_path), old).steps.columns["rewards"].sum() == 1.0
    with pytest.raises(LogError, match="recompute-rewards"):
        read_log(str(tmp_path), config)
    result = CliRunner().invoke(log_group, arguments, standalone_mode=False, catch_exceptions=False)
    assert result.output.count(f"commit 1, reward {old.reward.digest} -> {config.reward.digest}") == 2
    assert read_log(str(tmp_path), config).steps.columns["rewards"].sum() == 3.0
    result = CliRunner().invoke(log_group, arguments, standalone_mode=False, catch_exceptions=False)
    assert result.output.count(f"has reward {config.reward.digest}") == 2


def test_a_shard_of_another_reward_is_ended_and_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running, ended = {"replay-0": ("another reward", 1)}, []
    handle = SimpleNamespace(made_for=SimpleNamespace(remote="asked"))

    def spawn(name: str, _: type, config: Config, *args: object, **__: object) -> SimpleNamespace:
        running.setdefault(name, (config.reward.digest, config.replay.num_shards))
        return handle

    monkeypatch.setattr(actors, "spawn", spawn)
    monkeypatch.setattr(actors, "insist", lambda _: running["replay-0"])
    monkeypatch.setattr(actors, "end", lambda handles: ended.append(running.pop(next(iter(handles)))))
    config = AFTER.model_copy(update={"run": RunConfig(dir=str(tmp_path))})
    for made in ({}, {"num_shards": 2}, {"num_shards": 2}):  # and of another number of shards
        replay = config.replay.model_copy(update=made)
        assert learning.replay_shards(config.model_copy(update={"replay": replay})) == [handle] * replay.num_shards
    assert ended == [("another reward", 1), (AFTER.reward.digest, 1)] and running["replay-1"] == (AFTER.reward.digest, 2)


def test_a_damaged_state_takes_the_new_rewards_back(tmp_path: Path) -> None:
    live(tmp_path)
    before = [rows.to_pylist() for _, rows in read_commits(tmp_path, "ingest-0")]
    again(tmp_path)
    next((tmp_path / "ingest-0" / "_state").glob(f"{3:012d}.*")).unlink()
    restored = StepLog(tmp_path, "ingest-0", "three", SPEC).restore()
    assert restored is not None and (restored.commit, restored.reward) == (3, BEFORE.reward.canonical)
    assert [rows.to_pylist() for _, rows in read_commits(tmp_path, "ingest-0")] == [*before, []]
