"""Ingest workers and replay shards as plain processes, and those who start, ask and kill them.

The same classes as in the Ray actors of a deployment (`esrl_ray/cli/parts.py`), without Ray: such a process is up again within a second
or two, so that a short run has many deaths.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from esrl_ray.cli.chaos import points
from esrl_ray.cli.chaos.fleet import START_S
from esrl_ray.cli.chaos.remote import AUTH, Remote, end_with_parent, serve, start
from esrl_ray.cli.clock import clock_ms
from esrl_ray.config import Config
from esrl_ray.errors import EsrlError, LoopError
from esrl_ray.ports import free_ports
from esrl_ray.replay.buffer import ReplayBuffer
from streaming.deadletter import DeadLetters
from streaming.partitions import commits_of_shard, deal_partitions, live_workers, owners_of, rows_of_shard
from streaming.source import Source
from streaming.steplog import StepLog
from streaming.worker import IngestWorker

MODULE = "esrl_ray.cli.chaos.processes"
KILLED = (-signal.SIGKILL, -signal.SIGALRM)
"""Exit status of a process that was killed at once, or a while after a point."""
REFUSED = 3
"""Exit status of a worker that ended with a known error, such as being fenced."""


class IngestProcess:
    """One ingest worker."""

    def __init__(self, config: Config, worker: str, folder: Path, shards: Sequence[Remote]) -> None:
        points.watch(folder, worker)
        partitions = [p for p, owner in owners_of(config).items() if owner == worker]
        log = StepLog(config.log_root, worker, uuid.uuid4().hex, config.spec.build(), config.log)
        self._shards, self._stop = shards, threading.Event()
        self._worker = IngestWorker(
            config,
            worker,
            partitions,
            log=log,
            source_factory=lambda positions: Source(config.kafka, partitions, positions, max_poll_records=config.ingest.max_poll_records),
            dead_letters=DeadLetters(config.kafka),
            publish=[self._publish],
            clock_ms=clock_ms,
        )

    def _publish(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        for i, shard in enumerate(self._shards):
            with contextlib.suppress(ConnectionError):  # it reads the log when it is back
                shard.call("apply", worker, commit, rows_of_shard(rows, i, len(self._shards)), committed_ms, timeout_s=10.0)

    def status(self) -> dict[str, Any]:
        """The worker's status."""
        return {**self._worker.status(), "pid": os.getpid()}

    def run(self) -> None:
        """Work until `drain`."""
        self._worker.run(self._stop)

    def drain(self, until: Mapping[str, int], timeout_s: float) -> dict[str, Any]:
        """Read on to the end offsets, close what is open as truncated, commit."""
        self._stop.set()
        self._worker.drain(until, timeout_s)
        return self.status()


class ReplayProcess:
    """One replay shard, refilled from the logs at its start."""

    def __init__(self, config: Config, shard: str) -> None:
        index = int(shard.rpartition("-")[2])
        self._root, self._lock = config.log_root, threading.Lock()
        self._buffer = ReplayBuffer(
            config, seed=index, read_log=functools.partial(commits_of_shard, config.log_root, index, config.replay.num_shards)
        )
        self._buffer.refill(live_workers(self._root), inserted_ms=clock_ms())

    def status(self) -> dict[str, Any]:
        """Sizes and lineage."""
        return {"size": self._buffer.size, "lineage": dict(self._buffer.lineage), "pid": os.getpid()}

    def apply(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        """Take the rows of one commit."""
        with self._lock:
            self._buffer.apply(worker, commit, rows, inserted_ms=clock_ms())

    def catch_up(self) -> None:
        """Read what the logs hold beyond what arrived."""
        with self._lock:
            self._buffer.catch_up(live_workers(self._root), inserted_ms=clock_ms())

    def contents(self, step_ids: Sequence[str]) -> dict[str, Any]:
        """See `contents_of`, after `catch_up`."""
        self.catch_up()
        with self._lock:
            return contents_of(self._buffer, step_ids)


def contents_of(buffer: ReplayBuffer, step_ids: Sequence[str]) -> dict[str, Any]:
    """size, lineage, samplable (ids), missing (ids that are not here) and columns ({name: (n, ...)} of the others, in order)."""
    steps, missing = [], []
    for step_id in step_ids:
        try:
            steps.append(buffer.step(step_id))
        except KeyError:
            missing.append(step_id)
    return {
        "size": buffer.size,
        "lineage": dict(buffer.lineage),
        "samplable": buffer.samplable_ids(),
        "missing": missing,
        "columns": {name: np.stack([step[name] for step in steps]) for name in (steps[0] if steps else ())},
    }


class ProcessFleet:
    """Starts, asks, kills and restarts the processes of one run.

    Args:
        config: Deployment; `run.dir` is the run's.
        folder: For logs of the processes and orders to them.
    """

    restarts_itself = False

    def __init__(self, config: Config, folder: Path) -> None:
        self.workers = list(dict.fromkeys(owners_of(config).values()))
        self.shards = [f"replay-{i}" for i in range(config.replay.num_shards)]
        self.others: list[str] = []
        self.folder = folder
        self.config, self._key = config, secrets.token_bytes(16)
        self._ports = dict(zip(self.shards, free_ports(len(self.shards)), strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._remotes: dict[str, Remote] = {}
        self._replaced: list[subprocess.Popen[bytes]] = []
        self._write_config()

    def start(self, name: str) -> None:
        """Start one and wait until it answers.

        Raises:
            LoopError: it ended, with the end of what it said.
        """
        if name in self.shards:
            port, arguments = self._ports[name], [name]
        else:
            port = free_ports(1)[0]
            arguments = [name, *(str(self._ports[shard]) for shard in self.shards)]
        command = [str(self.folder), str(port), *arguments]
        process = self._processes[name] = start(MODULE, *command, key=self._key, log=self.folder / f"{name}.log")
        self._remotes[name] = Remote(port, self._key)
        deadline = time.monotonic() + START_S
        while self.status(name) is None:
            if time.monotonic() > deadline:
                raise LoopError(f"{name} does not come up, exit status {process.poll()}: {self.said(name)}")
            time.sleep(0.05)

    def _write_config(self) -> None:
        (self.folder / "config.json").write_text(self.config.model_dump_json(), encoding="utf-8")

    def deal(self, num_workers: int) -> None:
        """Kill all workers and start another number of them, as a start of `esrl ingest` does."""
        for name in self.workers:
            self._processes[name].kill()
            self.wait_dead(name, START_S)
        self.config = self.config.model_copy(update={"ingest": self.config.ingest.model_copy(update={"num_workers": num_workers})})
        self._write_config()
        owners = owners_of(self.config)
        deal_partitions(self.config.log_root, self.config.spec.build(), owners, incarnation=uuid.uuid4().hex, committed_ms=clock_ms())
        for shard in self.shards:
            self.ask(shard, "catch_up", timeout_s=START_S)
        workers = list(dict.fromkeys(owners.values()))
        for name in workers:
            self.start(name)
        self.workers = workers  # as a whole: another thread looks at it

    def status(self, name: str) -> dict[str, Any] | None:
        """Of one part; None while it does not answer.

        Raises:
            LoopError: it ended by itself.
        """
        try:
            status: dict[str, Any] = self._remotes[name].call("status", timeout_s=5.0)
        except ConnectionError as error:
            if (ended := self._processes[name].poll()) not in (None, *KILLED):
                raise LoopError(f"{name} ended by itself, exit status {ended}: {self.said(name)}") from error
            return None
        return status

    def pid(self, name: str) -> int:
        """Process id."""
        return self._processes[name].pid

    def wait_dead(self, name: str, timeout_s: float) -> bool:
        """Wait until the process has ended."""
        try:
            self._processes[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._remotes[name].close()
        _close_input(self._processes[name])
        return True

    def set_aside(self, name: str) -> subprocess.Popen[bytes]:
        """Give up a process without ending it, so that `start` makes a second one of the same name."""
        process = self._processes.pop(name)
        self._replaced.append(process)
        return process

    def said(self, name: str, lines: int = 6) -> str:
        """The last lines of what the processes of this name printed."""
        return "\n".join((self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def ask(self, name: str, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of a part.

        Raises:
            ConnectionError: it is gone.
        """
        return self._remotes[name].call(method, *args, timeout_s=timeout_s)

    def end(self) -> None:
        """Kill everything."""
        for process in [*self._processes.values(), *self._replaced]:
            process.kill()
            process.wait()
            _close_input(process)
        for remote in self._remotes.values():
            remote.close()


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _main(folder: Path, port: int, name: str, *shard_ports: str) -> None:
    end_with_parent()
    faulthandler.register(signal.SIGUSR1)  # where it hangs, if it does
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    key = bytes.fromhex(os.environ[AUTH])
    config = Config.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    if not shard_ports:
        serve(ReplayProcess(config, name), port, key)
        return
    try:
        part = IngestProcess(config, name, folder, [Remote(int(shard_port), key) for shard_port in shard_ports])
        threading.Thread(target=serve, args=(part, port, key), daemon=True).start()
        part.run()
    except EsrlError as error:
        print(f"{name} ended: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(REFUSED)
    threading.Event().wait()  # `drain` runs in a thread of its caller


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
