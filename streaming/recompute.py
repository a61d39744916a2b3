"""New rewards for old steps: the step log keeps what users did, so that another reward can be applied to the past.

Delivery: each worker's table is rewritten by one commit, the next in its count, whose state is the one before with the new reward. A crash
leaves the old table or the new one; run again, it rewrites what is still old. A worker that lives on is fenced by the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from esrl_ray.errors import ConfigError, LogError
from esrl_ray.reward import RewardConfig, digest_of, rewards_of
from esrl_ray.vocabulary import Floats
from streaming.session_state import encode_state, read_chain
from streaming.steplog import StepLog, commit_history, list_workers


def recompute_rewards(log: StepLog, reward: RewardConfig, *, committed_ms: int) -> tuple[str, int] | None:
    """Apply a reward to every row of a worker's table.

    Behaviours are known by their names: one that is new is 0 in the past, and a cap that is lower cuts the past as well.

    Args:
        log: Owned by nobody else.
        reward: The new one.
        committed_ms: Clock.

    Returns:
        Digest of the reward before, empty when the log did not say, and the number of the commit; None when there was nothing to do.

    Raises:
        ConfigError: a behaviour of the log is not declared any more, or combines in another way.
        LogError, Fenced: as `StepLog.rewrite`.
    """
    state = log.restore()
    if state is None or state.reward == reward.canonical:
        return None
    before = RewardConfig.model_validate_json(state.reward) if state.reward else reward
    _check_behaviours(before, reward)
    columns = [before.names.index(name) if name in before.names else -1 for name in reward.names]
    joiners = state.joiners if before.names == reward.names else {p: [_moved(parts, p, columns)] for p, parts in state.joiners.items()}
    n, mine = state.commit + 1, log.incarnation
    changed = msgspec.structs.replace(
        state, commit=n, incarnation=mine, joiners=joiners, committed_ms=committed_ms, reward=reward.canonical
    )
    log.rewrite(changed, lambda rows: with_rewards(rows, columns, len(before.names), reward))
    return digest_of(state.reward) if state.reward else "", changed.commit


def check_rewards(root: str | Path, reward: RewardConfig) -> None:
    """Refuse a log whose rewards another reward section made; a log that does not say passes.

    Raises:
        LogError: names the worker and both digests.
    """
    for worker in list_workers(root):
        made = commit_history(root, worker, 1)
        if made and made[-1].reward not in (None, reward.digest):
            raise other_rewards(made[-1].reward or "", reward, f"{root}/{worker}")


def other_rewards(digest: str, reward: RewardConfig, where: str) -> LogError:
    """What a log says whose rewards are not the configuration's."""
    fix = "apply the configured one to the past with `esrl log recompute-rewards`, or take the log's configuration or another run.dir"
    return LogError(f"the rewards in the step log are of reward {digest}, the configuration's is {reward.digest}", where, fix)


def with_rewards(rows: pa.Table, columns: list[int], num_before: int, reward: RewardConfig) -> pa.Table:
    """Rows of the log with behaviours and rewards as a configuration has them.

    Args:
        rows: Of the step log's schema.
        columns: For each behaviour of the configuration its column in the rows, -1 for a new one.
        num_before: Behaviours of a pair in the rows.
        reward: Of the configuration.

    Raises:
        LogError: the rows have another number of behaviours.
    """
    pairs = rows["shown"].combine_chunks()
    shown, found = pairs.flatten().to_numpy(zero_copy_only=False), rows["behaviours"].combine_chunks().flatten().to_numpy()
    if len(found) != len(shown) * num_before:
        raise LogError(f"rows hold {len(found)} behaviours for {len(shown)} pairs, expected {num_before} a pair", "behaviours")
    padded = np.pad(found.reshape(-1, num_before), ((0, 0), (0, 1)))  # (pairs, before + 1), the last column is a new behaviour's
    caps = np.asarray([b.cap for b in reward.behaviours], np.float32)
    behaviours: Floats = np.clip(padded[:, columns], -caps, caps)
    lengths = pairs.value_lengths().to_numpy()
    values = {"behaviours": behaviours, "rewards": rewards_of(behaviours, reward) * shown[:, None]}
    for name, flat in values.items():
        offsets = np.concatenate([[0], np.cumsum(lengths * flat.shape[1])]).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.reshape(-1), pa.float32()))
        rows = rows.set_column(rows.column_names.index(name), name, lists)
    return rows


def _check_behaviours(before: RewardConfig, reward: RewardConfig) -> None:
    now = {b.name: b for b in reward.behaviours}
    for b in before.behaviours:
        if b.name not in now:
            raise ConfigError(
                f"the step log has the behaviour {b.name!r}", "reward.behaviours", "keep it declared; no group needs to use it"
            )
        if (other := now[b.name].combine) != b.combine:
            fix = "keep it, or declare a behaviour of another name"
            raise ConfigError(f"behaviour {b.name!r} was combined by {b.combine} in the step log, now {other}", "reward.behaviours", fix)


def _moved(chain: list[bytes], partition: int, columns: list[int]) -> bytes:
    """A join's state whose open steps have their behaviours where the new configuration looks for them."""
    state, num_before = read_chain(chain, partition), sum(column >= 0 for column in columns)
    to = {column: i for i, column in enumerate(columns) if column >= 0}
    for step in (step for session in [*state.active, *state.sessions] for step in session.steps):
        step.values, step.newest = _cells(step.values, num_before, to, len(columns)), _cells(step.newest, num_before, to, len(columns))
    return encode_state(state)


_T = TypeVar("_T")


def _cells(cells: Mapping[int, _T], num_before: int, to: Mapping[int, int], num_now: int) -> dict[int, _T]:
    return {cell // num_before * num_now + to[cell % num_before]: value for cell, value in cells.items()}
