"""Steps in columns, whole sessions together: what methods fit on and estimates are made from. The step log's form in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.config import Config
from esrl_ray.normaliser import mean_input
from esrl_ray.replay.chains import cohorts, followers, long_term_columns
from esrl_ray.replay.storage import Storage
from esrl_ray.vocabulary import Arm, Ended, Floats, TransitionBatch

Indices = npt.NDArray[np.int64]

UNKNOWN, LEFT, CUT = -1, -2, -3
"""In `following`: not known yet, the user left (terminated), we stopped looking (truncated)."""

ARMS = tuple(Arm)


class Steps:
    """Columns of steps in order of time, and what follows each.

    Attributes:
        columns: states (n, G, F), categorical (n, G, C), scores (n, G, k), actions and anchor_actions (n, G, A), rewards (n, G, q),
            behaviours (n, G, num_behaviours), shown and valid (n, G); padding is 0 (scores 1). candidate_means (n, F + k),
            told (n,) as `Storage` has them.
        following: (n,) the number of the next step of the session, or UNKNOWN, LEFT, CUT.
        sessions: (n,) number of the session.
        users: (n,) number of the user.
        user_ids: Ids of the users by number, as the log had them; empty where there is no log, and user 7 is `u7` then.
        rounds: (n,) round of progressive training.
        arms: (n,) index in `ARMS`.
    """

    def __init__(self, config: Config, capacity: int) -> None:
        spec, self._q = config.spec.build(), config.reward.num_groups
        storage = Storage(spec, num_groups=self._q, capacity=capacity, max_pairs=config.max_pairs)
        behaviours = np.zeros((capacity, config.max_pairs, len(config.reward.behaviours)), np.float32)
        self._columns: dict[str, npt.NDArray[Any]] = {**storage.columns, "behaviours": behaviours}
        self._keys = {name: np.full(capacity, UNKNOWN, np.int64) for name in ("following", "sessions", "users", "rounds", "arms")}
        self._size = 0
        self.user_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._size

    @property
    def columns(self) -> Mapping[str, npt.NDArray[Any]]:
        """Views of the columns, n steps long."""
        return {name: column[: self._size] for name, column in self._columns.items()}

    @property
    def following(self) -> Indices:
        """(n,) what follows each step."""
        return self._keys["following"][: self._size]

    @property
    def sessions(self) -> Indices:
        """(n,) number of each step's session."""
        return self._keys["sessions"][: self._size]

    @property
    def users(self) -> Indices:
        """(n,) number of each step's user."""
        return self._keys["users"][: self._size]

    @property
    def rounds(self) -> Indices:
        """(n,) round of each step."""
        return self._keys["rounds"][: self._size]

    @property
    def arms(self) -> Indices:
        """(n,) index of each step's arm in `ARMS`."""
        return self._keys["arms"][: self._size]

    @property
    def list_rewards(self) -> Floats:
        """(n, q) reward of each list: the sum over its shown pairs."""
        rewards: Floats = (self.columns["rewards"] * self.columns["shown"][..., None]).sum(1)
        return rewards

    def user_id(self, number: int) -> str:
        """Id of one user."""
        return self.user_ids[number] if self.user_ids else f"u{number}"

    def add(self, keys: Mapping[str, npt.ArrayLike], columns: Mapping[str, npt.NDArray[Any]]) -> Indices:
        """Append steps.

        Args:
            keys: `sessions`, `users`, `rounds`, `arms`, each (m,) or one number.
            columns: All of `columns`, (m, G, ...) each; without `candidate_means` those are of the pairs; `told` is set here, unless given.

        Returns:
            (m,) their numbers.

        Raises:
            ValueError: no room for them.
        """
        count = len(columns["states"])
        numbers = np.arange(self._size, self._size + count)
        if self._size + count > len(self._keys["users"]):
            raise ValueError(f"{self._size} steps and {count} more exceed the capacity of {len(self._keys['users'])}")
        self._columns["told"][numbers] = "candidate_means" in columns
        if "candidate_means" not in columns:
            self._columns["candidate_means"][numbers] = mean_input(*(columns[name] for name in ("states", "scores", "valid")))
        for name, column in columns.items():
            self._columns[name][numbers] = column
        for name, key in keys.items():
            self._keys[name][numbers] = key
        self._size += count
        return numbers

    def follow(self, steps: Indices, by: Indices | int) -> None:
        """Set what follows steps: other steps, LEFT or CUT."""
        self._keys["following"][steps] = by

    def transitions(self, steps: Indices, *, horizon: int = 0) -> TransitionBatch:
        """These steps (b,) with their next lists; one whose next list is unknown counts as neither terminated nor followed.

        Args:
            steps: Numbers.
            horizon: H > 0 adds what long-term value needs.
        """
        c, following = self._columns, self._keys["following"][steps]
        has_next, after = (following >= 0).astype(np.float32), np.maximum(following, 0)
        batch = TransitionBatch(
            states=c["states"][steps],
            categorical=c["categorical"][steps],
            scores=c["scores"][steps],
            actions=c["actions"][steps],
            anchor_actions=c["anchor_actions"][steps],
            rewards=c["rewards"][steps],
            shown=c["shown"][steps],
            valid=c["valid"][steps],
            next_states=c["states"][after],
            next_categorical=c["categorical"][after],
            next_scores=c["scores"][after],
            next_shown=c["shown"][after] * has_next[:, None],
            has_next=has_next,
            terminated=(following == LEFT).astype(np.float32),
        )
        if horizon:
            chain = followers(self._keys["following"], steps, horizon)
            left, cohort = self._keys["following"] == LEFT, cohorts(self._keys["rounds"], self._keys["arms"])
            more = long_term_columns(left, steps, chain, means=c["candidate_means"], told=c["told"], cohorts=cohort)
            batch.update(cast(TransitionBatch, more))
        return batch

    def samplable(self, *, without_next: bool = False) -> Indices:
        """Numbers of the steps whose next list or end by the user is known; of all with `without_next` (`replay.sample_without_next`)."""
        return np.flatnonzero((self.following >= 0) | (self.following == LEFT) | without_next)

    def returns(self, gamma: float) -> npt.NDArray[np.float64]:
        """(n,) discounted sums of list rewards to the end of the session, as far as it is known: `G_t = r_t + gamma G_{t+1}`."""
        returns: npt.NDArray[np.float64] = self.list_rewards.sum(1).astype(np.float64)
        following = self.following
        for number in range(len(self) - 1, -1, -1):  # a step's next one stands behind it
            if following[number] >= 0:
                returns[number] += gamma * returns[following[number]]
        return returns

    @classmethod
    def from_table(cls, table: pa.Table, config: Config) -> Self:
        """Steps of a step log.

        Args:
            table: Merged steps (`streaming.steplog.read_steps`, or a Parquet file of `step_schema`) in order of event time.
            config: Deployment: widths, G, reward groups.
        """
        steps = cls(config, max(1, len(table)))
        storage = Storage(config.spec.build(), num_groups=steps._q, capacity=max(1, len(table)), max_pairs=config.max_pairs)
        everything = np.arange(len(table))
        if len(table):
            storage.write(everything, table, everything)
        behaviours = _behaviours(table, storage, len(config.reward.behaviours), config.max_pairs)
        numbers = {step_id: i for i, step_id in enumerate(table["step_id"].to_pylist())}
        steps.add(
            {
                "sessions": _codes(table["session_id"]),
                "users": _codes(table["user_id"]),
                "rounds": table["round"].to_numpy(),
                "arms": [ARMS.index(Arm(arm)) for arm in table["arm"].to_pylist()],
            },
            {**{name: column[: len(table)] for name, column in storage.columns.items()}, "behaviours": behaviours},
        )
        steps.user_ids = tuple(pc.unique(table["user_id"]).to_pylist())
        ends = {Ended.TERMINATED: LEFT, Ended.TRUNCATED: CUT, Ended.OPEN: UNKNOWN, Ended.HAS_NEXT: UNKNOWN}
        pairs = zip(table["next_id"].to_pylist(), table["ended"].to_pylist(), strict=True)
        steps._keys["following"][: len(table)] = [numbers.get(after, UNKNOWN) if after else ends[Ended(ended)] for after, ended in pairs]
        return steps


def _codes(column: pa.ChunkedArray) -> Indices:
    codes: Indices = pc.index_in(column, pc.unique(column)).to_numpy().astype(np.int64)
    return codes


def _behaviours(table: pa.Table, storage: Storage, width: int, max_pairs: int) -> Floats:
    """(n, G, width) combined behaviours in the places that storage gave the pairs."""
    behaviours = np.zeros((len(table), max_pairs, width), np.float32)
    valid = storage.columns["valid"][: len(table)] > 0
    values = pc.list_flatten(table["behaviours"]).to_numpy().reshape(-1, width) if len(table) else np.zeros((0, width), np.float32)
    starts = np.cumsum(storage.num_pairs[: len(table)]) - storage.num_pairs[: len(table)]
    behaviours[valid] = values[(starts[:, None] + storage.kept[: len(table)])[valid]]
    return behaviours
