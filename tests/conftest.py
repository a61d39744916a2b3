"""Fixtures that all tests share: the demo's configuration, and one embedded broker per test session with fresh topics per test."""

from __future__ import annotations

import gc
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from esrl_ray.config import Config, KafkaConfig, load_config

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """kafka-python 3.0.12 drops the socket of a refused connection or handshake without closing it; everything else stays an error."""
    config.addinivalue_line("filterwarnings", "ignore:unclosed <(socket.socket|ssl.SSLSocket):ResourceWarning")
    config.addinivalue_line("filterwarnings", "ignore:(read|open)_text is deprecated:DeprecationWarning")


def pytest_sessionfinish() -> None:
    """Let go of such sockets while they can be ignored: what pytest collects at its very end is an error, whatever the filters say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"unclosed <(socket\.socket|ssl\.SSLSocket)", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def config() -> Config:
    """The demo's configuration."""
    return load_config(ROOT / "configs" / "demo.yaml")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of an embedded broker that lives as long as the test session. Do not kill it: start one of your own."""
    from streaming.broker import EmbeddedBroker  # unit tests need no Java

    with EmbeddedBroker.start(tmp_path_factory.mktemp("broker"), say=print) as embedded:
        yield embedded.bootstrap_servers


@pytest.fixture
def kafka_config(broker: str) -> KafkaConfig:
    """Two fresh topics (and their dead-letter topics) on the session's broker."""
    from streaming.broker import ensure_topics

    suffix = uuid.uuid4().hex[:8]
    fresh = KafkaConfig(bootstrap_servers=broker, decisions_topic=f"decisions-{suffix}", feedback_topic=f"feedback-{suffix}")
    ensure_topics(fresh)
    return fresh
