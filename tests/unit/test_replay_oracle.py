"""The replay buffer against a plain list of steps, on random streams of two workers with evictions, late links and lost calls."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest
from msgspec.structs import replace

from esrl_ray.config import Config, load_config
from esrl_ray.replay.buffer import ReplayBuffer
from esrl_ray.vocabulary import Ended, StepRow
from streaming.steptable import rows_to_table
from tests.unit.test_replay import no_log, step

CAPACITY = 25
WORKERS = ("w0", "w1")
Commit = tuple[str, int, list[StepRow]]


@pytest.fixture(scope="module")
def config() -> Config:
    over = [f"replay.capacity={CAPACITY}", "replay.min_size=1", "replay.samples_per_insert=1000", "learner.batch_size=64"]
    return load_config("configs/demo.yaml", [*over, "learner.updates_per_call=1", "serve.list_size=2", "serve.num_unshown=2"])


def stream(config: Config, seed: int) -> list[Commit]:
    """Commits of two workers in order of the clock: sessions of several lists, whose links and rewards come at once, later, or never."""
    rng = np.random.default_rng(seed)
    waiting: dict[str, list[StepRow]] = {worker: [] for worker in WORKERS}
    num_steps, spec = 0, config.spec.build()
    width = spec.num_features + spec.num_scores
    for worker in WORKERS:
        for session in range(12):
            names = [f"{worker}.{session}.{i}" for i in range(rng.integers(1, 6))]
            for name, after in zip(names, [*names[1:], None], strict=True):
                ended = Ended.HAS_NEXT if after else (Ended.TERMINATED, Ended.TRUNCATED)[rng.integers(2)]
                whole = step(config, name, pairs=int(rng.integers(2, 6)), reward=1.0)
                linked = rng.random() < 0.5
                num_steps += 1
                states = np.full_like(whole.states, num_steps)  # tells whose pair it is
                first: dict[str, object] = {"next_id": after, "ended": ended, "round": num_steps % 3} if linked else {"arm": "exploit"}
                if rng.random() < 0.5:  # else its decision did not tell
                    first["candidate_means"] = np.full(width, 1000 + num_steps, np.float32)
                at = rng.integers(0, len(waiting[worker]) + 1)
                waiting[worker].insert(at, replace(whole, states=states, **first))
                if not linked or rng.random() < 0.3:
                    amended = step(config, name, pairs=len(whole.shown), revision=1, reward=2.0, next_id=after, ended=ended)
                    waiting[worker].insert(rng.integers(at + 1, len(waiting[worker]) + 1), amended)
    commits, numbers, clock_ms = [], dict.fromkeys(WORKERS, 0), 0
    while any(waiting.values()):
        worker = str(rng.choice([w for w in WORKERS if waiting[w]]))
        count, clock_ms = int(rng.integers(0, 12)), clock_ms + 1
        rows, waiting[worker] = waiting[worker][:count], waiting[worker][count:]
        commits.append((worker, numbers[worker], [replace(row, closed_ms=clock_ms) for row in rows]))
        numbers[worker] += 1
    return commits


def oracle(commits: list[Commit]) -> dict[str, StepRow]:
    """The last steps of the stream, each as its highest revision says."""
    steps: dict[str, StepRow] = {}
    for _, _, rows in commits:
        for row in rows:  # a commit's first rows go in before its amendments
            if row.revision == 0:
                if len(steps) == CAPACITY:
                    del steps[next(iter(steps))]
                steps[row.step_id] = row
        for row in rows:
            if row.revision > 0 and row.step_id in steps:
                steps[row.step_id] = replace(steps[row.step_id], rewards=row.rewards, next_id=row.next_id, ended=row.ended)
    return steps


def samplable(commits: list[Commit]) -> set[str]:
    """By the definition. A next list that came and was dropped again is not here either."""
    steps = oracle(commits)
    return {name for name, row in steps.items() if row.ended is Ended.TERMINATED or (row.ended is Ended.HAS_NEXT and row.next_id in steps)}


def reader(commits: list[Commit]) -> object:
    def read_log(worker: str, after: int) -> Iterable[tuple[int, pa.Table]]:
        return ((n, rows_to_table(rows)) for w, n, rows in commits if w == worker and n > after)

    return read_log


@pytest.mark.parametrize("seed", range(12))
def test_after_every_commit_it_holds_what_the_definition_says(config: Config, seed: int) -> None:
    commits = stream(config, seed)
    buffer = ReplayBuffer(config, seed=seed, read_log=no_log)
    for i, (worker, n, rows) in enumerate(commits):
        buffer.apply(worker, n, rows_to_table(rows), inserted_ms=i)
        steps = oracle(commits[: i + 1])
        assert buffer.size == len(steps) and buffer.samplable_ids() == samplable(commits[: i + 1])
        for name, row in steps.items():
            assert buffer.step(name)["rewards"].max() == (row.rewards.max())
            expected = [name]
            while (following := steps[expected[-1]]).ended is Ended.HAS_NEXT and following.next_id in steps and len(expected) < 3:
                expected.append(following.next_id)
            assert buffer.chain(name, 3) == expected
        if (batch := buffer.sample(64)) is not None:
            _check(batch, steps)  # type: ignore[arg-type]


def _check(batch: dict[str, np.ndarray], steps: dict[str, StepRow]) -> None:
    by_value = {float(row.states[0, 0]): row for row in steps.values() if row.states is not None}
    for b, value in enumerate(batch["states"][:, 0, 0].tolist()):
        row = by_value[value]
        pairs = min(len(row.shown), 4)
        assert batch["valid"][b].sum() == pairs and (batch["states"][b, :pairs] == value).all()
        assert batch["rewards"][b].sum() == row.rewards.sum() and batch["shown"][b].sum() == row.shown.sum()
        assert batch["terminated"][b] == (row.ended is Ended.TERMINATED) and batch["has_next"][b] == (row.ended is Ended.HAS_NEXT)
        following = steps.get(row.next_id or "")
        assert (following is not None) == bool(batch["has_next"][b])
        if following is not None and following.states is not None:
            assert batch["next_states"][b, 0, 0] == following.states[0, 0] and batch["next_shown"][b].sum() == following.shown.sum()
        else:
            assert not batch["next_shown"][b].any()
        second = None if following is None else steps.get(following.next_id or "")
        assert bool(batch["future_known"][b, 1]) == (second is not None)
        here = _mean_states(row)
        np.testing.assert_allclose(batch["candidate_means"][b, : batch["states"].shape[-1]], here, rtol=1e-6)
        compared = second is not None and (second.candidate_means is None) == (row.candidate_means is None)
        assert batch["future_change_known"][b] == compared
        change = _mean_states(second) - here if compared and second is not None else 0
        np.testing.assert_allclose(batch["future_change"][b, : batch["states"].shape[-1]], change, rtol=1e-4)
        served = row.round * 3 + ["explore", "exploit", "control"].index(row.arm)
        assert batch["cohort"][b] == 2 * served + (row.candidate_means is not None)


def _mean_states(row: StepRow) -> float:
    """All states of a row are alike."""
    mean = row.states[0, 0] if row.candidate_means is None else row.candidate_means[0]  # type: ignore[index]
    return float(mean)


@pytest.mark.parametrize("seed", range(6))
def test_lost_and_repeated_calls_and_a_restart_end_in_the_same_buffer(config: Config, seed: int) -> None:
    commits, rng = stream(config, seed), np.random.default_rng(seed)
    live = ReplayBuffer(config, seed=0, read_log=no_log)
    for worker, n, rows in commits:
        live.apply(worker, n, rows_to_table(rows), inserted_ms=0)
    refilled = ReplayBuffer(config, seed=1, read_log=reader(commits))  # type: ignore[arg-type]
    refilled.refill(WORKERS)
    assert refilled.num_inserted == live.num_inserted and refilled.lineage == live.lineage
    assert refilled.samplable_ids() == live.samplable_ids()
    names = set(oracle(commits))
    for name in names:
        for column, value in live.step(name).items():
            np.testing.assert_array_equal(refilled.step(name)[column], value)

    roomy = load_config(
        "configs/demo.yaml", ["replay.capacity=500", "replay.min_size=1", "serve.list_size=2", "serve.num_unshown=2"]
    )  # with a gap the order of two workers differs
    whole, lossy = (ReplayBuffer(roomy, seed=0, read_log=reader(commits)) for _ in range(2))  # type: ignore[arg-type]
    whole.refill(WORKERS)
    for worker, n, rows in commits:
        for _ in range(rng.integers(0, 3)):
            lossy.apply(worker, n, rows_to_table(rows), inserted_ms=0)
    lossy.catch_up(WORKERS, inserted_ms=0)
    assert lossy.lineage == whole.lineage and lossy.samplable_ids() == whole.samplable_ids()
    assert lossy.num_inserted == whole.num_inserted == whole.size
    assert lossy.limiter_state()["inserted"] == lossy.num_inserted, "steps read for a gap are new ones"
