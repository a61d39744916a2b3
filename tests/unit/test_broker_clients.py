"""Settings of the Kafka clients, dead-letter share, and a source without a broker."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from kafka.errors import CorruptRecordError, TopicAuthorizationFailedError
from pydantic import SecretStr

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, BrokerRefused, StreamError, WireError
from esrl_ray.vocabulary import Refusal
from streaming import client
from streaming.broker import _pick_ports
from streaming.deadletter import DeadLetters
from streaming.records import Record
from streaming.source import Source
from streaming.wire import JSON

BAD = WireError("bad", Refusal.MALFORMED)
NOWHERE = KafkaConfig(bootstrap_servers="127.0.0.1:9")


def _record(offset: int) -> Record:
    return Record("feedback", 2, offset, 0, None, b"?", JSON)


def test_credentials_are_passed_on_and_stay_secret() -> None:
    config = KafkaConfig(
        bootstrap_servers="a:1,b:2",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="u",
        sasl_password=SecretStr("p"),
    )
    settings = client.client_settings(config)
    assert settings["bootstrap_servers"] == ["a:1", "b:2"]
    assert (settings["security_protocol"], settings["sasl_mechanism"]) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (settings["sasl_plain_username"], settings["sasl_plain_password"]) == ("u", "p")
    assert settings["bootstrap_timeout_ms"] <= 10_000
    assert "sasl_mechanism" not in client.client_settings(NOWHERE)


def test_a_missing_c_checksum_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    client._warn_without_crc32c.cache_clear()
    with caplog.at_level(logging.WARNING):
        client.client_settings(NOWHERE)
        client.client_settings(NOWHERE)
    assert [r.getMessage() for r in caplog.records if "pip install crc32c" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_ports_are_free_and_different_and_a_taken_one_is_named() -> None:
    first, second = _pick_ports(0, 0)
    assert first != second
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port} is in use.*name another port"):
            _pick_ports(0, port)


def test_a_fifth_of_a_thousand_refused_records_is_allowed_and_one_more_is_not() -> None:
    letters = DeadLetters(NOWHERE)
    letters.passed(5_000)
    for offset in range(200):
        letters.send(_record(offset), BAD)
    with pytest.raises(StreamError, match=r"201 of the last 1000 .*max_dead_letter_share 0\.2.*the last one: bad.*feedback\[2\]@200"):
        letters.send(_record(200), BAD)


def test_letters_do_not_wait_for_a_commit_when_they_take_much_memory() -> None:
    letters = DeadLetters(NOWHERE, flush_timeout_s=0.0)
    value = bytes(4 * 2**20)
    for offset in range(7):
        letters.send(_record(offset)._replace(value=value), BAD)
    with pytest.raises(BrokerError, match="8 dead letters or late events were not acknowledged"):
        letters.send(_record(7)._replace(value=value), BAD)


def test_good_records_push_refused_ones_out_of_the_window() -> None:
    letters = DeadLetters(NOWHERE)
    for offset in range(1_000):
        letters.send(_record(offset), BAD)
        letters.passed(5)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A broker that refuses everybody; its calls say how often it was asked."""
    connect = Mock(side_effect=BrokerRefused("Kafka refuses us: Authentication failed", "b:1"))
    for module in ("source", "deadletter"):
        monkeypatch.setattr(f"streaming.{module}.connect", connect)
        monkeypatch.setattr(f"streaming.{module}.reachable", lambda *_, **__: True)
    monkeypatch.setattr("streaming.deadletter.RETRY_S", 0.0)
    yield connect


def test_a_batch_that_cannot_be_read_ends_the_reader_with_its_place_and_the_way_past_it() -> None:
    source = Source(NOWHERE, [0], {}, max_poll_records=10)
    source._consumer = Mock(position=Mock(side_effect=CorruptRecordError("feedback[0]@40-52: the batch fails its checksum")))
    with pytest.raises(StreamError, match=r"feedback\[0\]@40-52: .*nothing was skipped\. To go on .*kafka-delete-records.*kafka\.on_gap"):
        source.poll(0)


def test_reading_asks_a_broker_that_refuses_it_for_a_minute_and_ends_with_the_reason(refused: Any) -> None:
    now_s = 0.0
    source = Source(NOWHERE, [0], {}, max_poll_records=10, clock_s=lambda: now_s)
    for now_s in (0.0, 30.0, client.REFUSED_S - 1):
        assert source.poll(0) == [] and source.degraded_s == now_s
    now_s = client.REFUSED_S
    with pytest.raises(StreamError, match=r"refuses us: Authentication failed, again and again for 60 s \(at b:1\)"):
        source.poll(0)
    assert refused.call_count == 4


@pytest.mark.parametrize("error", [BrokerRefused("refused"), TopicAuthorizationFailedError("refused")])
def test_dead_letters_end_a_minute_after_a_refusal_and_later_when_the_broker_is_only_away(refused: Any, error: Exception) -> None:
    for side_effect, asked in ((error, 3), (BrokerError("away"), 10)):
        refused.side_effect, refused.call_count = side_effect, 0
        letters = DeadLetters(NOWHERE, clock_s=functools.partial(next, itertools.count(0, 30)))  # asked every 30 s
        letters.send(_record(0), BAD)
        with pytest.raises(BrokerError, match=rf"not acknowledged in {30 * asked} s: .*{re.escape(str(side_effect))}"):
            letters.flush()
        assert refused.call_count == asked


def test_a_source_without_a_broker_is_degraded_and_waits_without_spinning() -> None:
    source = Source(NOWHERE, [0], {"feedback/0": 7}, max_poll_records=10)
    assert source.degraded_s == 0
    started, cpu = time.monotonic(), time.process_time()
    for _ in range(3):
        assert source.poll(200) == []
    waited = time.monotonic() - started
    assert waited >= 0.1
    assert time.process_time() - cpu < 0.5 * waited  # spinning takes all of it, on a busy machine too
    assert source.degraded_s > 0
    assert source.positions() == {"feedback/0": 7}
    assert not source.at_end("feedback", 0)
    assert source.lag() == {}
    source.close()
