"""How every part of the project talks to Kafka: settings, bounded connects, errors with the broker's own reason.

Facts of kafka-python 3.0.12 that this file exists for:
- A consumer or admin client whose constructor fails leaves its I/O thread and sockets behind: `connect` closes them.
- The constructor's error says only "Unable to bootstrap". Why (refused, wrong password, TLS) goes to its log: `connect` tells it.
- `KafkaProducer.close(timeout=0)` raises when records are waiting, and stays open: `abandon` ends it without waiting.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import socket
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.net.compat import KafkaNetClient

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError

_logger = logging.getLogger(__name__)

BOOTSTRAP_TIMEOUT_MS, REQUEST_TIMEOUT_MS = 10_000, 15_000


def client_settings(config: KafkaConfig) -> dict[str, Any]:
    """Settings that kafka-python's clients share: where, how long to try, and as whom.

    Raises:
        BrokerError: no broker is named.
    """
    if not config.bootstrap_servers:
        raise BrokerError("no Kafka broker is named", "kafka.bootstrap_servers", "set it to host:port,... of your cluster")
    _warn_without_crc32c()
    settings: dict[str, Any] = {
        "bootstrap_servers": config.bootstrap_servers.split(","),
        "bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "reconnect_backoff_max_ms": 2_000,
        "security_protocol": config.security_protocol,
    }
    if config.sasl_mechanism:
        settings["sasl_mechanism"] = config.sasl_mechanism
        settings["sasl_plain_username"] = config.sasl_username
        settings["sasl_plain_password"] = config.sasl_password.get_secret_value() if config.sasl_password else None
    return settings


@functools.cache
def _warn_without_crc32c() -> None:
    if importlib.util.find_spec("crc32c") is None:
        _logger.warning("the C package crc32c is missing, checksums in Python are 7 to 23 times slower: pip install crc32c")


class _LastProblem(logging.Handler):
    """Keeps what kafka-python said last at level ERROR; a reason of SASL or TLS stays, what follows is only "disconnected"."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(word in self.text for word in ("Sasl", "SSL")) and "Bootstrap failed" not in (text := record.getMessage()):
            self.text = text


def connect(kind: type, config: KafkaConfig, **settings: Any) -> Any:
    """Construct a kafka-python client and wait, bounded, until it knows the cluster.

    Args:
        kind: `KafkaConsumer`, `KafkaProducer` or `KafkaAdminClient`.
        config: Broker and credentials.
        settings: The client's own settings; they win over `client_settings`.

    Raises:
        BrokerError: no broker answers in time, or it refuses us; the text has the reason.
    """
    clients: list[KafkaNetClient] = []

    def make_client(**options: Any) -> KafkaNetClient:
        clients.append(KafkaNetClient(**options))
        return clients[-1]

    kafka_logger, problem = logging.getLogger("kafka"), _LastProblem()
    kafka_logger.addHandler(problem)
    try:
        return kind(**{**client_settings(config), **settings, "kafka_client": make_client})
    except KafkaError as error:
        for client in clients:
            client.close()
        raise BrokerError(
            f"Kafka does not answer: {problem.text or error}",
            f"{config.security_protocol} {config.bootstrap_servers}",
            "start the broker, or check address and credentials",
        ) from error
    finally:
        kafka_logger.removeHandler(problem)


def reachable(config: KafkaConfig, *, timeout_s: float = 1.0) -> bool:
    """Whether any bootstrap server accepts a TCP connection: a cheap question before an expensive one."""
    for server in (config.bootstrap_servers or "").split(","):
        host, _, port = server.strip().rpartition(":") if ":" in server else (server.strip(), "", "9092")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
            return True
        except (OSError, ValueError):
            continue
    return False


def abandon(producer: KafkaProducer) -> None:
    """End a producer at once; records that are not acknowledged yet may or may not arrive."""
    producer._unregister_cleanup()
    producer._sender.initiate_close()
    producer._sender.force_close()
    producer._sender.join(5.0)
    producer._closed = True  # or its __del__ would flush, wait and raise
