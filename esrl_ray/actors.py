"""The only place that turns plain classes into Ray actors: how they are named, found, restarted and ended.

Actors live in namespace `esrl`. A detached one outlives the command that made it and is shared by name; the others end with the
command that spawned them. All restart without limit: each restores itself from its durable files. No actor reserves a CPU: the
parts of a loop wait more than they work, and a reservation would only keep them from starting on a small machine.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from esrl_ray.errors import ConfigError, LoopError

NAMESPACE = "esrl"
POLICY_STORE = "policy_store"
CONNECT_S = 5.0  # until an address counts as one where nobody listens
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_logger = logging.getLogger(__name__)


def connect(address: str) -> bool:
    """Join a Ray cluster that runs; False when there is none, or with the address `none`.

    Raises:
        ConfigError: it is no address.
    """
    if address == "none":
        return False
    try:
        if ":" in address and "://" not in address:  # `ray.init` waits for minutes for an address where nobody listens
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ValueError, OverflowError) as error:  # a port is beyond 65535
        raise ConfigError(f"{address!r} is no address of a Ray cluster", "--address", "give auto, host:port or ray://host:port") from error
    except OSError:
        return False
    return True


def join(address: str) -> None:
    """Join a Ray cluster that runs.

    Raises:
        ConfigError: there is none.
    """
    if not connect(address):
        raise ConfigError("no Ray cluster answers", f"--address {address}", "start one with `ray start --head`, or name the one that runs")


def spawn(name: str, cls: type, *args: Any, detached: bool = False, max_concurrency: int | None = None, num_gpus: float = 0) -> ActorHandle:
    """Get the actor of this name, or make it.

    Args:
        name: Unique in namespace `esrl`.
        cls: A plain class; async methods make an async actor.
        args: Constructor arguments, used again at every restart.
        detached: Outlive the command that spawned it.
        max_concurrency: Threads (or coroutines) of the actor; Ray's default when None.
        num_gpus: GPUs that the actor sees; Ray hides them from one that reserves none.

    Returns:
        A handle; the constructor may still be running.
    """
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "get_if_exists": True,
        "lifetime": "detached" if detached else None,
        "runtime_env": {"env_vars": THREADS},
        "num_gpus": num_gpus,
    }
    if max_concurrency is not None:
        options["max_concurrency"] = max_concurrency
    return ray.remote(cls).options(**options).remote(*args)


def run_once(function: Callable[..., Any], *args: Any) -> ray.ObjectRef:
    """Run a function in a process of its own, which ends with it. It is never repeated: its death is what the reference raises."""
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "max_calls": 1, "runtime_env": {"env_vars": THREADS}}
    reference: ray.ObjectRef = ray.remote(**options)(function).remote(*args)
    return reference


def find(name: str) -> ActorHandle:
    """The actor of this name.

    Raises:
        ValueError: there is none.
    """
    return ray.get_actor(name, namespace=NAMESPACE)


def present(names: Iterable[str]) -> dict[str, ActorHandle]:
    """Those actors of these names that there are."""
    found: dict[str, ActorHandle] = {}
    for name in names:
        with contextlib.suppress(ValueError):
            found[name] = find(name)
    return found


def end(handles: Mapping[str, ActorHandle]) -> None:
    """End actors for good, in order."""
    for name, handle in handles.items():
        ray.kill(handle, no_restart=True)
        _logger.info("actor ended name=%s", name)


def ask(call: Callable[..., Any], *args: Any, timeout_s: float = 5.0, otherwise: Any = None) -> Any:
    """Call an actor method and wait; `otherwise` when the actor is being restarted or does not answer in time.

    An exception that the method itself raised is raised here.

    Raises:
        LoopError: the actor's constructor failed, so it will not come back.
    """
    try:
        return ray.get(call(*args), timeout=timeout_s)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        _check_began(error)
        _logger.warning("actor does not answer: %s", str(error).splitlines()[0])
        return otherwise


def insist(call: Callable[..., Any], *args: Any, timeout_s: float = 90.0) -> Any:
    """Call an actor method that may be run twice, again and again while the actor is being restarted.

    Raises:
        LoopError: no answer within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(call(*args), timeout=max(1.0, deadline - time.monotonic()))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            _check_began(error)
            if time.monotonic() >= deadline:
                raise LoopError(f"no answer within {timeout_s:.0f} s: {str(error).splitlines()[0]}", "an actor") from error
            time.sleep(0.5)


def _check_began(error: Exception) -> None:
    """Ray restarts an actor whose process died, but not one whose constructor raised: say why, instead of waiting for it."""
    if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
        raise LoopError(f"an actor cannot start: {str(error).strip().splitlines()[-1]}") from error
