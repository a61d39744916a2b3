"""How the endpoint gets onto a Ray cluster: `serve deploy configs/serve.yaml` for an operator, `deploy_local` for a command.

Serve runs behind HAProxy (7 times less latency than its Python proxy), which is chosen by environment variables of the processes that
start Ray: `serve_environment`. Ray Serve reads them when it is imported, so nothing here imports it before a function runs.

Ports. The endpoint and the replicas' own HTTP ports (30000-31000) bind to `serve.host`. Three do not, whatever the host, and belong
behind a firewall: HAProxy's metrics (RAY_SERVE_HAPROXY_METRICS_PORT) and statistics (RAY_SERVE_HAPROXY_STATS_PORT), and the replicas'
gRPC ports (40000-41000).

Paths. `build` runs in a task on the cluster whose working directory is that of `ray start` (or of the job's `working_dir`), not that of
`serve deploy`. A relative configuration path is therefore looked for there and then beside the installed packages; the run's folder is
made absolute before the replicas get it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esrl_ray.actors import THREADS
from esrl_ray.config import Config, RunConfig, load_config
from esrl_ray.errors import ConfigError, LoopError
from esrl_ray.ports import free_ports

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "esrl"
ROOT = Path(__file__).resolve().parents[1]
READY_S = 60.0
MAX_HAPROXY_FOLDER = 97 - len("//metrics.sock") - 56  # bytes; 56 hex digits of a node's id

SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "10",  # a reloaded HAProxy's old worker ends, 120 by default
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # requests take milliseconds; 30 by default
    "RAY_AUTH_MODE": "disabled",  # explicit: a token file that a local `ray.init` makes would shut out the command line tools
}
"""What the environment of every process that starts Ray must have."""

_logger = logging.getLogger(__name__)


def serve_environment(folder: Path) -> dict[str, str]:
    """`SERVE_ENVIRONMENT` with free ports and a folder of its own, so that several clusters on one host do not collide.

    Args:
        folder: For HAProxy's configuration and sockets. Ray puts the node's id below it, and a socket's path has at most 97 bytes: a
            folder whose path is too long is not used, and /tmp/haproxy-serve holds them.
    """
    metrics, stats = free_ports(2)
    ports = {"RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics), "RAY_SERVE_HAPROXY_STATS_PORT": str(stats)}
    if len(str(folder)) > MAX_HAPROXY_FOLDER:
        return SERVE_ENVIRONMENT | ports
    return {
        **SERVE_ENVIRONMENT,
        **ports,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }


def build(args: Mapping[str, Any]) -> Application:
    """The application that configs/serve.yaml names as `serve.app:build`.

    Args:
        args: `config`, path of a deployment's YAML; `set`, a list of `section.key=value`. Secrets come from the cluster's environment.

    Raises:
        ConfigError: unknown arguments, no such file, or an impossible configuration.
    """
    if unknown := set(args) - {"config", "set"}:
        raise ConfigError(f"unknown arguments {sorted(unknown)}, expected config and set", "applications[].args")
    path = Path(str(args.get("config", "configs/online.yaml"))).expanduser()
    if not path.is_absolute() and not path.exists():
        if not (ROOT / path).exists():
            raise ConfigError(
                f"no configuration {path} in {Path.cwd()} or {ROOT}", "applications[].args.config", "name it by its absolute path"
            )
        path = ROOT / path
    return bind(load_config(path, list(args.get("set", ())), environment=os.environ))


def bind(config: Config) -> Application:
    """The application of one configuration.

    Raises:
        ConfigError: no broker is named.
    """
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from serve.deployment import FuseReplica

    if config.kafka.bootstrap_servers is None:
        raise ConfigError(
            "kafka.bootstrap_servers is not set", "serve", "decisions need a broker, e.g. kafka.bootstrap_servers=127.0.0.1:9092"
        )
    absolute = config.model_copy(update={"run": RunConfig(dir=str(config.run.path))})
    deployment = ray_serve.deployment(
        FuseReplica,
        name="fuse",
        num_replicas=config.serve.num_replicas,
        max_ongoing_requests=200,
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": dict(THREADS)}},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application: Application = deployment.bind(absolute)
    return application


def deploy_local(config: Config) -> str:
    """Deploy onto the Ray that this process is connected to, and wait until it answers.

    Args:
        config: `serve.port` 0 takes a free one.

    Returns:
        The endpoint's URL.

    Raises:
        ConfigError: the port is in use.
        LoopError: it does not answer within `READY_S`.
    """
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    host, port = config.serve.host, config.serve.port or free_ports(1)[0]
    if config.serve.port:
        check_free(host, port)
    ray_serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port))
    ray_serve.run(bind(config), name=APP_NAME, route_prefix="/")
    url = f"http://{host}:{port}"
    deadline = time.monotonic() + READY_S
    while not _answers(url):
        if time.monotonic() > deadline:
            raise LoopError(f"{url}/healthz does not answer after {READY_S:.0f} s", "serve", "read the replicas' logs")
        time.sleep(0.1)
    _logger.info("serving url=%s replicas=%d", url, config.serve.num_replicas)
    return url


def stop_local(config: Config) -> list[dict[str, Any]]:
    """Take the endpoint down; replicas flush their decisions first. Returns what each replica has done (`ReplicaStatus`)."""
    import msgspec
    from ray import serve as ray_serve

    from serve.replica import read_statuses

    ray_serve.delete(APP_NAME)
    return [msgspec.to_builtins(status) for status in read_statuses(config.run.path)]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=2.0) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def check_free(host: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {host} cannot be used: {error.strerror}", "serve.port", "choose another, or 0 for a free one"
            ) from error
