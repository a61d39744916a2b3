"""Records that are no valid events, kept as they came in `<topic>.dlq`, and events that came too late, in `<topic>.late`.

Delivery: at least once, acknowledged before the commit that skips them. A worker that dies between `flush` and its commit sends them
again: a dead letter with the same key `topic/partition/offset`, a late event with the same event id. What is too large for its topic is
cut and says so in its headers, or it would hold up its partition for good: another codec, and headers, make a record that its own topic
took too large for ours.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, StreamError, WireError
from esrl_ray.vocabulary import Bucket
from streaming.broker import DEAD_LETTER_SUFFIX, LATE_SUFFIX, MAX_LETTER_BYTES
from streaming.client import REFUSALS, REFUSED_S, abandon, connect, reachable
from streaming.records import ATTEMPTS, Record
from streaming.wire import MSGPACK, Event, encode

_logger = logging.getLogger(__name__)

WINDOW = 1_000  # records over which the share is taken
MIN_REFUSED = 20  # fewer in a window never stop the worker: a quiet topic's first record may be a bad one
FLUSH_TIMEOUT_S, RETRY_S = 300.0, 1.0
MAX_REASON_BYTES = 1_000
CUT_BYTES = 2**16  # of a value that is too large: what any topic takes
WAITING_BYTES = 32 * 2**20  # then they do not wait for the commit: a thousand of the largest would come out of a megabyte that was packed
TRUNCATED = "truncated"
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


class RefusedShare:
    """The share of refused records among the last ones, and its limit.

    Args:
        max_share: `kafka.max_dead_letter_share`.
        window: Records over which it is taken.
    """

    def __init__(self, max_share: float, window: int = WINDOW) -> None:
        self._max_share, self._size = max_share, window
        self._window: deque[bool] = deque(maxlen=window)

    def passed(self, num_records: int) -> None:
        """Count records that were fine."""
        self._window.extend([False] * min(num_records, self._size))

    def refused(self, where: str, error: WireError) -> None:
        """Count one that was not.

        Raises:
            StreamError: they are too many.
        """
        self._window.append(True)
        refused = sum(self._window)
        if refused > max(MIN_REFUSED, self._max_share * self._size):
            raise StreamError(
                f"{refused} of the last {len(self._window)} records were refused, more than kafka.max_dead_letter_share "
                f"{self._max_share} of {self._size}; the last one: {error}",
                where,
                "find out who writes them (wrong topic, schema_version or spec?); nothing was committed past them",
            )


class DeadLetters:
    """Refused records and late events on their way to their topics; connects at the first one.

    Args:
        config: Broker, topics, `max_dead_letter_share`.
        flush_timeout_s: How long `flush` tries; a broker that refuses us is asked for `REFUSED_S` only.
        clock_s: Monotonic clock.
    """

    def __init__(
        self, config: KafkaConfig, *, flush_timeout_s: float = FLUSH_TIMEOUT_S, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._flush_timeout_s, self._clock_s = config, flush_timeout_s, clock_s
        self._producer: KafkaProducer | None = None
        self._waiting: list[dict[str, Any]] = []
        self._waiting_bytes = 0
        self._share = RefusedShare(config.max_dead_letter_share)
        self.sent = 0  # acknowledged

    def passed(self, num_records: int) -> None:
        """Count records that were fine; the share of refused ones is taken over the last 1,000 records."""
        self._share.passed(num_records)

    def send(self, record: Record, error: WireError) -> None:
        """Take one refused record; it is in Kafka after `flush`.

        Raises:
            BrokerError: many wait, and Kafka does not take them.
            StreamError: more than `kafka.max_dead_letter_share` of 1,000 records were refused: a schema mistake must not drain a topic.
        """
        where = f"{record.topic}/{record.partition}/{record.offset}"
        headers = [
            ("error", str(error).encode()[:MAX_REASON_BYTES]),
            ("code", error.code.encode()),
            *_origin(record),
            *([] if record.key is None else [("key", record.key)]),
        ]
        self._take(record.topic + DEAD_LETTER_SUFFIX, where.encode(), record.value, headers)
        self._share.refused(f"{record.topic}[{record.partition}]@{record.offset}", error)

    def late(self, topic: str, late: Record | Event) -> None:
        """Take one event that was counted late, with the key of its session; it is in Kafka after `flush`.

        Args:
            topic: That it came from.
            late: Its record, whose bytes are kept; or the event, when that is gone: in our own encoding, and where it stood is not said.
        """
        if isinstance(late, Record):
            key, value, origin = late.key, late.value, _origin(late)
        else:
            key, value, origin = late.session_id.encode(), encode(late), [("topic", topic.encode()), ("content-type", MSGPACK)]
        self._take(topic + LATE_SUFFIX, key, value, [("code", Bucket.LATE.encode()), *origin])

    def flush(self) -> None:
        """Wait until Kafka has acknowledged every record taken; call it before the commit that skips them.

        Raises:
            BrokerError: it did not within the time; do not commit.
        """
        began_s = self._clock_s()
        deadline_s = began_s + self._flush_timeout_s
        while self._waiting:
            try:
                self._send_waiting()
            except (KafkaError, BrokerError) as error:
                if self._producer is not None:
                    abandon(self._producer)
                    self._producer = None
                now_s = self._clock_s()
                if isinstance(error, REFUSALS):
                    deadline_s = min(deadline_s, now_s + REFUSED_S)
                if now_s >= deadline_s:
                    raise BrokerError(
                        f"{len(self._waiting)} dead letters or late events were not acknowledged in {now_s - began_s:.0f} s: {error}",
                        str(self._waiting[0]["topic"]),
                        "start the broker; create this topic, and allow this user to write it, if neither is done for you",
                    ) from error
                _logger.warning("dead letters or late events wait waiting=%d reason=%s", len(self._waiting), error)
                time.sleep(RETRY_S)
        self._waiting_bytes = 0

    def close(self) -> None:
        """Let go of the broker; what was not flushed is read and refused again by the next worker."""
        if self._producer is not None:
            abandon(self._producer)
            self._producer = None

    def _take(self, topic: str, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
        letter = {"topic": topic, "key": key, "value": value, "headers": headers}
        self._waiting.append(letter if _bytes_of(letter) <= MAX_LETTER_BYTES - CUT_BYTES else _cut(letter))
        self._waiting_bytes += _bytes_of(self._waiting[-1])
        if self._waiting_bytes > WAITING_BYTES:
            self.flush()

    def _send_waiting(self) -> None:
        if self._producer is None:
            if not reachable(self._config):
                raise BrokerError("the connection is refused", str(self._config.bootstrap_servers))
            self._producer = connect(
                KafkaProducer,
                self._config,
                bootstrap_timeout_ms=5_000,
                max_block_ms=5_000,
                acks="all",
                compression_type="lz4",
                max_request_size=MAX_LETTER_BYTES,
                request_timeout_ms=8_000,
                delivery_timeout_ms=10_000,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        sent = [(letter, self._producer.send(**letter)) for letter in self._waiting]
        self._producer.flush(timeout=15.0)
        left, problem = list[dict[str, Any]](), None
        for letter, future in sent:
            try:
                future.get(timeout=0.0)  # raises what went wrong
            except _TOO_LARGE as error:
                problem = problem if TRUNCATED not in dict(letter["headers"]) else error
                left.append(_cut(letter))
            except KafkaError as error:
                problem = error
                left.append(letter)
        self.sent += len(sent) - len(left)
        self._waiting = left
        if problem is not None:
            raise problem


def _bytes_of(letter: dict[str, Any]) -> int:
    return len(letter["value"] or b"") + sum(len(told) for _, told in letter["headers"])


def _cut(letter: dict[str, Any]) -> dict[str, Any]:
    """The beginning of a letter, with the place whole, and how many bytes the value had."""
    value, headers = letter["value"] or b"", [(name, told[:MAX_REASON_BYTES]) for name, told in letter["headers"]]
    if TRUNCATED not in dict(headers):
        _logger.warning("too large, cut topic=%s key=%r bytes=%d", letter["topic"], letter["key"], len(value))
        headers += [(TRUNCATED, b"1"), ("bytes", str(len(value)).encode())]
    return {**letter, "value": value[:CUT_BYTES], "headers": headers}


def _origin(record: Record) -> list[tuple[str, bytes]]:
    """Headers that say where a record stood and how to read it."""
    return [
        ("topic", record.topic.encode()),
        ("partition", str(record.partition).encode()),
        ("offset", str(record.offset).encode()),
        ("timestamp", str(record.timestamp_ms).encode()),
        ("content-type", record.content_type),
        *([(ATTEMPTS, str(record.attempts).encode())] if record.attempts else []),
    ]
