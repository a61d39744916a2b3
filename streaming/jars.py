"""The jars of the embedded broker: fetched once per user by jgo, every one checked against `kafka-jars.lock.toml` before each start.

jgo's `EnvironmentBuilder` is used to make the lock, not here: it reads 100 POMs to resolve versions again (24 s instead of 4 s), and
may fetch a whole JDK to tell modules from jars. Fetching the locked artifacts one by one gives the same 46 files.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import platformdirs

from esrl_ray.errors import BrokerError

Say = Callable[[str], None]
LOCK_NAME = "kafka-jars.lock.toml"
TRIES, DOWNLOADS_AT_ONCE, TIMEOUT_S = 3, 6, 30


@dataclass(frozen=True, slots=True)
class Jar:
    """One locked artifact."""

    group: str
    artifact: str
    version: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name in the cache, as in a Maven repository."""
        return f"{self.artifact}-{self.version}.jar"


Download = Callable[[Jar, Path], Path]
"""(jar, folder) -> the file; raises OSError or RuntimeError when it cannot be had."""


def locked_jars() -> list[Jar]:
    """The jars of the lock file in this package."""
    lock = tomllib.loads(resources.files("streaming").joinpath(LOCK_NAME).read_text(encoding="utf-8"))
    return [Jar(d["groupId"], d["artifactId"], d["version"], d["bytes"], d["sha256"]) for d in lock["dependencies"]]


def default_cache() -> Path:
    """Where the jars of this user are kept."""
    return platformdirs.user_cache_path("esrl-ray") / "kafka-jars"


def download(jar: Jar, folder: Path) -> Path:
    """Fetch one artifact with jgo from its default repository into a folder."""
    from jgo import MavenContext  # 0.3 s of imports that a warm start does not need

    context = MavenContext(repo_cache=folder, timeout=TIMEOUT_S)
    path: Path = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
    return path


def class_path(
    jars: Sequence[Jar] | None = None, *, cache: Path | None = None, say: Say = lambda _: None, fetch: Download = download
) -> list[Path]:
    """All jars on disk with the right content; two processes may call this at once.

    Args:
        jars: What is needed; default the lock file of this package.
        cache: Folder; default the user's cache.
        say: Told about the first fetch (44 MB) and its progress.
        fetch: How one jar is downloaded.

    Returns:
        One path per jar, in the lock's order.

    Raises:
        BrokerError: a jar cannot be fetched, or its sha256 is not the locked one.
    """
    jars = locked_jars() if jars is None else jars
    cache = default_cache() if cache is None else cache
    paths = [cache / jar.file_name for jar in jars]
    if not all(path.exists() for path in paths):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _only_one(cache / ".lock", say):
                _fetch_missing(jars, cache, say, fetch)
        except OSError as error:
            raise BrokerError(
                f"cannot keep Kafka's jars: {error}", str(cache), "make the folder writable, or set XDG_CACHE_HOME to one that is"
            ) from error
    for jar, path in zip(jars, paths, strict=True):
        _check(jar, path)
    return paths


def _check(jar: Jar, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != jar.sha256:
        raise BrokerError(
            f"{jar.file_name} has sha256 {found}, {LOCK_NAME} says {jar.sha256}",
            str(path),
            "delete this file and start again; it is then fetched anew",
        )


@contextmanager
def _only_one(path: Path, say: Say) -> Iterator[None]:
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that fetches Kafka's jars")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, and so does a crash


def _fetch_missing(jars: Sequence[Jar], cache: Path, say: Say, fetch: Download) -> None:
    missing = [jar for jar in jars if not (cache / jar.file_name).exists()]
    if not missing:
        return  # the other process was first
    incoming = cache / ".incoming"  # ours alone while we hold the lock; what a killed fetch left is partial
    shutil.rmtree(incoming, ignore_errors=True)
    total = sum(jar.num_bytes for jar in missing)
    say(f"fetching Kafka: {len(missing)} jars, {total / 1e6:.0f} MB, once per user, into {cache}")

    def get(jar: Jar) -> Jar:
        for attempt in range(TRIES):
            folder = incoming / f"{jar.artifact}-{attempt}"
            try:
                path = fetch(jar, folder)
                break
            except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
                problem = error
        else:
            raise BrokerError(
                f"cannot fetch {jar.group}:{jar.artifact}:{jar.version} after {TRIES} tries: {problem}",
                fix=f"check network and proxy; or copy the jars into {cache}; or name a running broker with --bootstrap-servers",
            ) from problem
        _check(jar, path)
        path.replace(cache / jar.file_name)
        return jar

    done_bytes, said_bytes = 0, 0
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        for number, jar in enumerate(pool.map(get, missing), 1):
            done_bytes += jar.num_bytes
            if done_bytes - said_bytes >= total / 5 or number == len(missing):
                said_bytes = done_bytes
                say(f"fetched {number} of {len(missing)} jars, {done_bytes / 1e6:.0f} of {total / 1e6:.0f} MB")
    shutil.rmtree(incoming, ignore_errors=True)
