"""Logged requests as RLlib's offline input: Parquet in RLlib's columns, and an `OfflineData` that reads it without Ray Data.

Ray Data's pipeline starts workers and maps every record to an episode object and back: with it one fit took half a minute to
a minute on two shared cores before its first gradient step, needs a running Ray, and repeats the same minibatches in every epoch.
`offline_data_class` is RLlib's own setting for another source; what a learner gets is the same (tests/integration/test_rllib_peers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.offline.offline_data import OfflineData

from esrl_ray.methods.request_level import Requests
from esrl_ray.replay.steps import LEFT, Indices
from esrl_ray.spec import Spec

FILE = "requests.parquet"
N_STEP, WEIGHTS = "n_step", "weights"
"""Columns that SAC's loss takes from RLlib's replay buffer: length of the return and importance weight, 1 each."""


def to_records(requests: Requests, sessions: Indices, spec: Spec) -> pa.Table:
    """Requests in RLlib's columns, one record each, a session one episode.

    A session that goes on after its last known request is truncated there. Requests whose successor is not known (the newest of a
    running session, the last of one that was cut off) have no next observation: they are not written, but are one before them. Where all
    can be sampled they are, truncated.

    Args:
        requests: n of them.
        sessions: (n,) numbers of their sessions.
        spec: Which inputs belong to user and context: the observation.
    """
    known, inputs = requests.samplable, list(spec.request_inputs)
    following = requests.following[known]
    observations = requests.numeric.numpy()[:, inputs]
    after = observations[np.where(following >= 0, following, known)]  # nothing bootstraps where there is none
    written = np.isin(following, known)
    return pa.table(
        {
            Columns.EPS_ID: pa.array(sessions[known].astype(str)),
            Columns.OBS: _wide(observations[known]),
            Columns.NEXT_OBS: _wide(after),
            Columns.ACTIONS: _wide(requests.actions.numpy()[known]),
            Columns.REWARDS: pa.array(requests.rewards.numpy()[known]),
            Columns.TERMINATEDS: pa.array(following == LEFT),
            Columns.TRUNCATEDS: pa.array((following != LEFT) & ~written),
            N_STEP: pa.array(np.ones(len(known), np.float32)),
            WEIGHTS: pa.array(np.ones(len(known), np.float32)),
        }
    )


def write_records(records: pa.Table, folder: Path) -> None:
    """Write records where `LoggedRequests.read` and stock RLlib look for them."""
    pq.write_table(records, folder / FILE)


class LoggedRequests(OfflineData):  # type: ignore[misc]  # RLlib is untyped
    """Draws minibatches with replacement from records in memory; for a local learner (`num_learners=0`) and several updates per call.

    Args:
        config: RLlib's; `input_` is a folder that `write_records` wrote, `seed` that of the drawing.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        # Not the parent's: it would start Ray and read the folder with Ray Data.
        self.config = config
        self.iter_batches_kwargs: dict[str, Any] = {}  # MARWIL's training step passes them on
        self._rng = np.random.default_rng(config.seed)
        self.read(Path(config.input_))

    def read(self, folder: Path) -> None:
        """Draw from another folder's records from now on."""
        table = pq.read_table(folder / FILE)
        self._columns = {
            name: torch.from_numpy(_array(table[name])) for name in table.column_names if name not in {Columns.EPS_ID, Columns.TRUNCATEDS}
        }
        self._size = len(table)

    def sample(self, num_samples: int, return_iterator: bool = False, num_shards: int = 1, **kwargs: Any) -> list[LoggedRequests]:
        """What RLlib's training steps ask for before a learner call: the source itself, as an iterator that never ends."""
        assert return_iterator and num_shards == 0, "a local learner with several updates per call is all that is needed here"
        return [self]

    def iter_torch_batches(self, *, batch_size: int, device: str | torch.device, **kwargs: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Minibatches as RLlib's learner takes them from a Ray Data iterator: `module id/column` to tensors (batch_size, ...)."""
        while True:
            drawn = torch.from_numpy(self._rng.integers(self._size, size=batch_size))
            yield {f"{DEFAULT_MODULE_ID}/{name}": column[drawn].to(device) for name, column in self._columns.items()}


def _wide(values: npt.NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return np.stack(column.to_pylist()).astype(np.float32)
    values: npt.NDArray[Any] = column.to_numpy()
    return values.copy()
