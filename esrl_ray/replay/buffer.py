"""The replay buffer D: a view of the step logs, as columns in a ring.

Delivery: (worker, commit) is applied once and in order. What was applied is ignored, a gap is read from the log, so that a call that was
lost or repeated changes nothing. Within that, a step's row is known by its id and revision: a voided commit that comes again under
another number inserts nothing twice, and what it says now is what counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esrl_ray.config import Config
from esrl_ray.errors import LogError
from esrl_ray.exploration import is_held_out
from esrl_ray.replay.chains import cohorts, followers, long_term_columns
from esrl_ray.replay.limiter import Limiter
from esrl_ray.replay.sampler import Sampler
from esrl_ray.replay.storage import Storage
from esrl_ray.vocabulary import Arm, Ended, Floats, TransitionBatch

ReadLog = Callable[[str, int], Iterable[tuple[int, pa.Table]]]
"""(worker, after this commit) -> commits in order."""

MAX_TIMES = 100_000
"""Commits whose time of insertion is kept: two days of one worker."""

_NO_SLOT = -1
_NOW = ("states", "categorical", "scores", "actions", "anchor_actions", "rewards", "shown", "valid")
_NEXT = ("states", "categorical", "scores", "shown")


class ReplayBuffer:
    """Storage + sampler + limiter.

    A step can be sampled when what follows it is known: the user left, or its next list is here too. A truncated step has
    nothing to bootstrap from; with `replay.sample_without_next`, which needs gamma 0, every step is sampled from the start. Steps of
    held-out users (`policy.held_out_share`) are here, count as inserted, and are never sampled; the limiter grants nothing for them.

    Args:
        config: Spec, sizes, limits.
        seed: Of sampling.
        read_log: Reads commits that did not arrive.
    """

    def __init__(self, config: Config, *, seed: int, read_log: ReadLog) -> None:
        replay, learner = config.replay, config.learner
        self._spec, self._capacity, self._read_log = config.spec.build(), replay.capacity, read_log
        self._horizon = learner.num_future
        self._sample_without_next, self._held_out_share = replay.sample_without_next, config.policy.held_out_share
        self._storage = Storage(self._spec, num_groups=config.reward.num_groups, capacity=replay.capacity, max_pairs=config.max_pairs)
        self._sampler = Sampler(replay.capacity, seed=seed)
        self._limiter = Limiter(
            samples_per_insert=replay.samples_per_insert,
            min_size=replay.min_size,
            capacity=replay.capacity,
            batch=learner.batch_size * learner.updates_per_call,
        )
        self._ids: list[str | None] = [None] * replay.capacity
        self._next_ids: list[str | None] = [None] * replay.capacity  # of the steps that wait
        self._terminated = np.zeros(replay.capacity, np.float32)
        self._held_out = np.zeros(replay.capacity, np.bool_)
        self._cohorts = np.zeros(replay.capacity, np.int32)
        self._revisions = np.full(replay.capacity, -1, np.int32)
        self._next = np.full(replay.capacity, _NO_SLOT, np.int64)  # slot of the next list, while both are here
        self._previous = np.full(replay.capacity, _NO_SLOT, np.int64)  # slot of the step that has this one as its next list
        self._slots: dict[str, int] = {}
        self._waiting: dict[str, int] = {}  # next step's id -> slot of the step that waits for it
        self._head = 0
        self.lineage: dict[str, int] = {}
        self.inserted_ms: dict[tuple[str, int], int] = {}
        self.num_inserted = self.num_sampled = self.num_ignored_amendments = 0

    @property
    def size(self) -> int:
        """Steps in the buffer."""
        return len(self._slots)

    @property
    def num_samplable(self) -> int:
        """Steps that can be sampled."""
        return len(self._sampler)

    @property
    def num_cut_pairs(self) -> int:
        """Pairs that were left out because their step had more than G."""
        return self._storage.num_cut_pairs

    @property
    def num_bytes(self) -> int:
        """Bytes of the columns."""
        own = (self._revisions, self._terminated, self._next, self._previous, self._held_out, self._cohorts)
        return self._storage.num_bytes + self._sampler.num_bytes + sum(column.nbytes for column in own)

    def apply(self, worker: str, commit: int, rows: pa.Table, *, inserted_ms: int) -> None:
        """Take one commit.

        Args:
            worker: Whose step log.
            commit: Its number.
            rows: Of the step log's schema.
            inserted_ms: Clock, epoch milliseconds.

        Raises:
            LogError: commits before this one are missing, and the log does not have them (yet). The next call tries again.
        """
        if commit <= self.lineage.get(worker, -1):
            return
        if commit > self.lineage.get(worker, -1) + 1:
            self._catch_up(worker, until=commit - 1, inserted_ms=inserted_ms)
        if (have := self.lineage.get(worker, -1)) != commit - 1:
            raise LogError(f"commit {commit} of {worker} follows commit {have}, and the log has nothing between them")
        self._limiter.insert(self._insert(rows))
        self._mark(worker, commit, inserted_ms)

    def catch_up(self, workers: Sequence[str], *, inserted_ms: int) -> None:
        """Read what the logs hold beyond what was applied; new steps grant budget as if they had arrived."""
        for worker in workers:
            self._catch_up(worker, until=None, inserted_ms=inserted_ms)

    def _catch_up(self, worker: str, *, until: int | None, inserted_ms: int) -> None:
        for commit, rows in self._read_log(worker, self.lineage.get(worker, -1)):
            if until is not None and commit > until:
                break
            self._limiter.insert(self._insert(rows))
            self._mark(worker, commit, inserted_ms)

    def refill(self, workers: Sequence[str], *, inserted_ms: int = 0) -> None:
        """Build the view again from the logs, after a restart; grants no sampling budget.

        Commits of several workers come in the order of the clock that made their rows, so that the ring keeps the newest of all.
        """
        logs = (self._timed(worker) for worker in workers)
        for _, worker, commit, rows in heapq.merge(*logs, key=lambda entry: entry[:3]):
            self._limiter.refill(self._insert(rows))
            self._mark(worker, commit, inserted_ms)

    def _timed(self, worker: str) -> Iterator[tuple[int, str, int, pa.Table]]:
        """A worker's commits with the clock of their newest row; never earlier than the commit before."""
        clock_ms = 0
        for commit, rows in self._read_log(worker, self.lineage.get(worker, -1)):
            clock_ms = max(clock_ms, pc.max(rows["closed_ms"]).as_py() or 0)
            yield clock_ms, worker, commit, rows

    def limiter_state(self) -> dict[str, float]:
        """The limiter's totals, for a checkpoint."""
        return self._limiter.state()

    def restore_limiter(self, totals: Mapping[str, float]) -> None:
        """Go on with the totals of a checkpoint, or of before a restart."""
        self._limiter.restore(totals)

    def _mark(self, worker: str, commit: int, inserted_ms: int) -> None:
        self.lineage[worker] = commit
        self.inserted_ms[worker, commit] = inserted_ms
        if len(self.inserted_ms) > MAX_TIMES:
            del self.inserted_ms[next(iter(self.inserted_ms))]

    def _insert(self, rows: pa.Table) -> int:
        """Insert new steps and amend known ones; returns how many new ones learning may draw."""
        if not len(rows):
            return 0
        ids = rows["step_id"].to_pylist()
        revisions = rows["revision"].to_numpy().tolist()
        next_ids, ended = rows["next_id"].to_pylist(), rows["ended"].to_pylist()
        whole = rows["item_ids"].is_valid().to_pylist()
        new = {ids[i]: i for i in reversed(range(len(ids))) if whole[i] and ids[i] not in self._slots}  # the first of each
        order = list(reversed(new.values()))
        aside = self._aside(rows)
        cohort = cohorts(rows["round"].to_numpy(), pc.index_in(rows["arm"], pa.array(list(Arm), pa.string())).to_numpy())
        for start in range(0, len(order), self._capacity):
            chunk = order[start : start + self._capacity]
            slots = [self._claim(ids[i]) for i in chunk]
            self._storage.write(np.array(slots, np.int64), rows, np.array(chunk, np.int64))
            self._cohorts[slots] = cohort[chunk]
            for i, slot in zip(chunk, slots, strict=True):
                self._revisions[slot], self._held_out[slot] = revisions[i], aside[i]
                self._follow(slot, next_ids[i], Ended(ended[i]))
        self.num_inserted += len(order)
        newest: dict[int, int] = {}  # slot -> row of its highest revision among the later ones
        for i, step_id in enumerate(ids):
            if new.get(step_id) == i:
                continue
            slot = self._slots.get(step_id, _NO_SLOT)
            if slot == _NO_SLOT or (revisions[i] <= self._revisions[slot] and not whole[i]):
                self.num_ignored_amendments += 1
                continue
            self._revisions[slot] = revisions[i]  # a first row that comes again: its commit was voided, its revisions count anew
            newest[slot] = i
        if newest:
            self._storage.amend(np.fromiter(newest, np.int64), rows, np.fromiter(newest.values(), np.int64))
            for slot, i in newest.items():
                self._follow(slot, next_ids[i], Ended(ended[i]))
        return len(order) - int(aside[order].sum())

    def _aside(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """(n,) rows of users that learning leaves out."""
        if not self._held_out_share:
            return np.zeros(len(rows), np.bool_)
        pairs = zip(rows["user_id"].to_pylist(), rows["arm"].to_pylist(), strict=True)
        return np.array([is_held_out(user, arm, share=self._held_out_share) for user, arm in pairs], np.bool_)

    def _claim(self, step_id: str) -> int:
        """The next slot of the ring; whoever is there goes, and its links with it."""
        slot, self._head = self._head, (self._head + 1) % self._capacity
        if (old := self._ids[slot]) is not None:
            del self._slots[old]
            self._sampler.remove(slot)
            self._unlink(slot)
            if (before := self._previous[slot]) != _NO_SLOT:  # it has lost its next list for good
                if not self._sample_without_next:
                    self._sampler.remove(int(before))
                self._next[before] = self._previous[slot] = _NO_SLOT
        self._ids[slot] = step_id
        self._slots[step_id] = slot
        if (waiting := self._waiting.pop(step_id, None)) is not None:
            self._link(waiting, slot)
        return slot

    def _link(self, slot: int, following: int) -> None:
        self._next[slot], self._previous[following], self._next_ids[slot] = following, slot, None
        self._offer(slot)

    def _offer(self, slot: int) -> None:
        """Let a step be sampled, unless its user is held out."""
        if not self._held_out[slot]:
            self._sampler.add(slot)

    def _unlink(self, slot: int) -> None:
        """Forget what follows a step."""
        if (following := self._next[slot]) != _NO_SLOT:
            self._next[slot] = _NO_SLOT
            if self._previous[following] == slot:  # else a late step came between, and it is that one's now
                self._previous[following] = _NO_SLOT
        wanted = self._next_ids[slot]
        if wanted is not None and self._waiting.get(wanted) == slot:
            del self._waiting[wanted]
        self._next_ids[slot] = None

    def _follow(self, slot: int, next_id: str | None, ended: Ended) -> None:
        """Set what follows a step, and whether it can be sampled."""
        self._unlink(slot)
        self._terminated[slot] = ended is Ended.TERMINATED
        if ended is Ended.HAS_NEXT and next_id is not None:
            following = self._slots.get(next_id)
            if following is not None:
                self._link(slot, following)
                return
            self._waiting[next_id], self._next_ids[slot] = slot, next_id
        if ended is Ended.TERMINATED or self._sample_without_next:
            self._offer(slot)
        else:
            self._sampler.remove(slot)

    def sample(self, num_steps: int) -> TransitionBatch | None:
        """Draw transitions uniformly, with replacement.

        Args:
            num_steps: B.

        Returns:
            B transitions, or None while there is too little to sample or the limiter says wait.
        """
        if not self._limiter.take(num_steps, samplable=self.num_samplable):
            return None
        self.num_sampled += num_steps
        return self._transitions(self._sampler.draw(num_steps))

    def recent_lists(self, num_steps: int) -> TransitionBatch | None:
        """The newest steps as they are, without the limiter: for the normaliser and the gate's probes. None when there is none."""
        count = min(num_steps, self.size)
        return self._transitions((self._head - 1 - np.arange(count)) % self._capacity) if count else None

    def chain(self, step_id: str, num_steps: int) -> list[str]:
        """Ids of a step and of those that follow it in its session, `num_steps` at most, as far as they are here."""
        ids: list[str] = []
        slot = self._slots.get(step_id, _NO_SLOT)
        while slot != _NO_SLOT and len(ids) < num_steps:
            ids.append(self._ids[slot] or "")
            slot = int(self._next[slot])
        return ids

    def samplable_ids(self) -> set[str]:
        """Ids of all steps that can be sampled."""
        return {step_id for slot in self._sampler.members() if (step_id := self._ids[slot]) is not None}

    def step(self, step_id: str) -> dict[str, Floats]:
        """Columns of one step, (G, ...) each, and those of `Storage` that are of the step itself.

        Raises:
            KeyError: it is not here.
        """
        slot = self._slots[step_id]
        return {name: column[slot].copy() for name, column in self._storage.columns.items()}

    def _transitions(self, slots: npt.NDArray[np.int64]) -> TransitionBatch:
        following = self._next[slots]
        has_next = (following != _NO_SLOT).astype(np.float32)
        following = np.where(following == _NO_SLOT, slots, following)  # a step without a next list borrows its own columns ...
        wanted = {name: (name, slots) for name in _NOW} | {f"next_{name}": (name, following) for name in _NEXT}
        columns = self._storage.take(wanted)
        columns["next_shown"] *= has_next[:, None]  # ... shown to nobody
        more = {}
        if self._horizon:
            chain, of_steps = followers(self._next, slots, self._horizon), self._storage.columns
            means, told = of_steps["candidate_means"], of_steps["told"]
            more = long_term_columns(self._terminated, slots, chain, means=means, told=told, cohorts=self._cohorts)
        return cast(TransitionBatch, {**columns, "has_next": has_next, "terminated": self._terminated[slots], **more})
