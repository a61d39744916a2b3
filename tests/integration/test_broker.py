"""The embedded broker itself: ports, start, end, and what a client is told that may not come in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kafka import KafkaProducer
from pydantic import SecretStr

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError
from streaming import broker as broker_module
from streaming.broker import EmbeddedBroker, _pick_ports, end_offsets, ensure_topics
from streaming.client import client_settings, connect

SASL = {
    "{port},CONTROLLER://": "{port},EXT://{host}:SASL_PORT,CONTROLLER://",
    "advertised.listeners=PLAINTEXT://{host}:{port}": "advertised.listeners=PLAINTEXT://{host}:{port},EXT://{host}:SASL_PORT",
    "CONTROLLER:PLAINTEXT\n": "CONTROLLER:PLAINTEXT,EXT:SASL_PLAINTEXT\nlistener.name.ext.sasl.enabled.mechanisms=PLAIN\n"
    'listener.name.ext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_u="right";\n',
}


@pytest.fixture(scope="module")
def unlucky_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, int]]:
    """A broker whose first choice of a port is taken before it binds it; with a listener that wants a password.

    Gives the address of that listener, the broker's address, and the port that was taken.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        taken_port, (sasl_port, spare) = taken.getsockname()[1], _pick_ports(0, 0)
        picks = iter([(taken_port, spare)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(broker_module, "_pick_ports", lambda *wanted: next(picks, None) or _pick_ports(*wanted))
            for old, new in SASL.items():
                patch.setattr(broker_module, "PROPERTIES", broker_module.PROPERTIES.replace(old, new.replace("SASL_PORT", str(sasl_port))))
            embedded = EmbeddedBroker.start(tmp_path_factory.mktemp("unlucky"))
        with embedded:
            yield f"127.0.0.1:{sasl_port}", embedded.bootstrap_servers, taken_port


def test_a_wrong_password_shows_the_brokers_reason(unlucky_broker: tuple[str, str, int]) -> None:
    sasl = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "u"}
    right = KafkaConfig.model_validate({"bootstrap_servers": unlucky_broker[0], **sasl, "sasl_password": "right"})
    ensure_topics(right)
    assert set(end_offsets(right).values()) == {0}
    wrong = right.model_copy(update={"sasl_password": SecretStr("wrong")})
    texts: list[str] = []
    while len(texts) < 15 and not any(
        "Invalid username or password" in text for text in texts
    ):  # now and then kafka-python sees only the end
        with pytest.raises(BrokerError, match=f"SASL_PLAINTEXT {unlucky_broker[0]}.*credentials") as caught:
            connect(KafkaProducer, wrong, bootstrap_timeout_ms=4_000)
        texts.append(str(caught.value))
    assert "Invalid username or password" in texts[-1]
    assert "wrong" not in texts[-1]


def test_a_port_that_is_taken_before_the_broker_binds_it_is_replaced(unlucky_broker: tuple[str, str, int]) -> None:
    _, bootstrap_servers, taken_port = unlucky_broker
    assert bootstrap_servers != f"127.0.0.1:{taken_port}"
    ensure_topics(KafkaConfig(bootstrap_servers=bootstrap_servers))


def test_a_port_in_use_is_named(broker: str, tmp_path: Path) -> None:
    port = int(broker.rpartition(":")[2])
    with pytest.raises(BrokerError, match=f"port {port} is in use"):
        EmbeddedBroker.start(tmp_path, port=port)


def test_a_broker_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.properties").write_text("version=1\ncluster.id=x\nnode.id=77\n")
    with pytest.raises(BrokerError, match=r"(?s)ended while it started.*\| .*node id 77.*broker\.log"):
        EmbeddedBroker.start(tmp_path)


def test_a_killed_parent_leaves_no_broker_even_when_a_thread_started_it(tmp_path: Path) -> None:
    code = f"""
import threading, time
from pathlib import Path
from streaming.broker import EmbeddedBroker
brokers = []
thread = threading.Thread(target=lambda: brokers.append(EmbeddedBroker.start(Path({str(tmp_path)!r}))))
thread.start(); thread.join(); time.sleep(0.3)
assert brokers[0].alive
print(brokers[0].pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert parent.stdout is not None
    with parent:
        pid = int(parent.stdout.readline())
        child = psutil.Process(pid)
        assert os.getpgid(pid) == pid != os.getpgid(parent.pid)
        parent.kill()
    child.wait(5)
    assert not psutil.pid_exists(pid)


def test_settings_and_errors_name_the_broker() -> None:
    with pytest.raises(BrokerError, match=r"kafka\.bootstrap_servers"):
        client_settings(KafkaConfig())
    with pytest.raises(BrokerError, match=r"(?s)Connect.*127\.0\.0\.1:9"):
        connect(KafkaProducer, KafkaConfig(bootstrap_servers="127.0.0.1:9"), bootstrap_timeout_ms=300)
    assert not [t for t in threading.enumerate() if t.name.startswith("kafka-io-kafka-python")]
