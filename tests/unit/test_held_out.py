"""Users whom learning leaves out: here and counted, never sampled, and the same ones in the replay as in the gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, InputDataError
from esrl_ray.evaluation.second_tier import Rule, held_out, held_out_rows
from esrl_ray.exploration import is_held_out
from esrl_ray.learning.algorithm_config import EnhancedRLConfig
from esrl_ray.learning.steps_feed import LoggedSteps
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.replay.steps import ARMS, Steps
from esrl_ray.vocabulary import Arm, Ended, StepRow
from streaming.steptable import rows_to_table
from tests.unit.test_replay import SET, buffer_of, step

SHARE = 0.3
USERS = [f"user-{i}" for i in range(200)]
ASIDE = [user for user in USERS if is_held_out(user, Arm.EXPLORE, share=SHARE)]
LEARNT = [user for user in USERS if user not in ASIDE]


@pytest.fixture
def config() -> Config:
    small = ["replay.capacity=1000", "serve.list_size=2", "serve.num_unshown=2", f"policy.held_out_share={SHARE}"]
    return load_config("configs/demo.yaml", [*SET, *small])


def of(config: Config, name: str, user: str, *, arm: Arm = Arm.EXPLORE, **options: object) -> StepRow:
    return replace(step(config, name, **options), user_id=user, arm=arm.value)  # type: ignore[arg-type]


def budget(buffer: ReplayBuffer) -> float:
    return buffer.limiter_state()["budget"]


def test_a_share_of_the_explore_users_is_held_out_and_nobody_else(config: Config) -> None:
    assert 0.2 < len(ASIDE) / len(USERS) < 0.4
    assert not any(is_held_out(user, arm, share=SHARE) for user in USERS for arm in (Arm.EXPLOIT, Arm.CONTROL))
    assert all(is_held_out(user, Arm.EXPLORE, share=1.0) for user in USERS)
    assert not any(is_held_out(user, Arm.EXPLORE, share=0.0) for user in USERS)


def test_held_out_steps_are_inserted_and_never_sampled(config: Config) -> None:
    rows = [of(config, user, user, ended=Ended.TERMINATED) for user in USERS]
    rows += [of(config, f"{user}/control", user, arm=Arm.CONTROL, ended=Ended.TERMINATED) for user in ASIDE]
    buffer = buffer_of(config, rows)
    assert buffer.num_inserted == buffer.size == len(rows)
    assert buffer.samplable_ids() == {*LEARNT, *(f"{user}/control" for user in ASIDE)}
    aside = {float(sum(map(ord, user))) for user in ASIDE} - {float(sum(map(ord, row.step_id))) for row in rows if row.user_id in LEARNT}
    drawn = [buffer.sample(4) for _ in range(200)]
    assert not aside & {float(value) for batch in drawn if batch is not None for value in batch["states"][:, 0, 0]}


def test_neither_a_next_list_nor_an_amendment_lets_a_held_out_step_be_sampled(config: Config) -> None:
    user = ASIDE[0]
    buffer = buffer_of(config, [of(config, "a", user, next_id="b", ended=Ended.HAS_NEXT)], [of(config, "b", user)])
    assert buffer.chain("a", 5) == ["a", "b"] and buffer.samplable_ids() == set()
    amended = of(config, "b", user, revision=1, ended=Ended.TERMINATED, reward=3.0)
    buffer.apply("w", 2, rows_to_table([amended]), inserted_ms=2)
    assert buffer.samplable_ids() == set() and buffer.step("b")["rewards"].max() == 3.0


def test_a_slot_that_a_held_out_step_had_serves_the_next_one(config: Config) -> None:
    tiny = load_config("configs/demo.yaml", [*SET, "replay.capacity=2", "serve.list_size=2", "policy.held_out_share=0.3"])
    rows = [of(tiny, name, user, ended=Ended.TERMINATED) for name, user in (("a", ASIDE[0]), ("b", LEARNT[0]))]
    buffer = buffer_of(tiny, rows)
    assert buffer.samplable_ids() == {"b"}
    again = [of(tiny, name, user, ended=Ended.TERMINATED) for name, user in (("c", LEARNT[1]), ("d", ASIDE[1]))]
    buffer.apply("w", 1, rows_to_table(again), inserted_ms=1)
    assert buffer.samplable_ids() == {"c"} and buffer.num_inserted == 4


def test_the_limiter_grants_for_what_can_be_learnt_from_alone(config: Config) -> None:
    buffer = buffer_of(config, [of(config, user, user, ended=Ended.TERMINATED) for user in ASIDE])
    assert budget(buffer) == 0 and buffer.sample(4) is None
    buffer.apply("w", 1, rows_to_table([of(config, user, user, ended=Ended.TERMINATED) for user in LEARNT]), inserted_ms=1)
    assert budget(buffer) == config.replay.samples_per_insert * len(LEARNT)
    assert buffer.sample(4) is not None


def test_the_gate_holds_out_the_users_that_the_replay_leaves_out(config: Config) -> None:
    rows = [of(config, user, user, arm=arm, ended=Ended.TERMINATED) for user, arm in zip(USERS, (*Arm,) * 100, strict=False)]
    table, rule = rows_to_table(rows), Rule.of(config)
    aside = {row.step_id for row, out in zip(rows, held_out_rows(table, rule=rule), strict=True) if out}
    assert aside and aside == {row.step_id for row in rows} - buffer_of(config, rows).samplable_ids()
    assert np.array_equal(held_out(Steps.from_table(table, config), rule), held_out_rows(table, rule=rule))


def test_what_rllib_reads_from_files_leaves_them_out_and_no_one_else(config: Config, tmp_path: Path) -> None:
    rows = [of(config, f"{user}/{arm}", user, arm=arm, ended=Ended.TERMINATED) for user in USERS[:20] for arm in Arm]
    aside = [row for row in rows if row.user_id in ASIDE and row.arm == Arm.EXPLORE]

    def read(chosen: list[StepRow]) -> set[tuple[str, str]]:
        path = tmp_path / "steps.parquet"
        pq.write_table(rows_to_table(chosen), path)
        steps = LoggedSteps(EnhancedRLConfig().training(deployment=config).offline_data(input_=str(path))).steps
        return {(steps.user_id(user), ARMS[arm].value) for user, arm in zip(steps.users.tolist(), steps.arms.tolist(), strict=True)}

    assert aside and read(rows) == {(row.user_id, row.arm) for row in rows} - {(row.user_id, row.arm) for row in aside}
    with pytest.raises(InputDataError, match=f"of {len(aside)} steps none is of a user left to learn from"):
        read(aside)


def test_without_a_share_the_gate_judges_by_every_explore_user_and_says_so(config: Config) -> None:
    rule = Rule.of(load_config("configs/demo.yaml", ["policy.held_out_share=0"]))
    table = rows_to_table([of(config, user, user, arm=arm) for user in USERS[:5] for arm in Arm])
    assert held_out_rows(table, rule=rule).sum() == 5 and not rule.unseen and Rule.of(config).unseen


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["policy.second_tier=block", "exploration.explore_share=0"], "explore_share 0.0 and serve.num_unshown 10 above 0"),
        (["policy.second_tier=require", "serve.num_unshown=0"], "second_tier require needs .* serve.num_unshown 0 above 0"),
        (
            ["policy.held_out_share=0.9", "exploration.explore_share=1", "exploration.exploit_share=0", "replay.capacity=8000"],
            "leaves 800 steps to sample, replay.min_size is 1000",
        ),
        (["policy.held_out_share=1"], "held_out_share"),
    ],
)
def test_what_could_never_be_judged_or_learnt_is_refused_at_load(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config("configs/demo.yaml", overrides)
