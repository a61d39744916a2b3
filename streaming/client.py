"""How every part of the project talks to Kafka: settings, bounded connects, errors with the broker's own reason.

Facts of kafka-python 3.0.12 that this file exists for:
- A consumer or admin client whose constructor fails leaves its I/O thread and sockets behind: `connect` closes them.
- The constructor's error says only "Unable to bootstrap". Why (refused, wrong password, TLS) goes to its log: `connect` tells it.
- It drops what it received just before the other side hung up, a refusal with its reason: `_Manager` reads that first.
- At level DEBUG it logs its settings and what it sends, the password with them: `_hide_passwords`.
- `KafkaProducer.close(timeout=0)` raises when records are waiting, and stays open: `abandon` ends it without waiting.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import socket
import ssl
from typing import Any

from kafka import KafkaProducer
from kafka.errors import AuthorizationError, KafkaError, SaslAuthenticationFailedError
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, BrokerRefused

_logger = logging.getLogger(__name__)

BOOTSTRAP_TIMEOUT_MS, REQUEST_TIMEOUT_MS = 10_000, 15_000
REFUSED_S = 60.0
"""So long ingestion asks again after a refusal: a broker that starts, or whose users are being changed, may refuse for a moment."""

REFUSALS = (BrokerRefused, AuthorizationError, SaslAuthenticationFailedError)
"""Errors of a broker that answers, and says no."""


def client_settings(config: KafkaConfig) -> dict[str, Any]:
    """Settings that kafka-python's clients share: where, how long to try, and as whom.

    Raises:
        BrokerError: no broker or no password is named, or a certificate or key cannot be used.
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
        _hide_passwords()
        if config.sasl_password is None:
            raise BrokerError("no password is set", "kafka.sasl_password", "set ESRL_KAFKA_PASSWORD or ESRL_KAFKA_PASSWORD_FILE")
        settings["sasl_mechanism"] = config.sasl_mechanism
        settings["sasl_plain_username"] = config.sasl_username
        settings["sasl_plain_password"] = config.sasl_password.get_secret_value()
    if config.security_protocol.endswith("SSL"):
        settings["ssl_context"] = _tls(config)
    return settings


def _tls(config: KafkaConfig) -> ssl.SSLContext:
    """TLS 1.2 or newer to a broker whose authority we trust; made here, because kafka-python names no file that does not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = config.ssl_check_hostname
    password = config.ssl_key_password.get_secret_value() if config.ssl_key_password else ""  # None would ask the terminal
    try:
        name, where = "kafka.ssl_cafile", config.ssl_cafile
        if config.ssl_cafile is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(config.ssl_cafile)
        if config.ssl_certfile is not None:
            name, where = "kafka.ssl_certfile, kafka.ssl_keyfile", f"{config.ssl_certfile}, {config.ssl_keyfile or 'the same file'}"
            context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password)
    except OSError as error:  # ssl.SSLError is one
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        fix = "name readable PEM files; a locked key needs ESRL_KAFKA_KEY_PASSWORD"
        raise BrokerError(f"{name} cannot be used: {reason or error}", str(where), fix) from error
    return context


@functools.cache
def _warn_without_crc32c() -> None:
    if importlib.util.find_spec("crc32c") is None:
        _logger.warning("the C package crc32c is missing, checksums in Python are 7 to 23 times slower: pip install crc32c")


@functools.cache
def _hide_passwords() -> None:
    for name in ("kafka.protocol.parser", "kafka.net.connection", "kafka.admin.client"):
        logging.getLogger(name).addFilter(lambda record: record.levelno > logging.DEBUG)


class _LastProblem(logging.Handler):
    """Keeps what kafka-python said last at level ERROR; a reason of SASL or TLS stays, what follows is only "disconnected"."""

    REASONS = ("Sasl", "[SSL", "Handshake failed")
    REFUSALS = ("SaslAuthenticationFailed", "UnsupportedSaslMechanism", "CERTIFICATE", "UNKNOWN_CA")

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().rpartition(">: ")[2] + (f": {record.exc_info[1]}" if record.exc_info else "")
        if not any(reason in self.text for reason in self.REASONS) and "Bootstrap failed" not in text:
            self.text = text

    @property
    def is_refusal(self) -> bool:
        """Asking again will not help, unless the other side changes."""
        return any(refusal in self.text for refusal in self.REFUSALS)


class _Manager(KafkaConnectionManager):  # type: ignore[misc]  # kafka-python is untyped
    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at=timeout_at)
        receive = transport._sock_recv

        def all_of_it() -> tuple[bytes, Exception | None]:
            received, error = receive()
            return received, None if received else error  # the end comes again at the next call

        transport._sock_recv = all_of_it
        return transport


def connect(kind: type, config: KafkaConfig, **settings: Any) -> Any:
    """Construct a kafka-python client and wait, bounded, until it knows the cluster.

    Args:
        kind: `KafkaConsumer`, `KafkaProducer` or `KafkaAdminClient`.
        config: Broker and credentials.
        settings: The client's own settings; they win over `client_settings`.

    Raises:
        BrokerError: no broker answers in time, or, as `BrokerRefused`, it refuses us; the text has the reason.
    """
    clients: list[KafkaNetClient] = []

    def make_client(**options: Any) -> KafkaNetClient:
        net = NetworkSelector(**options)
        clients.append(KafkaNetClient(net=net, manager=_Manager(net, **options), **options))
        return clients[-1]

    kafka_logger, problem = logging.getLogger("kafka"), _LastProblem()
    kafka_logger.addHandler(problem)
    try:
        return kind(**{**client_settings(config), **settings, "kafka_client": make_client})
    except KafkaError as error:
        for client in clients:
            client.close()
        refusal, what = (BrokerRefused, "Kafka refuses us: ") if problem.is_refusal else (BrokerError, "Kafka does not answer: ")
        raise refusal(
            f"{what}{problem.text or error}",
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
