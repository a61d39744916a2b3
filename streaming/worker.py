"""The ingest worker: poll, decode, join, commit, publish.

Delivery: exactly once into the step log. The positions of both topics and the state of the joins go into the same commit as the rows, so
a worker that died reads on from its last commit and derives again what was lost, under the same step ids. Dead letters and late events
are acknowledged before the commit that skips them. Commit first, publish second: a subscriber that misses a commit finds the gap in its
numbers and reads it from the log.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from esrl_ray.config import Config
from esrl_ray.errors import StreamError, WireError
from esrl_ray.reward import digest_of
from esrl_ray.secret import is_signed
from esrl_ray.vocabulary import Bucket, Refusal, StepRow
from streaming.health import label_delays
from streaming.late import LateEvents
from streaming.partitions import check_held
from streaming.protocols import Log, Publish, RecordSource, RefusedRecords
from streaming.recompute import other_rewards
from streaming.records import Record
from streaming.session_state import DECISIONS, FEEDBACK, Topic
from streaming.sessions import SessionJoiner
from streaming.source import place_of
from streaming.steplog import WorkerState, rows_to_table
from streaming.wire import LEAVE, SHOWN, Decision, DecodedDecision, Feedback, decode_decision, decode_feedback

_logger = logging.getLogger(__name__)

POLL_MS = 100
PAUSE_S = 0.05  # after a small poll: without it a fast broker would make a thousand polls of one record each
MIN_LEAD_MS = 1_000  # of event time, that one topic may be ahead of the other
SMALL_SHARE = 0.1  # of ingest.max_poll_records

_MADE_ANEW = "the topic was made anew or cut; to go on without these lists, start with a new run.dir"


class IngestWorker:
    """Turns the records of some partitions into commits of the step log.

    Args:
        config: Of the deployment.
        worker: Name, e.g. `ingest-0`.
        partitions: The same numbers of both topics; all that its log holds, see `streaming.partitions`.
        log: The worker's own step log.
        source_factory: Makes the source that reads on from `topic/partition` -> next offset.
        dead_letters: Takes what is refused.
        publish: Called in turn after each commit. A failure is logged: the step log is the truth.
        clock_ms: Wall clock.

    Raises:
        StreamError: the log holds other partitions, or gave one of these away.
        LogError: the stored state is damaged, or another reward made the rewards in the log.
    """

    def __init__(
        self,
        config: Config,
        worker: str,
        partitions: Sequence[int],
        *,
        log: Log,
        source_factory: Callable[[Mapping[str, int]], RecordSource],
        dead_letters: RefusedRecords,
        publish: Sequence[Publish],
        clock_ms: Callable[[], int],
    ) -> None:
        self._config, self._worker, self._partitions = config, worker, sorted(partitions)
        self._log, self._dead_letters, self._publish, self._clock_ms = log, dead_letters, publish, clock_ms
        self._spec, self._keys = config.spec.build(), config.serve.decision_keys
        self._behaviours = {SHOWN, LEAVE, *(b.name for b in config.reward.behaviours)}
        self._num_partitions = config.kafka.num_partitions
        self._max_lead_ms = max(MIN_LEAD_MS, round(config.join.lateness_s * 1000))
        self._max_ahead_ms = round(config.join.max_ahead_s * 1000)
        self._interval_ms = round(config.ingest.commit_interval_s * 1000)
        self._max_rows = max(1, config.max_commit_rows // len(self._partitions))  # of each partition in a commit
        self._late = LateEvents(config.kafka)
        self._names: dict[Topic, str] = {DECISIONS: config.kafka.decisions_topic, FEEDBACK: config.kafka.feedback_topic}
        state = log.restore()
        stored = {} if state is None else state.held
        if state is not None:
            check_held(state, worker, self._partitions)
            if state.reward and state.reward != config.reward.canonical:
                raise other_rewards(digest_of(state.reward), config.reward, worker)
        self._commit = -1 if state is None else state.commit
        self._committed_ms = 0 if state is None else state.committed_ms
        self._topic_ids = {} if state is None else state.topic_ids
        self._epochs = {} if state is None else {p: state.epochs.get(p, 0) for p in stored}
        self._joiners = {p: SessionJoiner(p, config, state=stored.get(p)) for p in self._partitions}
        self._source = source_factory({} if state is None else state.positions)
        self._lacking = {p: set(joiner.lacking.values()) for p, joiner in self._joiners.items() if joiner.lacking}
        self._source.read_again({f"{config.kafka.decisions_topic}/{p}": min(offsets) for p, offsets in self._lacking.items()})
        self._last_ledger = self._ledger()
        self._refusals: dict[Topic, Counter[Refusal]] = {DECISIONS: Counter(), FEEDBACK: Counter()}
        self._label_delays: Counter[str] = Counter()
        self._commit_s = self._tidy_s = 0.0
        self._due_ms = clock_ms() + self._interval_ms
        self._error: str | None = None
        self._lock = threading.Lock()
        self._status: dict[str, Any] = {}
        self._take_status()
        lacking = sum(map(len, self._lacking.values()))
        _logger.info("worker starts worker=%s partitions=%s commit=%d lacking=%d", worker, self._partitions, self._commit, lacking)

    def status(self) -> dict[str, Any]:
        """How the worker stands, as of its last poll or commit; may be called from another thread.

        Returns:
            ledger ({topic: {bucket: events}} since the first event ever), positions and lag (by `topic/partition`; records that no commit
            has), looked_ms (clock of the lag; it grows old while a commit hangs), watermarks_ms (by partition), open_sessions (by
            partition), is_behind (rows wait), steps_closed (since the first ever), refusals ({topic: {code: records}}) and label_delays
            ({class: steps}) by this process, commit, committed_ms, commit_s and tidy_s (of the last commit, the last care), error.
        """
        return self._status

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop, then commit once more. The source stays open for `drain`.

        Raises:
            EsrlError: going on would lose or repeat events; the reason is in the status too.
        """
        while not stop.is_set():
            if self.run_once() < SMALL_SHARE * self._config.ingest.max_poll_records:
                stop.wait(PAUSE_S)
        with self._alone():
            if not self._lacking:
                self._make_commit(self._advance())

    def release(self) -> int:
        """Commit once more and give all partitions away, to whoever is dealt them; nothing can be done then. The number of the commit."""
        with self._alone():
            self._make_commit([] if self._lacking else self._advance(), given=dict.fromkeys(self._partitions, ""))
            self._error = f"released partitions {self._partitions}"
            return self._commit

    def run_once(self) -> int:
        """Poll once, and commit when it is time.

        Returns:
            Number of records read.
        """
        with self._alone():
            records = self._source.poll(max(0, min(POLL_MS, self._due_ms - self._clock_ms())))
            for (topic, partition), num in self._source.take_skipped().items():
                self._joiners[partition].settle(DECISIONS if topic == self._names[DECISIONS] else FEEDBACK, Bucket.SKIPPED, num)
            if self._lacking:
                self._take_again(records)
                return len(records)
            self._take(records)
            self._source.hold(self._ahead())
            if not 0 < self._due_ms - self._clock_ms() <= self._interval_ms:  # also when the clock was set back
                self._make_commit(self._advance())
                self._due_ms = 0 if any(joiner.is_behind for joiner in self._joiners.values()) else self._due_ms
            return len(records)

    def drain(self, until: Mapping[str, int], timeout_s: float) -> bool:
        """Read up to the given end offsets, close what is open as truncated, commit and publish.

        Args:
            until: `topic/partition` -> end offset; partitions of others are ignored.
            timeout_s: Then it closes what it has.

        Returns:
            Whether the end offsets were reached.
        """
        mine = {f"{name}/{p}" for name in self._names.values() for p in self._partitions}
        ends = {where: end for where, end in until.items() if where in mine}
        deadline_ms = self._clock_ms() + round(timeout_s * 1000)
        while not (reached := self._has_read(ends)) and self._clock_ms() < deadline_ms:
            self.run_once()
        with self._alone():
            if self._lacking:
                return False
            while any(joiner.is_behind for joiner in self._joiners.values()):  # whose gap has passed has left, and is not truncated
                self._make_commit(self._advance())
            self._make_commit([row for joiner in self._joiners.values() for row in joiner.close(clock_ms=self._clock_ms())])
        _logger.info("worker drained worker=%s reached=%s commit=%d", self._worker, reached, self._commit)
        return reached

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time; and none after a failure, when the joins may be ahead of the log: a new worker restores them."""
        with self._lock:
            if self._error is not None:
                raise StreamError(f"the worker ended: {self._error}", self._worker, "make a new one, it goes on from the log")
            try:
                yield
            except Exception as error:
                self._error = f"{type(error).__name__}: {error}"
                self._status = {**self._status, "error": self._error}
                raise

    def _has_read(self, ends: Mapping[str, int]) -> bool:
        positions = self._source.positions()
        return all(positions.get(where, 0) >= end for where, end in ends.items())

    def _take_again(self, records: Sequence[Record]) -> None:
        """Give lists without a row their bulk back. These records were counted before, dead letters among them were sent."""
        for record in records:
            if record.offset not in self._lacking.get(record.partition, ()):
                continue
            where = f"{record.topic}[{record.partition}]@{record.offset}"
            try:
                decoded = decode_decision(record.value, self._spec, record.content_type)
            except WireError as error:
                raise StreamError(f"a list without a row stood here, now it is unreadable: {error}", where, _MADE_ANEW) from error
            if not self._joiners[record.partition].give_back(record.offset, decoded):
                raise StreamError(f"a list without a row stood here, now it is decision {decoded.event.decision_id}", where, _MADE_ANEW)
        if self._source.reads_again:
            return
        for partition in self._lacking:
            gone = sorted(self._joiners[partition].lacking.values())
            if gone and self._config.kafka.on_gap == "skip":
                self._joiners[partition].skip_lacking()
                _logger.warning("skipped lists without a row worker=%s partition=%d lists=%d", self._worker, partition, len(gone))
            elif gone:
                raise StreamError(
                    f"{len(gone)} decisions from offset {gone[0]} to {gone[-1]} are needed again for lists without a row and do not come",
                    f"{self._names[DECISIONS]}[{partition}]@{gone[0]}",
                    _MADE_ANEW,
                )
        self._lacking = {}
        _logger.info("worker has the open lists again worker=%s", self._worker)

    def _take(self, records: Sequence[Record]) -> None:
        decisions: dict[int, list[tuple[int, DecodedDecision]]] = defaultdict(list)
        feedback: dict[int, list[tuple[int, Feedback]]] = defaultdict(list)
        now_ms, num_passed = self._clock_ms(), 0
        latest_ms, decisions_topic, keep = now_ms + self._max_ahead_ms, self._names[DECISIONS], self._late.wanted
        for record in records:
            try:
                if record.too_large:
                    raise WireError(record.too_large, Refusal.TOO_LARGE)
                if record.topic == decisions_topic:
                    decoded = decode_decision(record.value, self._spec, record.content_type)
                    self._check(record, decoded.event, latest_ms)
                    decisions[record.partition].append((record.offset, decoded))
                    if keep and decoded.event.event_time_ms < self._joiners[record.partition].watermark_ms:
                        self._late.hold(record, decoded.event.decision_id)
                else:
                    event = decode_feedback(record.value, record.content_type)
                    if event.behaviour not in self._behaviours:
                        text = f"behaviour {event.behaviour!r} is not declared in reward.behaviours"
                        raise WireError(text, Refusal.UNDECLARED_BEHAVIOUR)
                    self._check(record, event, latest_ms)
                    feedback[record.partition].append((record.offset, event))
                    if keep:
                        self._late.hold(record, event.event_id)
                num_passed += 1
            except WireError as error:
                self._dead_letters.passed(num_passed)
                self._dead_letters.send(record, error)
                topic = DECISIONS if record.topic == decisions_topic else FEEDBACK
                self._joiners[record.partition].settle(topic, Bucket.DEAD_LETTER)
                self._refusals[topic][error.code] += 1
                num_passed = 0
        self._dead_letters.passed(num_passed)
        for partition in decisions.keys() | feedback.keys():
            self._joiners[partition].push(decisions[partition], feedback[partition])

    def _check(self, record: Record, event: Decision | Feedback, latest_ms: int) -> None:
        """Refuse what stands in the wrong place or time, or does not come from a decision of ours.

        Raises:
            WireError: with the reason for the dead letter.
        """
        session_id, event_time_ms = event.session_id, event.event_time_ms
        if event_time_ms > latest_ms:
            ahead_ms = event_time_ms - latest_ms + self._max_ahead_ms
            text = f"event_time_ms {event_time_ms} is {ahead_ms} ms ahead of the clock, at most {self._max_ahead_ms} is believed"
            raise WireError(text, Refusal.FAR_FUTURE)
        key, expected = place_of(session_id, self._num_partitions)
        if record.key != key:
            raise WireError(f"key {record.key!r} is not the session_id {session_id!r}", Refusal.KEY_MISMATCH)
        if record.partition != expected:
            text = f"partition {record.partition} is wrong for key {record.key!r}: murmur2, Kafka's default, gives {expected}"
            raise WireError(text, Refusal.WRONG_PARTITION)
        if self._keys and not is_signed(event.decision_id, session_id, self._keys):
            text = f"decision_id {event.decision_id!r} is not signed for session {session_id!r} with a key of serve.decision_keys"
            raise WireError(text, Refusal.NOT_SIGNED)

    def _ahead(self) -> list[tuple[str, int]]:
        """(topic, partition) that is read further than the lateness ahead of its other half: more of it would only wait, in memory.

        Kafka fetches by bytes, so after a pause one topic would come by the hour while the other comes by the minute.
        """
        held = []
        for partition, joiner in self._joiners.items():
            ahead, behind = (DECISIONS, FEEDBACK) if joiner.lead_ms > 0 else (FEEDBACK, DECISIONS)
            if abs(joiner.lead_ms) > self._max_lead_ms and not self._source.at_end(self._names[behind], partition):
                held.append((self._names[ahead], partition))
        return held

    def _advance(self) -> list[StepRow]:
        now_ms, names, rows = self._clock_ms(), self._names, list[StepRow]()
        for partition, joiner in self._joiners.items():
            rows += joiner.advance(
                clock_ms=now_ms,
                decisions_at_end=self._source.at_end(names[DECISIONS], partition),
                feedback_at_end=self._source.at_end(names[FEEDBACK], partition),
                limit=self._max_rows,
            )
        return rows

    def _make_commit(self, rows: Sequence[StepRow], given: Mapping[int, str] | None = None) -> None:
        start_ms = self._clock_ms()
        self._due_ms = start_ms + self._interval_ms
        self._status = {**self._status, **self._lag(self._status["positions"])}  # the commit may hang, or fail with the process
        ledger = self._ledger()
        if not rows and ledger == self._last_ledger and not given:  # every event read changes the ledger
            self._take_status()
            return
        self._check_topic_ids()
        n, table = self._commit + 1, rows_to_table(rows)
        self._late.hand_over(self._joiners, self._dead_letters)
        self._dead_letters.flush()
        base = self._log.base
        state = WorkerState(
            commit=n,
            incarnation=self._log.incarnation,
            positions=self._source.positions(),
            joiners={p: [joiner.snapshot(whole=base is None)] for p, joiner in self._joiners.items()},
            committed_ms=start_ms,
            topic_ids=self._topic_ids,
            reward=self._config.reward.canonical,
            epochs=self._epochs,
            given=dict(given or {}),
            builds_on=base,
        )
        self._log.commit(state, table)
        self._commit, self._last_ledger, self._committed_ms = n, ledger, self._clock_ms()
        self._label_delays.update(label_delays(table))
        self._commit_s = (self._committed_ms - start_ms) / 1000
        self._take_status()
        table = table.set_column(0, "commit", pa.array(np.full(len(table), n, np.int64)))
        for publish in self._publish:
            try:
                publish(self._worker, n, table, self._committed_ms)
            except Exception as error:  # a subscriber's trouble must not stop the log
                _logger.warning("publish failed worker=%s commit=%d reason=%s", self._worker, n, error)
        tidy_ms = self._clock_ms()
        if self._log.tidy(self._clock_ms, self._interval_ms // 2):  # after publishing, so that nobody waits for it
            self._tidy_s = (self._clock_ms() - tidy_ms) / 1000
            self._take_status()

    def _check_topic_ids(self) -> None:
        """Offsets of a topic made anew mean other records, also where it has as many already."""
        ids = self._source.topic_ids
        for topic, was in self._topic_ids.items():
            if (now := ids.get(topic, was)) != was:
                positions = " ".join(f"{where}@{n}" for where, n in self._source.positions().items() if where.rpartition("/")[0] == topic)
                raise StreamError(
                    f"topic {topic} was made anew: its id was {was}, now it is {now}",
                    positions,
                    "nothing of the new one was committed; start with a new run.dir",
                )
        self._topic_ids = self._topic_ids | ids

    def _ledger(self) -> dict[str, dict[str, int]]:
        total: Counter[tuple[str, Bucket]] = Counter()
        for joiner in self._joiners.values():
            total.update(joiner.ledger)
        topics: tuple[Topic, ...] = (DECISIONS, FEEDBACK)
        return {topic: {bucket.value: total[topic, bucket] for bucket in Bucket if bucket is not Bucket.NOT_YET_READ} for topic in topics}

    def _lag(self, committed: Mapping[str, int]) -> dict[str, Any]:
        """How far the committed positions are behind the end now, and the time."""
        read, waiting = self._source.positions(), {f"{topic}/{p}": events for (topic, p), events in self._source.lag().items()}
        lag = {where: events + read[where] - committed.get(where, read[where]) for where, events in waiting.items()}
        return {"lag": lag, "looked_ms": self._clock_ms()}

    def _take_status(self) -> None:
        """One dict for other threads, replaced as a whole."""
        positions = self._source.positions()
        self._status = {
            "ledger": self._last_ledger,
            "positions": positions,
            **self._lag(positions),
            "watermarks_ms": {p: joiner.watermark_ms for p, joiner in self._joiners.items()},
            "open_sessions": {p: joiner.num_open_sessions for p, joiner in self._joiners.items()},
            "label_delays": dict(self._label_delays),
            "is_behind": any(joiner.is_behind for joiner in self._joiners.values()),
            "steps_closed": sum(joiner.num_closed for joiner in self._joiners.values()),
            "refusals": {topic: {code.value: n for code, n in refused.items()} for topic, refused in self._refusals.items()},
            "commit": self._commit,
            "committed_ms": self._committed_ms,
            "commit_s": self._commit_s,
            "tidy_s": self._tidy_s,
            "error": self._error,
        }
