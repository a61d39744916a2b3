"""Ends what a command started when the command dies, however it dies.

The command sets the variable `ESRL_RUN` in its environment before it starts anything, so that every descendant carries it: the
broker's Java, Ray's processes and workers, HAProxy. This process waits on a pipe that closes with the command, then ends the carriers
by their process ids, first gently, then not, and removes the run's temporary folders. The command itself does not carry the mark
(a change of `os.environ` is not seen in `/proc/self/environ`), nor does anything that was there before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

MARK, MODULE = "ESRL_RUN", "esrl_ray.cli.watchdog"


def temporary_folder(mark: str) -> Path:
    """Where a run keeps what must not outlive it."""
    return Path(tempfile.gettempdir()) / f"esrl-{mark}"


def carriers(mark: str, *, but: int = 0) -> list[psutil.Process]:
    """Processes of a run, without this one, the process `but`, and the watchdogs.

    They carry the mark in their environment, or write to a file of the run's temporary folder: Ray's agents overwrite their
    environment with their title, but write their logs there.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in (os.getpid(), but) and _belongs(process, mark) and MODULE not in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended while we looked, or belongs to somebody else
    return found


def _belongs(process: psutil.Process, mark: str) -> bool:
    if process.environ().get(MARK) == mark:
        return True
    folder = f"{temporary_folder(mark)}{os.sep}"
    return any(file.path.startswith(folder) and file.mode != "r" for file in process.open_files())  # a reader of logs is not ours


def end_all(mark: str, *, but: int = 0, grace_s: float = 5.0) -> int:
    """End every carrier of the mark except `but`; returns how many there were."""
    num = 0
    deadline = time.monotonic() + grace_s
    while left := carriers(mark, but=but):
        num = max(num, len(left))
        for process in left:
            try:
                if time.monotonic() < deadline:
                    process.terminate()
                else:
                    process.kill()
            except psutil.NoSuchProcess:
                continue  # ended by itself
        psutil.wait_procs(left, timeout=0.5)
    return num


def start(mark: str, leftovers: list[Path], *, keep_open: int = -1) -> subprocess.Popen[bytes]:
    """Start a watchdog; it acts when its standard input closes, so when this process dies, or at `stop`.

    Args:
        mark: Value of `ESRL_RUN` that the descendants carry.
        leftovers: Files and folders that it removes afterwards.
        keep_open: File descriptor of the lock, so that it is held until everything has ended; -1 for none.
    """
    fds = () if keep_open < 0 else (keep_open,)
    command = [sys.executable, "-m", MODULE, mark, str(os.getpid()), *map(str, leftovers)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=fds)


def stop(watchdog: subprocess.Popen[bytes]) -> None:
    """Let it act now, and wait until it has."""
    watchdog.communicate(timeout=60)


def _main() -> None:
    sys.stdin.buffer.read()
    end_all(sys.argv[1], but=int(sys.argv[2]))  # the command itself may have logs of Ray open, and ends by itself
    alive = psutil.pid_exists(int(sys.argv[2]))
    for path in map(Path, sys.argv[3:]):
        if alive and not path.is_dir():
            continue  # the lock: a command that lives removes it itself, after its report
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    _main()
