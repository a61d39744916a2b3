from __future__ import annotations

import socket

import pytest

from esrl_ray import ports
from esrl_ray.errors import ConfigError


def test_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    found = ports.free_ports(20)
    assert len(set(found)) == 20
    assert all(ports.FIRST <= port <= ports.LAST < 30_000 for port in found)


def test_a_port_that_somebody_has_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = ports.free_ports(1)
    monkeypatch.setattr(ports, "FIRST", port)
    monkeypatch.setattr(ports, "LAST", port)
    monkeypatch.setattr(ports, "TRIES", 1)
    with socket.socket() as taken:
        taken.bind((ports.LOOPBACK, port))
        taken.listen()
        with pytest.raises(ConfigError, match="no 1 free ports"):
            ports.free_ports(1)
    assert ports.free_ports(1) == [port]
