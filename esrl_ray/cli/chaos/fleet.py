"""What the harness needs of the parts that run, whether they are plain processes or Ray actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from esrl_ray.config import Config

START_S = 120.0
"""How long a part may take to answer."""


class Fleet(Protocol):
    """The parts of one run, by name."""

    config: Config
    folder: Path  # for orders to workers
    workers: list[str]
    shards: list[str]
    others: list[str]  # further parts, which are started last
    restarts_itself: bool

    def start(self, name: str) -> None:
        """Start one, or wait until it has started itself; returns when it answers."""

    def deal(self, num_workers: int) -> None:
        """Kill all workers and start another number of them: partitions move."""

    def status(self, name: str) -> dict[str, Any] | None:
        """Of one part; None while it does not answer."""

    def pid(self, name: str) -> int:
        """Process id."""

    def wait_dead(self, name: str, timeout_s: float) -> bool:
        """Wait until the process has ended."""

    def ask(self, name: str, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of a part; ConnectionError when it is gone."""

    def end(self) -> None:
        """End all of them for good."""
