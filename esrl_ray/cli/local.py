"""One machine for one run: the mark and the watchdog, the folder and its lock, signals, and a local Ray bound to loopback."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
import psutil
import ray

from esrl_ray.actors import NAMESPACE
from esrl_ray.cli import watchdog
from esrl_ray.errors import ConfigError, LoopError

OBJECT_STORE_BYTES = 256 * 2**20
RAY_LOGS = "ray-logs"
OWN_ENTRIES = ("log", "policies", "checkpoints", "spool", "serve", "broker", RAY_LOGS, "report.json", "report.html")
"""What a demo writes into its folder and clears at the next start; anything else in there is a reason to refuse."""
LOCK = ".esrl-lock"


@dataclass(frozen=True, slots=True)
class LocalRun:
    """What a local run owns."""

    id: str
    folder: Path
    temporary: Path


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def catch_signals() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt in the main thread. Call again after `ray.init`, which installs its own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


@contextmanager
def own_folder(folder: Path) -> Iterator[int]:
    """Own a run's folder, cleared of an older run; the file descriptor of the lock.

    Raises:
        ConfigError: the folder is used by another run or holds files that are not a run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError("another run is using this folder", str(folder), "choose another --out, or end that run") from error
        try:
            if foreign := sorted(p.name for p in folder.iterdir() if p.name not in (*OWN_ENTRIES, LOCK)):
                raise ConfigError(f"the folder holds files that are not a run's: {foreign[:5]}", str(folder), "choose another --out")
            for name in OWN_ENTRIES:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            yield lock.fileno()
        finally:
            (folder / LOCK).unlink(missing_ok=True)


@contextmanager
def local_run(folder: Path, lock: int) -> Iterator[LocalRun]:
    """Own everything that is started inside the block.

    Whatever way the block is left, also by kill -9, the processes started in it are ended and the temporary folder is removed; the
    lock is held until then.

    Args:
        folder: Of the run, owned.
        lock: From `own_folder`.
    """
    mark = uuid.uuid4().hex[:8]
    run = LocalRun(mark, folder, watchdog.temporary_folder(mark))
    run.temporary.mkdir(mode=0o700)
    os.truncate(lock, 0)
    os.write(lock, f"{run.id} {os.getpid()}\n".encode())  # for people, and for tests that look for the run's processes
    before = os.environ.get(watchdog.MARK)
    os.environ[watchdog.MARK] = run.id
    guard = watchdog.start(run.id, [run.temporary, folder / LOCK], keep_open=lock)
    catch_signals()
    try:
        yield run
    except LoopError:
        _keep_logs(run)
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        disconnect()
        watchdog.stop(guard)
        os.environ.pop(watchdog.MARK) if before is None else os.environ.update({watchdog.MARK: before})
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _keep_logs(run: LocalRun) -> None:
    """Copy Ray's logs out of the temporary folder."""
    logs = run.temporary / "ray" / "session_latest" / "logs"
    if logs.is_dir():
        shutil.copytree(logs, run.folder / RAY_LOGS, ignore_dangling_symlinks=True, dirs_exist_ok=True)
        say(f"Ray's logs are kept in {run.folder / RAY_LOGS}")


def disconnect(timeout_s: float = 10.0) -> None:
    """Leave Ray, but do not hang on a Ray that is dead: `ray.shutdown` can wait for one without end."""
    if ray.is_initialized():
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(timeout_s)


def start_ray(run: LocalRun, environment: Mapping[str, str]) -> None:
    """Start Ray on this machine, every socket on loopback, and connect to it.

    `RAY_AUTH_MODE` is explicit, because a local `ray.init` would otherwise create a token file that later breaks `ray job submit`.
    """
    os.environ.update(environment)
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(run.temporary / "ray"),
        log_to_driver=False,
        configure_logging=False,
    )
    catch_signals()


class RayWatch:
    """Notices that Ray itself died: its raylet or its GCS, by their process ids."""

    def __init__(self, run: LocalRun) -> None:
        self._processes = [p for p in watchdog.carriers(run.id) if p.name() in ("raylet", "gcs_server")]
        if len(self._processes) < 2:
            raise LoopError(f"Ray started without raylet or GCS: {[p.name() for p in self._processes]}")

    def check(self) -> None:
        """Raise LoopError when one of them is gone."""
        for process in self._processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise LoopError(f"Ray's process {process.pid} ended", "this machine", f"its logs are kept in the run's folder {RAY_LOGS}")


def pss_bytes(run: LocalRun) -> int:
    """Proportional set size of this process and everything that it started."""
    total = 0
    for process in [psutil.Process(), *watchdog.carriers(run.id)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended while we looked
    return total


def say(text: str) -> None:
    """One line for people on stderr; stdout belongs to the result."""
    click.echo(text, err=True)
