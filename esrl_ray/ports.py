"""Free TCP ports for servers that this machine starts."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

from esrl_ray.errors import ConfigError

LOOPBACK = "127.0.0.1"
FIRST, LAST, TRIES = 20_000, 29_999, 200
"""Below the ports that Linux (32768 on) and macOS (49152 on) give to outgoing connections, above Ray's workers (10002 to 19999) and
below Serve's replicas (30000 on)."""


def free_ports(count: int) -> list[int]:
    """Different ports that nothing on the loopback interface is bound to.

    Binding to port 0 and letting go of it gives a port of the range from which outgoing connections are served: on a busy machine one of
    them takes it before the server does. Ray's dashboard agent then goes on without HTTP, and no job can be submitted.

    Raises:
        ConfigError: no port of 200 that were tried is free.
    """
    choose = random.SystemRandom()
    with ExitStack() as held:
        ports: list[int] = []
        for port in choose.sample(range(FIRST, LAST + 1), TRIES):
            if len(ports) == count:
                break
            probe = held.enter_context(socket.socket())
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue  # somebody's
            ports.append(port)
    if len(ports) < count:
        raise ConfigError(f"no {count} free ports among {TRIES} tried from {FIRST} to {LAST}", LOOPBACK, "end what listens there")
    return ports
