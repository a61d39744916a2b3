"""Replay sampling against RLlib's and TorchRL's buffers and bare numpy, on the same columns, in turns.

Every buffer holds the same steps and gives B transitions (columns of a step and of the next one) drawn uniformly with replacement:

- ours: `ReplayBuffer.sample`, without and with what the split critic learns of the lists after the next one.
- bare numpy: fancy indexing of the same columns.
- RLlib's `EpisodeReplayBuffer`, as its SAC calls it (`sample_episodes=True`: B episodes of one step, not yet a batch) and as a batch
  of two steps each (`batch_length_T=2`); all columns of a step as one flat observation. Its multi-agent and prioritised buffers do the
  same and more per drawn step.
- RLlib's `ReplayBuffer` of the old stack: a `SampleBatch` per step, with its next columns.
- TorchRL's `TensorDictReplayBuffer` in memory and in a memory map; next columns are stored beside each step, as TorchRL does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.policy.sample_batch import SampleBatch
from ray.rllib.utils.replay_buffers import EpisodeReplayBuffer
from ray.rllib.utils.replay_buffers import ReplayBuffer as SampleBatchBuffer

from benchmarks.timing import Table, in_turns
from esrl_ray.config import Config
from esrl_ray.replay.buffer import ReplayBuffer

BATCHES = (128, 1024, 4096)
NEXT = ("states", "categorical", "scores", "shown")
OURS, AHEAD = "ours", "ours, with how the session goes on"

Columns = dict[str, np.ndarray]


def filled(config: Config, tables: Sequence[pa.Table]) -> ReplayBuffer:
    """Our buffer with all steps."""
    buffer = ReplayBuffer(config, seed=0, read_log=lambda worker, after: [])
    for number, table in enumerate(tables):
        buffer.apply("w", number, table, inserted_ms=0)
    return buffer


def transitions(buffer: ReplayBuffer, num_steps: int) -> Columns:
    """The columns that every buffer holds: as our buffer gives them, without the lists further ahead."""
    batch = buffer.recent_lists(num_steps)
    assert batch is not None
    return {name: np.ascontiguousarray(column) for name, column in dict(batch).items() if not name.startswith("future_")}


def numpy_calls(columns: Columns, sizes: Sequence[int]) -> dict[int, Callable[[], object]]:
    """Fancy indexing: the next step's columns of other steps, as a buffer that stores each step once reads them."""
    rng, count = np.random.default_rng(1), len(columns["shown"])
    now = {name: column for name, column in columns.items() if not name.startswith("next_")}

    def draw(size: int) -> object:
        drawn, following = rng.integers(0, count, size), rng.integers(0, count, size)
        return [column[drawn] for column in now.values()], [now[name][following] for name in NEXT]

    return {size: partial(draw, size) for size in sizes}


def episode_buffer(columns: Columns, session_length: int) -> EpisodeReplayBuffer:
    """RLlib's buffer of episodes, `session_length` steps each; a step's columns as one flat observation, actions and rewards apart."""
    count = len(columns["shown"])
    flat = np.concatenate([columns[name].reshape(count, -1).astype(np.float32) for name in (*NEXT, "valid")], 1)
    taken = np.concatenate([columns[name].reshape(count, -1) for name in ("actions", "anchor_actions", "rewards")], 1)
    spaces = [gym.spaces.Box(-np.inf, np.inf, (part.shape[1],), np.float32) for part in (flat, taken)]
    buffer = EpisodeReplayBuffer(capacity=count, batch_size_B=1, batch_length_T=1)
    for first in range(0, count - session_length + 1, session_length):
        part = slice(first, first + session_length)
        episode = SingleAgentEpisode(
            observations=[*flat[part], flat[first]],  # an episode ends with an observation that nobody acts on
            actions=list(taken[part]),
            rewards=[0.0] * session_length,
            observation_space=spaces[0],
            action_space=spaces[1],
            terminated=True,
            len_lookback_buffer=0,
        )
        episode.to_numpy()
        buffer.add(episode)
    return buffer


def sample_batch_buffer(columns: Columns) -> SampleBatchBuffer:
    """RLlib's buffer of single steps."""
    buffer = SampleBatchBuffer(capacity=len(columns["shown"]), storage_unit="timesteps")
    buffer.add(SampleBatch({name: column for name, column in columns.items() if column.size}))
    return buffer


def torchrl_calls(columns: Columns, sizes: Sequence[int], folder: Path) -> dict[str, dict[int, Callable[[], object]]]:
    """TorchRL's buffers.

    Raises:
        ImportError: TorchRL is not here or does not fit this torch.
    """
    from tensordict import TensorDict
    from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

    count = len(columns["shown"])
    data = TensorDict({name: torch.from_numpy(column) for name, column in columns.items() if column.size}, batch_size=[count])
    storages: dict[str, Any] = {
        "TorchRL, LazyTensorStorage": LazyTensorStorage(count),
        "TorchRL, LazyMemmapStorage": LazyMemmapStorage(count, scratch_dir=str(folder)),
    }
    calls: dict[str, dict[int, Callable[[], object]]] = {}
    for name, storage in storages.items():
        buffer = TensorDictReplayBuffer(storage=storage)
        buffer.extend(data)
        calls[name] = {size: partial(buffer.sample, size) for size in sizes}
    return calls


def sampling(
    config: Config, tables: Sequence[pa.Table], *, session_length: int, rounds: int, batches: Sequence[int] = BATCHES, peers: bool = True
) -> Table:
    """Samples per second of each buffer and batch size.

    Args:
        config: Deployment, with the split critic.
        tables: Of the step log; sessions of `session_length` steps.
        session_length: Steps per session.
        rounds: Draws that count.
        batches: B.
        peers: Also RLlib's and TorchRL's.
    """
    plain = config.model_copy(update={"learner": config.learner.model_copy(update={"critic": "list_sum"})})
    ours, ahead = filled(plain, tables), filled(config, tables)
    columns, notes = transitions(ours, ours.size), []
    calls: dict[str, dict[int, Callable[[], object]]] = {
        OURS: {size: partial(ours.sample, size) for size in batches},
        AHEAD: {size: partial(ahead.sample, size) for size in batches},
        "bare numpy": numpy_calls(columns, batches),
    }
    with ExitStack() as stack:
        if peers:
            episodes, single = episode_buffer(columns, session_length), sample_batch_buffer(columns)
            calls["RLlib EpisodeReplayBuffer, episodes"] = {
                size: partial(episodes.sample, num_items=size, n_step=1, sample_episodes=True) for size in batches
            }
            calls["RLlib EpisodeReplayBuffer, batch"] = {
                size: partial(episodes.sample, batch_size_B=size, batch_length_T=2) for size in batches
            }
            calls["RLlib ReplayBuffer (old stack)"] = {size: partial(single.sample, size) for size in batches}
            try:
                calls |= torchrl_calls(columns, batches, Path(stack.enter_context(TemporaryDirectory(prefix="esrl-speed-"))))
            except ImportError as error:
                notes.append(f"TorchRL is left out: {error}.")
        rows = []
        for size in batches:
            timings = in_turns({name: each[size] for name, each in calls.items()}, rounds=rounds)
            for name, timing in timings.items():
                ratios = (f"{theirs / mine:.2f}" for theirs, mine in zip(timing, timings[OURS], strict=True))
                rows.append((str(size), name, *(f"{size / seconds:,.0f}" for seconds in timing), *ratios))
    return Table(
        f"Replay sampling, {ours.size:,} steps",
        "none is set; ratios are how much faster ours is",
        ("B", "", "samples/s of the processor", "samples/s of wall time", "ratio (processor)", "ratio (wall)"),
        rows,
        notes,
    )
