"""Dead letters read back: which records were refused and why, and sending them again.

Delivery: a letter goes back to its topic once, however often this runs and whatever crashes. The record and a mark in the dead-letter
topic are one Kafka transaction; who redrives reads the marks first and leaves out letters that have one. Every redrive has the same
transactional id, so a new one ends what an older one has left open and fences it. A record that was refused and then read after all
(its worker died before the commit, and was started again with another configuration) is in the topic twice: the join drops the second
by its event id, or counts it late.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError, ProducerFencedError
from kafka.future import Future

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, StreamError
from streaming.broker import DEAD_LETTER_SUFFIX, MAX_LETTER_BYTES
from streaming.client import abandon, connect
from streaming.deadletter import TRUNCATED
from streaming.records import ATTEMPTS
from streaming.wire import JSON, MAX_EVENT_BYTES

_logger = logging.getLogger(__name__)

SILENCE_S, TRANSACTION_RECORDS, TRANSACTION_TIMEOUT_MS = 60.0, 500, 30_000
REDRIVEN = "redriven"


class Letter(NamedTuple):
    """A dead letter: the refused record, where it stood, and why it was refused; or the mark that it was sent again."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int  # with the place, what tells a letter from one of a topic made anew
    code: str
    error: str
    key: bytes | None
    value: bytes | None
    content_type: bytes
    attempts: int  # how often it had been sent again before it was refused
    is_mark: bool
    is_truncated: bool

    @property
    def can_be_sent(self) -> bool:
        """Its bytes are whole, and could be an event: not of one too large for any, nor a record without key and value."""
        return not self.is_truncated and len(self.value or b"") <= MAX_EVENT_BYTES and (self.key, self.value) != (None, None)

    @property
    def place(self) -> tuple[str, int, int, int]:
        """What is the same for a letter, its repetitions and its mark."""
        return self.topic, self.partition, self.offset, self.timestamp_ms


def read_letters(config: KafkaConfig, topic: str) -> Iterator[Letter]:
    """All letters of a topic up to the present end, with repetitions and marks, in the order of the dead-letter topic.

    Args:
        config: Broker and credentials.
        topic: The one that the records were refused from.

    Raises:
        BrokerError: no broker answers, or it stops answering.
        StreamError: the topic has no dead-letter topic.
    """
    name = topic + DEAD_LETTER_SUFFIX
    consumer = connect(
        KafkaConsumer,
        config,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        allow_auto_create_topics=False,
        metrics_enabled=False,
    )
    try:
        if not (found := consumer.partitions_for_topic(name)):
            raise StreamError("there is no dead-letter topic", name, "it is created when the first worker starts; check kafka.*_topic")
        partitions = [TopicPartition(name, p) for p in sorted(found)]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends, heard_s = consumer.end_offsets(partitions), time.monotonic()
        while any(consumer.position(tp) < end for tp, end in ends.items()):
            batches = consumer.poll(timeout_ms=500)
            for tp, batch in batches.items():
                for raw in batch:
                    if raw.offset < ends[tp]:
                        try:
                            yield _letter(raw.key, raw.value, dict(raw.headers))
                        except (AttributeError, ValueError) as error:
                            _logger.warning("not a dead letter where=%s[%d]@%d reason=%s", name, tp.partition, raw.offset, error)
            if batches:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > SILENCE_S:
                raise BrokerError(f"nothing came for {SILENCE_S:.0f} s before the end of the topic", name, "see the broker's log")
    except KafkaError as error:
        raise BrokerError(f"dead letters cannot be read: {error}", name) from error
    finally:
        consumer.close(autocommit=False)


def _letter(key: bytes, value: bytes | None, headers: dict[str, bytes]) -> Letter:
    topic, partition, offset = key.decode().rsplit("/", 2)
    return Letter(
        topic=topic,
        partition=int(partition),
        offset=int(offset),
        timestamp_ms=int(headers.get("timestamp", b"-1")),
        code=headers.get("code", b"").decode(),
        error=headers.get("error", b"").decode(errors="replace"),
        key=headers.get("key"),
        value=value,
        content_type=headers.get("content-type", JSON),
        attempts=int(headers.get(ATTEMPTS, b"0")),
        is_mark=REDRIVEN in headers,
        is_truncated=TRUNCATED in headers,
    )


class Redriver:
    """Sends letters of one topic back to it. Only one at a time can: a second one fences the first.

    Args:
        config: Broker and credentials.
        topic: The one that the records were refused from.

    Raises:
        BrokerError: no broker answers, or it refuses transactions.
    """

    def __init__(self, config: KafkaConfig, topic: str) -> None:
        self._config, self._topic = config, topic
        self._producer: KafkaProducer = connect(
            KafkaProducer,
            config,
            transactional_id=f"esrl-redrive-{topic}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            acks="all",
            compression_type="lz4",
            max_request_size=MAX_LETTER_BYTES,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        try:
            self._producer.init_transactions()
        except KafkaError as error:
            self.close()
            raise BrokerError(
                f"no transaction can be begun: {error}", topic, "allow this user the transactional id esrl-redrive-*"
            ) from error

    def run(self, selected: Callable[[Letter], bool], *, limit: int | None = None) -> int:
        """Send letters back that were not sent back before, and can be.

        Args:
            selected: Whether to take a letter.
            limit: How many, at most.

        Returns:
            Number of records sent.

        Raises:
            BrokerError: the broker failed; what was committed stays, run it again for the rest.
            StreamError: another redrive of this topic began.
        """
        done = {letter.place for letter in read_letters(self._config, self._topic) if letter.is_mark}
        batch: list[Letter] = []
        num_sent = 0
        for letter in read_letters(self._config, self._topic):
            if num_sent + len(batch) == limit:
                break
            if letter.is_mark or letter.place in done or not letter.can_be_sent or not selected(letter):
                continue
            done.add(letter.place)
            batch.append(letter)
            if len(batch) == TRANSACTION_RECORDS:
                num_sent += self._send(batch)
                batch = []
        return num_sent + (self._send(batch) if batch else 0)

    def close(self) -> None:
        """Let go of the broker; a transaction that is open is aborted by the next redrive, or after its time."""
        abandon(self._producer)

    def _send(self, batch: list[Letter]) -> int:
        try:
            self._producer.begin_transaction()
            futures = [future for letter in batch for future in (self._again(letter), self._mark(letter))]
            self._producer.flush()
            for future in futures:
                future.get(timeout=0.0)  # raises what went wrong
            self._producer.commit_transaction()
        except ProducerFencedError as error:
            raise StreamError("another redrive of this topic began", self._topic, "let it end, then look what is left") from error
        except KafkaError as error:
            raise BrokerError(f"{len(batch)} letters were not sent: {error}", self._topic, "run it again: none is sent twice") from error
        return len(batch)

    def _again(self, letter: Letter) -> Future:
        """By its key, so that a record that stood in the wrong partition comes to the right one."""
        headers = [("content-type", letter.content_type), (ATTEMPTS, b"%d" % (letter.attempts + 1))]
        partition = letter.partition if letter.key is None else None
        return self._producer.send(letter.topic, key=letter.key, value=letter.value, headers=headers, partition=partition)

    def _mark(self, letter: Letter) -> Future:
        key = f"{letter.topic}/{letter.partition}/{letter.offset}".encode()
        headers = [(REDRIVEN, b"%d" % (letter.attempts + 1)), ("timestamp", b"%d" % letter.timestamp_ms)]
        return self._producer.send(letter.topic + DEAD_LETTER_SUFFIX, key=key, headers=headers)
