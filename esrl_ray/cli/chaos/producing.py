"""Sends a load at a pace, phase by phase: each record once, each partition in order, through any crash of the broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kafka import KafkaProducer

from esrl_ray.cli.chaos.load import Load, Planned
from esrl_ray.cli.chaos.reference import Ends
from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError
from streaming.client import connect
from streaming.session_state import DECISIONS

TICK_S = 0.05
SLOW, LAST_S = 0.3, 60.0
"""What is not released yet is sent at three tenths of the pace at most, and ever slower, so that it lasts: a fault that waits for a
point of the commit sequence needs commits, however slow the machine is."""


class Producing:
    """The load on its way.

    Args:
        config: Broker and topics.
        load: What to send.
        seconds: How long it should take.
        barrier: Called with the end offsets after each phase; returns when every worker has committed up to there.
    """

    def __init__(self, config: KafkaConfig, load: Load, *, seconds: float, barrier: Callable[[Ends], None]) -> None:
        self._config, self._load, self._barrier = config, load, barrier
        self._pace = sum(map(len, load.phases)) / seconds
        self._producer = connect(
            KafkaProducer,
            config,
            acks="all",
            enable_idempotence=True,
            compression_type="lz4",
            linger_ms=10,
            batch_size=131_072,
            request_timeout_ms=5_000,
            delivery_timeout_ms=300_000,
            max_block_ms=300_000,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        self._failed: list[Exception] = []
        self._ends: dict[tuple[str, int], int] = {}
        self.barriers: list[Ends] = []
        self.released = 1.0  # share of the load that may go at full pace
        self.done = threading.Event()
        self._error: Exception | None = None

    def send_before(self) -> None:
        """What must be there before anything reads."""
        self._send(self._load.before)
        self._settle()

    def start(self) -> None:
        """Send the phases; `done` is set at the end, `check` tells how it went."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let go of the broker."""
        self._producer.close(timeout=5.0)

    def _run(self) -> None:
        try:
            total, sent, credit, last = sum(map(len, self._load.phases)), 0, 0.0, time.monotonic()
            for phase in self._load.phases:
                at = 0
                while at < len(phase):
                    time.sleep(TICK_S)
                    now = time.monotonic()
                    slow = sent >= self.released * total
                    credit += min(now - last, 1.0) * (min(SLOW * self._pace, (total - sent) / LAST_S) if slow else self._pace)
                    last = now
                    chunk = phase[at : at + int(credit)]
                    self._send(chunk)
                    at, sent, credit = at + len(chunk), sent + len(chunk), credit - len(chunk)
                self._settle()
                self.barriers.append(dict(self._ends))
                self._barrier(self.barriers[-1])
                last = time.monotonic()
        except Exception as error:
            self._error = error
        finally:
            self.done.set()

    def _send(self, records: Sequence[Planned]) -> None:
        for planned in records:
            topic = self._config.decisions_topic if planned.topic == DECISIONS else self._config.feedback_topic
            headers = [("content-type", planned.content_type)]
            future = self._producer.send(topic, value=planned.value, key=planned.key, partition=planned.partition, headers=headers)
            future.add_callback(self._acknowledged)
            future.add_errback(self._failed.append)

    def _acknowledged(self, metadata: Any) -> None:
        where = metadata.topic, metadata.partition
        self._ends[where] = max(self._ends.get(where, 0), metadata.offset + 1)

    def _settle(self) -> None:
        self._producer.flush(timeout=300.0)
        if self._failed:
            raise BrokerError(f"{len(self._failed)} records were not acknowledged, the first: {self._failed[0]}", "load")
