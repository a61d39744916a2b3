"""Records from the assigned partitions of both topics, from given positions on. No consumer group: the position is our state, not Kafka's.

Delivery: exactly the records from the stored positions on, in partition order, committed transactions only. Nothing is skipped silently:
a gap (retention passed the position, a topic made anew, another number of partitions) is a `StreamError`; with `kafka.on_gap: skip` the
first kind is counted. A broker that is down is not an error: `poll` returns nothing, `degraded_s` grows, and no partition counts as read to
its end, or its watermark would follow the clock past events that producers still hold back. One that refuses us is an error: at once when
it has let us in before, else after `REFUSED_S`.

kafka-python 3.0.12: `poll` spins at full speed while its broker is gone, so the port is asked first. ListOffsets waits behind the fetch
that is under way on the same connection, hence the short `fetch_max_wait_ms`. Records of a partition that was paused in the middle of a
fetch come again only when `_next_partition_records` is None, which it never is after the first fetch: `poll` here sees to that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import CorruptRecordError, KafkaError, OffsetOutOfRangeError, RetriableError
from kafka.partitioner.default import murmur2

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, BrokerRefused, StreamError
from streaming.broker import check_partitions
from streaming.client import REFUSED_S, connect, reachable
from streaming.records import FetchedRecords, Record

_logger = logging.getLogger(__name__)

ENDS_INTERVAL_S, ENDS_VALID_S, ENDS_TIMEOUT_MS = 0.5, 2.0, 1_000
METADATA_MAX_AGE_MS = 30_000
MAX_BACKOFF_S = 2.0
_PASS_BY = ". To go on without this batch, delete the partition's records up to its end (kafka-delete-records) and set kafka.on_gap to skip"


class _NotThereError(Exception):
    """The broker or a topic is not there; it may come."""


class Source:
    """Reads some partitions of both topics; connects at the first `poll`, and again whenever the broker comes back.

    Args:
        config: Broker and topics.
        partitions: The same numbers of both topics.
        positions: `topic/partition` -> next offset; a partition without one starts at its beginning.
        max_poll_records: Records per poll, at most.
        clock_s: Monotonic clock.
    """

    def __init__(
        self,
        config: KafkaConfig,
        partitions: Sequence[int],
        positions: Mapping[str, int],
        *,
        max_poll_records: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._clock_s = config, clock_s
        self._topics = (config.decisions_topic, config.feedback_topic)
        self._assigned = [TopicPartition(topic, p) for topic in self._topics for p in partitions]
        self._stored = {_name(tp): positions[_name(tp)] for tp in self._assigned if _name(tp) in positions}
        self._positions: dict[Any, int] = {}
        self._skipped: Counter[tuple[str, int]] = Counter()  # since `take_skipped`
        self._topic_ids: dict[str, str] = {}
        self._again: dict[Any, int] = {}  # next offset of what is read again, while it is below the stored position
        self._held: set[Any] = set()  # as asked
        self._paused: set[Any] = set()  # as the consumer knows it
        self._ends: dict[Any, int] = {}  # of what can be read
        self._highs: dict[Any, int] = {}  # ends as the last fetch told them, open transactions included
        self._ends_s = self._asked_s = clock_s() - ENDS_VALID_S
        self._max_poll_records = max_poll_records
        self._consumer: Any = None
        self._out_of_range = False
        self._down_since_s: float | None = None
        self._backoff_s, self._give_up_s = 0.1, math.inf

    @property
    def degraded_s(self) -> float:
        """For how long the broker has been down; 0 when it is not."""
        return 0.0 if self._down_since_s is None else self._clock_s() - self._down_since_s

    @property
    def reads_again(self) -> bool:
        """Records below the stored positions are still to come, and only those come now."""
        return bool(self._again)

    def read_again(self, starts: Mapping[str, int]) -> None:
        """Before the first `poll`: first return the records from these offsets up to the stored positions once more."""
        self._again = {tp: starts[_name(tp)] for tp in self._assigned if _name(tp) in starts}

    @property
    def topic_ids(self) -> dict[str, str]:
        """Topic -> Kafka's id of it, another one when it was made anew; empty before the first connection."""
        return self._topic_ids

    def take_skipped(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> offsets passed over since the last call because retention deleted them; only with `kafka.on_gap: skip`."""
        skipped, self._skipped = self._skipped, Counter()
        return dict(skipped)

    def hold(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Return no records of these (topic, partition), until the next call says otherwise."""
        self._held = {TopicPartition(topic, partition) for topic, partition in partitions}

    def poll(self, timeout_ms: int) -> list[Record]:
        """Records that came, in partition order; empty after the time, and while the broker is down.

        Raises:
            StreamError: going on would lose events, the topics changed, or reading is not allowed.
        """
        reads_again = bool(self._again)
        try:
            if self._consumer is None:
                self._open()
            elif self._down_since_s is not None and not reachable(self._config, timeout_s=0.5):
                self._pause(timeout_ms)
                return []
            # All this before the poll: what fails here loses no records. The consumer's own positions also pass transaction markers.
            if self._out_of_range:
                self._check_positions(self._first_offsets())
                self._assign(self._again or self._positions)
                self._out_of_range = False  # they are there (a new leader was behind for a moment), or were skipped
            if reads_again:
                return self._poll_again(timeout_ms)
            for tp in self._assigned:
                if (position := self._consumer.position(tp, timeout_ms=0)) is not None:
                    self._positions[tp] = position
            self._note_highs(self._assigned)
            if self._down_since_s is not None or self._clock_s() - self._asked_s >= ENDS_INTERVAL_S:
                self._refresh_ends()
            if self._held != self._paused:
                self._consumer.resume(*(self._paused - self._held))
                self._consumer.pause(*(self._held - self._paused))
                self._paused = self._held
            fetcher = self._consumer._fetcher
            if not fetcher._next_partition_records:  # an emptied one hides what waits of a partition that was held
                fetcher._next_partition_records = None
            batches = self._consumer.poll(timeout_ms=timeout_ms)
        except OffsetOutOfRangeError:
            self._out_of_range = True
            return []
        except (RetriableError, _NotThereError) as error:
            self._go_down(error, timeout_ms)
            return []
        except KafkaError as error:
            fix = "see the reason; nothing was skipped" + ("" if not isinstance(error, CorruptRecordError) else _PASS_BY)
            raise StreamError(f"the topics cannot be read: {error}", str(self._config.bootstrap_servers), fix) from error
        self._positions |= {tp: batch[-1].offset + 1 for tp, batch in batches.items()}
        return [record for batch in batches.values() for record in batch]

    def positions(self) -> dict[str, int]:
        """`topic/partition` -> offset of the next record that `poll` will return."""
        return self._stored | {_name(tp): offset for tp, offset in self._positions.items()}

    def at_end(self, topic: str, partition: int) -> bool:
        """Whether everything in the partition was returned, known from within the last 2 s; never while the broker is down.

        An open transaction hides what stands behind its first record: the last offset that can be read is then below the end.
        """
        tp = TopicPartition(topic, partition)
        if self._down_since_s is not None or self._clock_s() - self._ends_s > ENDS_VALID_S or tp not in self._positions:
            return False
        return (high := self._highs.get(tp)) is not None and self._positions[tp] >= max(high, self._ends[tp])

    def lag(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> records that wait, as of the last refresh (0.5 s)."""
        return {(tp.topic, tp.partition): max(0, end - self._positions.get(tp, 0)) for tp, end in self._ends.items()}

    def close(self) -> None:
        """Leave the broker. Nothing is committed to Kafka."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=1_000)
            self._consumer = None

    def _open(self) -> None:
        if not reachable(self._config, timeout_s=0.5):
            raise _NotThereError("the connection is refused")
        try:
            consumer = connect(
                KafkaConsumer,
                self._config,
                bootstrap_timeout_ms=5_000,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                max_poll_records=self._max_poll_records,
                fetch_max_wait_ms=100,
                metadata_max_age_ms=METADATA_MAX_AGE_MS,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        except BrokerError as error:
            self._check_refusal(error)
            raise _NotThereError(str(error)) from error
        consumer._fetcher.PartitionRecords = FetchedRecords
        self._consumer, self._give_up_s = consumer, math.inf
        try:
            self._check_topics()
            firsts = self._first_offsets()
            self._positions = {tp: self._stored.setdefault(_name(tp), firsts[tp]) for tp in self._assigned}
            self._check_positions(firsts)
        except BaseException:
            self.close()
            raise
        self._assign(self._again or self._positions)

    def _check_refusal(self, error: BrokerError) -> None:
        if isinstance(error, BrokerRefused):
            self._give_up_s = min(self._give_up_s, self._clock_s() + REFUSED_S)
            if self._clock_s() >= self._give_up_s:
                raise StreamError(
                    f"{error.what}, again and again for {REFUSED_S:.0f} s", error.where, "mend credentials or certificates"
                ) from error

    def _assign(self, positions: Mapping[Any, int]) -> None:
        self._consumer.assign(list(positions))
        self._paused = set()
        for tp, position in positions.items():
            self._consumer.seek(tp, position)

    def _poll_again(self, timeout_ms: int) -> list[Record]:
        if not self._again:  # all of it was skipped
            return []
        for tp in self._again:
            if (position := self._consumer.position(tp, timeout_ms=0)) is not None:
                self._again[tp] = position
        self._note_highs(self._again)
        if self._down_since_s is not None:
            self._refresh_ends()
        batches = self._consumer.poll(timeout_ms=timeout_ms)
        self._again |= {tp: batch[-1].offset + 1 for tp, batch in batches.items()}
        records = [record for tp, batch in batches.items() for record in batch if record.offset < self._positions[tp]]
        if any(position >= self._positions[tp] for tp, position in self._again.items()):
            self._again = {tp: position for tp, position in self._again.items() if position < self._positions[tp]}
            self._assign(self._again or self._positions)
        return records

    def _note_highs(self, partitions: Iterable[Any]) -> None:
        """Kept, because the consumer forgets them when it is assigned anew and the broker tells them only when they change."""
        for tp in partitions:
            if (high := self._consumer.highwater(tp)) is not None:
                self._highs[tp] = high

    def _check_again(self, firsts: Mapping[Any, int]) -> None:
        if self._config.on_gap == "skip":
            starts = {tp: max(start, firsts[tp]) for tp, start in self._again.items()}
            self._again = {tp: start for tp, start in starts.items() if start < self._positions[tp]}
        for tp, start in self._again.items():
            if start < firsts[tp]:
                raise StreamError(
                    f"the decisions from offset {start} on are needed again for lists without a row, the first that the broker has is "
                    f"{firsts[tp]}: retention deleted them, or the topic was made anew",
                    f"{tp.topic}[{tp.partition}]@{start}",
                    "raise the topic's retention above join.label_age_s + join.lateness_s + the longest pause; "
                    "to go on without these lists, set kafka.on_gap to skip",
                )

    def _first_offsets(self) -> dict[Any, int]:
        return self._ask(self._consumer.beginning_offsets, 5_000)

    def _ask(self, offsets: Callable[..., dict[Any, int]], timeout_ms: int) -> dict[Any, int]:
        try:
            return offsets(self._assigned, timeout_ms=timeout_ms)
        except KeyError as error:  # kafka-python 3.0.12: after a retry inside, some partitions may be left out
            raise _NotThereError(f"no offset of {error}") from error

    def _check_topics(self) -> None:
        for topic in self._topics:
            if not (found := self._consumer.partitions_for_topic(topic)):
                raise _NotThereError(f"topic {topic} does not exist (yet), or this user may not describe it")
            check_partitions(self._config, topic, len(found))
            if (topic_id := self._consumer._client.cluster.topic_id(topic)) is not None:  # a broker before 2.8 has none
                self._topic_ids[topic] = str(topic_id)

    def _check_positions(self, firsts: Mapping[Any, int]) -> None:
        """Every position must lie between the first and the end offset of its partition."""
        ends = self._ask(self._consumer.end_offsets, 5_000)
        for tp, position in self._positions.items():
            if position < firsts[tp] and self._config.on_gap == "skip":
                _logger.warning("skipped what retention deleted where=%s@%d to=%d", _name(tp), position, firsts[tp])
                self._skipped[tp.topic, tp.partition] += firsts[tp] - position
                self._positions[tp] = firsts[tp]
            elif not firsts[tp] <= position <= ends[tp]:
                what = "retention deleted records that were not read" if position < firsts[tp] else "the topic was made anew or cut"
                raise StreamError(
                    f"the stored position {position} is outside of what the broker has, {firsts[tp]} to {ends[tp]}: {what}",
                    f"{tp.topic}[{tp.partition}]@{position}",
                    "raise the topic's retention above the longest pause; to go on with a gap, set kafka.on_gap to skip"
                    if position < firsts[tp]
                    else "its events are other ones than those that were read: start with a new run.dir",
                )
        self._check_again(firsts)

    def _refresh_ends(self) -> None:
        self._asked_s = self._clock_s()
        self._ends = self._ask(self._consumer.end_offsets, ENDS_TIMEOUT_MS)
        self._ends_s = self._clock_s()
        self._check_topics()
        if self._down_since_s is not None:
            _logger.info("kafka up for reading down_s=%.1f", self.degraded_s)
        self._down_since_s, self._backoff_s = None, 0.1

    def _go_down(self, reason: object, timeout_ms: int) -> None:
        if self._down_since_s is None:
            self._down_since_s = self._clock_s()
            _logger.warning("kafka down for reading reason=%s", reason)
        self._pause(timeout_ms)

    def _pause(self, timeout_ms: int) -> None:
        time.sleep(min(timeout_ms / 1000, self._backoff_s))
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)


def _name(tp: Any) -> str:
    return f"{tp.topic}/{tp.partition}"


def partition_of(key: bytes, num_partitions: int) -> int:
    """The partition that Kafka's default partitioner (murmur2, as in Java and kafka-python) gives a key."""
    return int(murmur2(key) & 0x7FFFFFFF) % num_partitions


@lru_cache(maxsize=65_536)
def place_of(session_id: str, num_partitions: int) -> tuple[bytes, int]:
    """Key and partition of a session's records."""
    key = session_id.encode()
    return key, partition_of(key, num_partitions)
