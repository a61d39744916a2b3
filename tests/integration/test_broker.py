"""The embedded broker itself: ports, start, end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from kafka import KafkaProducer

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError
from esrl_ray.ports import free_ports
from streaming import broker as broker_module
from streaming.broker import EmbeddedBroker, _pick_ports, ensure_topics
from streaming.client import client_settings, connect


def test_a_port_that_is_taken_before_the_broker_binds_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        picks = iter([(taken.getsockname()[1], free_ports(1)[0])])
        monkeypatch.setattr(broker_module, "_pick_ports", lambda *wanted: next(picks, None) or _pick_ports(*wanted))
        with EmbeddedBroker.start(tmp_path) as embedded:
            assert embedded.bootstrap_servers != f"127.0.0.1:{taken.getsockname()[1]}"
            ensure_topics(KafkaConfig(bootstrap_servers=embedded.bootstrap_servers))


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
