"""Events to Kafka without ever making the caller wait: queue, idempotent producer, and a spool on disk while the broker is down.

Delivery: at least once from `send` on, in order of `send`. An event is in memory until Kafka acknowledges it or, once the broker is known
to be down, until it is in the spool; only a kill of the process loses what is in memory (about `linger_ms`, or `STALL_S` when the broker
has just gone). A failure after which nobody knows whether the broker has the event doubles it: the join drops repeats by event id.
While anything waits in the spool, new events queue behind it: newer events would move the watermark past older ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from kafka import KafkaProducer
from kafka.errors import InvalidTimestampError, KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError
from streaming.client import abandon, client_settings, connect, reachable
from streaming.spool import Outgoing, Spool
from streaming.wire import MAX_EVENT_BYTES, MSGPACK, Decision, Feedback, encode

__all__ = ["EventProducer", "client_settings"]

_logger = logging.getLogger(__name__)

HEADERS = [("content-type", MSGPACK)]
POISON = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidTimestampError)  # sending these again would fail again
MAX_QUEUED_BYTES = 256 * 2**20
MAX_SENT = 50_000  # records handed to kafka-python, whose own buffer has no limit
STALL_S = 1.0  # an acknowledgement this late makes us ask whether the broker is there at all
RETRY_S, MAX_RETRY_S, TICK_S = 0.2, 3.0, 0.02

Sent = tuple[Outgoing, Any, float]
"""(record, kafka-python's future, when it was sent)."""


class EventProducer:
    """Sends events from any thread; one background thread talks to Kafka.

    Args:
        config: Broker and topics.
        client_id: Name in the broker's logs, and owner of the spool.
        spool: Folder of the spools; None keeps what waits in memory only (at most 256 MiB).
        clock_s: Monotonic clock.
    """

    def __init__(self, config: KafkaConfig, *, client_id: str, spool: Path | None, clock_s: Callable[[], float] = time.monotonic) -> None:
        client_settings(config)  # a missing address is an error here, not in the thread
        self._config, self._client_id, self._clock_s = config, client_id, clock_s
        self.acked: Counter[str] = Counter()  # by topic
        self.spooled = 0  # written to disk because Kafka was down; acknowledged later
        self.failed = 0  # lost: too large, or no room left in memory and on disk
        self._changed = threading.Condition()  # guards the next three
        self._queue: list[Outgoing] = []
        self._queued_bytes = 0  # of queue and backlog
        self._closing_at_s: float | None = None
        # The rest belongs to the thread. An event goes queue -> backlog -> sent -> acknowledged, or backlog -> spool -> sent.
        self._backlog: deque[Outgoing] = deque()
        self._sent: deque[Sent] = deque()
        self._spool = Spool(spool, client_id, clock_s=clock_s) if spool is not None else None
        self._resending: Counter[str] | None = None  # what is sent is the oldest segment of the spool; its acknowledgements
        self._producer: KafkaProducer | None = None
        self._retry_s, self._retry_at_s, self._ask_at_s = RETRY_S, clock_s(), clock_s()
        self._down_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"producer-{client_id}", daemon=True)
        self._thread.start()

    @property
    def degraded_s(self) -> float:
        """For how long the broker has been down; 0 when it is not."""
        since = self._down_since_s
        return 0.0 if since is None else self._clock_s() - since

    def send(self, event: Decision | Feedback) -> None:
        """Queue one event; takes microseconds whatever Kafka does. Its key is the session id."""
        topic = self._config.decisions_topic if isinstance(event, Decision) else self._config.feedback_topic
        record = Outgoing(topic, event.session_id.encode(), encode(event))
        with self._changed:
            if self._closing_at_s is not None or self._queued_bytes + len(record.value) > MAX_QUEUED_BYTES:
                self.failed += 1
                return
            self._queue.append(record)
            self._queued_bytes += len(record.value)
            if len(self._queue) == 1:
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until Kafka has acknowledged everything, the spool included; False when it had not in time."""
        with self._changed:
            return self._changed.wait_for(self._idle, timeout_s)

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Flush, then put what is left into the spool, where the next producer with a spool in this folder finds it."""
        with self._changed:
            if self._closing_at_s is None:
                self._closing_at_s = self._clock_s() + timeout_s
            self._changed.notify_all()
        self._thread.join()

    def _idle(self) -> bool:
        return not (self._queue or self._backlog or self._sent) and (self._spool is None or self._spool.empty)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._settle()
                if self._producer is None and not self._connect():
                    self._spool_backlog()
                elif self._spool is not None and not self._spool.empty:
                    self._spool_backlog()
                    self._resend()
                else:
                    self._send_backlog()
        finally:
            self._end()

    def _send_backlog(self) -> None:
        handed = []
        while self._backlog and len(self._sent) < MAX_SENT and self._hand_over(self._backlog[0]):
            handed.append(self._backlog.popleft())
        self._count(handed, -1)

    def _wait_for_work(self) -> bool:
        """Take the queue into the backlog; False when it is time to end."""
        with self._changed:
            if self._idle():
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closing_at_s is not None, 1.0)
            elif not self._queue:
                self._changed.wait(TICK_S)
            self._backlog.extend(self._queue)
            self._queue.clear()
            return self._closing_at_s is None or not (self._idle() or self._clock_s() >= self._closing_at_s)

    def _count(self, records: Sequence[Outgoing], sign: Literal[1, -1]) -> None:
        with self._changed:
            self._queued_bytes += sign * sum(len(record.value) for record in records)

    def _connect(self) -> bool:
        if self._clock_s() < self._retry_at_s:
            return False
        try:
            if not reachable(self._config, timeout_s=0.5):
                raise BrokerError("the connection is refused", str(self._config.bootstrap_servers))
            self._producer = connect(
                KafkaProducer,
                self._config,
                client_id=self._client_id,
                bootstrap_timeout_ms=3_000,
                max_block_ms=2_000,  # only for topics that are not known yet
                acks="all",
                enable_idempotence=True,
                compression_type="lz4",
                linger_ms=10,
                batch_size=131_072,
                max_request_size=MAX_EVENT_BYTES,
                request_timeout_ms=8_000,
                delivery_timeout_ms=10_000,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        except BrokerError as error:
            self._go_down(error)
            return False
        return True

    def _go_down(self, error: Exception) -> None:
        """Give up this connection; what is not acknowledged goes back to the front, to the spool, and is sent again later."""
        if self._down_since_s is None:
            self._down_since_s = self._clock_s()
            _logger.warning("kafka down client=%s reason=%s", self._client_id, error)
        self._retry_at_s = self._clock_s() + self._retry_s
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
        if self._producer is not None:
            abandon(self._producer)
            self._producer = None
        if self._resending is None:
            unsure = [record for record, future, _ in self._sent if not self._is_settled(record, future)]
            self._backlog.extendleft(reversed(unsure))
            self._count(unsure, 1)
        self._resending = None  # those are still in the spool
        self._sent.clear()
        self._spool_backlog()

    def _spool_backlog(self) -> None:
        if self._spool is None or not self._backlog:
            return
        records, taken = list(self._backlog), 0
        self._backlog.clear()
        self._count(records, -1)
        try:
            taken = self._spool.append(records)
        except OSError as error:
            _logger.error("spool cannot be written client=%s reason=%s", self._client_id, error)
        self.spooled += taken
        if lost := len(records) - taken:
            self.failed += lost
            _logger.error("events lost, no room in the spool client=%s lost=%d", self._client_id, lost)

    def _resend(self) -> None:
        assert self._spool is not None
        if self._resending is None:
            self._resending = Counter()
            for record in self._spool.oldest():
                if not self._hand_over(record):
                    return
        elif not self._sent:
            self.acked += self._resending
            self._resending = None
            self._spool.drop()

    def _hand_over(self, record: Outgoing) -> bool:
        assert self._producer is not None
        try:
            future = self._producer.send(record.topic, value=record.value, key=record.key, headers=HEADERS)
        except POISON as error:
            self._lose(record, error)
        except KafkaError as error:
            self._go_down(error)
            return False
        else:
            self._sent.append((record, future, self._clock_s()))
        return True

    def _lose(self, record: Outgoing, error: Exception) -> None:
        self.failed += 1
        _logger.error(
            "event refused client=%s topic=%s key=%r bytes=%d reason=%s",
            self._client_id,
            record.topic,
            record.key,
            len(record.value),
            error,
        )

    def _is_settled(self, record: Outgoing, future: Any) -> bool:
        """Count an event that is acknowledged or will never be; False when it must be sent (again)."""
        if future.is_done and future.succeeded():
            if self._down_since_s is not None and self._producer is not None:
                _logger.info("kafka up client=%s down_s=%.1f", self._client_id, self.degraded_s)
                self._down_since_s, self._retry_s = None, RETRY_S
            (self.acked if self._resending is None else self._resending)[record.topic] += 1
            return True
        if future.is_done and isinstance(future.exception, POISON):
            self._lose(record, future.exception)
            return True
        return False

    def _settle(self) -> None:
        while self._sent:
            record, future, sent_s = self._sent[0]
            if self._is_settled(record, future):
                self._sent.popleft()
                continue
            now = self._clock_s()
            if future.is_done:
                self._go_down(future.exception)
            elif now - sent_s > STALL_S and now >= self._ask_at_s:
                self._ask_at_s = now + STALL_S / 2
                if not reachable(self._config, timeout_s=0.5):
                    self._go_down(BrokerError("the connection is refused", str(self._config.bootstrap_servers)))
            return

    def _end(self) -> None:
        with self._changed:
            self._closing_at_s = self._clock_s()  # also when the thread ends by an error: `send` then counts what it loses
            self._backlog.extend(self._queue)
            self._queue.clear()
        self._settle()
        if self._sent and self._producer is not None:
            self._go_down(BrokerError("closed before everything was acknowledged"))
        if self._producer is not None:
            abandon(self._producer)
        self._spool_backlog()
        if self._backlog:
            self.failed += len(self._backlog)
            _logger.error("events lost, closed while kafka is down client=%s lost=%d", self._client_id, len(self._backlog))
        if self._spool is not None:
            self._spool.close()
