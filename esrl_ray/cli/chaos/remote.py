"""Plain objects in processes of their own, called over a loopback socket: Ray actors without Ray, quick to start and to kill."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from esrl_ray.ports import LOOPBACK

AUTH = "ESRL_CHAOS_KEY"


class Remote:
    """Calls methods of the object behind a port, one at a time.

    Args:
        port: On the loopback interface.
        key: Shared secret.
    """

    def __init__(self, port: int, key: bytes) -> None:
        self._port, self._key = port, key
        self._connection: Connection[Any, Any] | None = None
        self._lock = threading.Lock()

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        """Call a method and wait for what it returns.

        Raises:
            ConnectionError: nobody is there, or not any more, or no answer came in time.
            RuntimeError: the method raised; the text says what.
        """
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = Client((LOOPBACK, self._port), authkey=self._key)
                self._connection.send((method, args))
                if not self._connection.poll(timeout_s):
                    raise TimeoutError(f"{method} did not return within {timeout_s:.0f} s")
                failed, result = self._connection.recv()
            except (OSError, EOFError) as error:
                self.close()
                raise ConnectionError(f"{method} at port {self._port}: {error!r}") from error
        if failed:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def serve(part: object, port: int, key: bytes) -> None:
    """Answer calls of the part's methods, a thread per caller, until the process ends."""
    listener = Listener((LOOPBACK, port), authkey=key, backlog=16)
    while True:
        try:
            connection = listener.accept()
        except (OSError, EOFError):  # a caller that died while it introduced itself
            continue
        threading.Thread(target=_answer, args=(part, connection), daemon=True).start()


def _answer(part: object, connection: Connection[Any, Any]) -> None:
    with connection:
        while True:
            try:
                method, args = connection.recv()
            except (OSError, EOFError):
                return
            try:
                reply = (False, getattr(part, method)(*args))
            except Exception as error:
                reply = (True, f"{type(error).__name__}: {error}")
            try:
                connection.send(reply)
            except OSError:
                return


def start(module: str, *arguments: str, key: bytes, log: Path) -> subprocess.Popen[bytes]:
    """Run a module in a process that ends with this one: it reads its standard input, see `end_with_parent`."""
    environment: Mapping[str, str] = {**os.environ, AUTH: key.hex(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with log.open("ab") as output:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment)


def end_with_parent() -> None:
    """End this process when the one that started it is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            continue
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
