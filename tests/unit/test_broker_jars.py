"""The jars of the embedded broker: every byte is checked, two starts do not collide, errors say what to do."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from esrl_ray.errors import BrokerError
from streaming.jars import Jar, class_path, locked_jars


def _jar(name: str, content: bytes) -> Jar:
    return Jar("org.example", name, "1.0", len(content), hashlib.sha256(content).hexdigest())


JARS = [_jar(f"part-{n}", bytes([n]) * 1000) for n in range(8)]


class _Registry:
    """Serves the jars; counts what was asked for."""

    def __init__(self, *, broken: str = "", failures: int = 0) -> None:
        self.asked: list[str] = []
        self._broken, self._failures = broken, failures

    def __call__(self, jar: Jar, folder: Path) -> Path:
        self.asked.append(jar.artifact)
        if len(self.asked) <= self._failures:
            raise ConnectionError("no route")
        folder.mkdir(parents=True)
        path = folder / jar.file_name
        path.write_bytes(b"something else" if jar.artifact == self._broken else bytes([int(jar.artifact[-1])]) * 1000)
        return path


def test_the_lock_file_names_kafka_4_2_1_with_a_sha256_for_each_jar() -> None:
    jars = locked_jars()
    assert len(jars) == 46
    assert {j.version for j in jars if j.group == "org.apache.kafka"} == {"4.2.1"}
    assert all(len(j.sha256) == 64 and j.num_bytes > 0 for j in jars)


def test_jars_are_fetched_once_and_progress_is_said(tmp_path: Path) -> None:
    registry, said = _Registry(), list[str]()
    paths = class_path(JARS, cache=tmp_path, say=said.append, fetch=registry)
    assert [p.name for p in paths] == [j.file_name for j in JARS]
    assert said[0].startswith("fetching Kafka: 8 jars")
    assert said[-1].startswith("fetched 8 of 8")
    assert class_path(JARS, cache=tmp_path, fetch=registry) == paths
    assert sorted(registry.asked) == sorted(j.artifact for j in JARS)
    assert not (tmp_path / ".incoming").exists()


def test_a_fetch_is_tried_again_and_one_missing_jar_is_fetched_alone(tmp_path: Path) -> None:
    class_path(JARS, cache=tmp_path, fetch=_Registry(failures=2))
    (tmp_path / JARS[3].file_name).unlink()
    registry = _Registry()
    class_path(JARS, cache=tmp_path, fetch=registry)
    assert registry.asked == ["part-3"]


def test_no_network_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"cannot fetch org\.example:part-\d:1\.0 after 3 tries: no route: check network and proxy"):
        class_path(JARS, cache=tmp_path, fetch=_Registry(failures=1000))


def test_a_downloaded_jar_with_other_content_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"part-5-1\.0\.jar has sha256"):
        class_path(JARS, cache=tmp_path, fetch=_Registry(broken="part-5"))
    assert not (tmp_path / JARS[5].file_name).exists()


def test_a_cached_jar_that_changed_is_refused(tmp_path: Path) -> None:
    class_path(JARS, cache=tmp_path, fetch=_Registry())
    (tmp_path / JARS[2].file_name).write_bytes(b"tampered")
    with pytest.raises(BrokerError, match=r"part-2-1\.0\.jar has sha256 .*delete this file and start again"):
        class_path(JARS, cache=tmp_path, fetch=_Registry())


def test_two_starts_at_once_fetch_every_jar_once(tmp_path: Path) -> None:
    registry, at_start = _Registry(), threading.Barrier(2)

    def start() -> None:
        at_start.wait()
        assert len(class_path(JARS, cache=tmp_path, fetch=registry)) == len(JARS)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(registry.asked) == sorted(j.artifact for j in JARS)
