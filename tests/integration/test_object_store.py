"""The step log in an S3 store: `make test-s3` installs a server of its own (moto) and runs this."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator

import pytest
from deltalake import DeltaTable

from esrl_ray.config import LogConfig, load_config
from esrl_ray.errors import Fenced
from esrl_ray.ports import free_ports
from streaming.erase import erase_user
from streaming.steplog import StepLog, list_workers, read_commits, read_newest, read_steps
from tests.unit.test_log_command import SPEC
from tests.unit.test_logfiles import NOW_MS, commit, content, tidy

SERVER = "ESRL_S3_SERVER"  # Python of an environment that has moto's server
START_S = 60.0

pytestmark = pytest.mark.skipif(SERVER not in os.environ, reason=f"needs an S3 server: make test-s3 (sets {SERVER})")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """URL of a server with the bucket `bucket`."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [os.environ[SERVER], "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_S
    try:
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=5).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None and time.monotonic() < deadline, f"moto does not answer on port {port}"
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def root(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`log_root` of a deployment whose log is in the store; the variables are all that an operator sets."""
    variables = {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    for name, value in {**variables, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    place = f"s3://bucket/{uuid.uuid4().hex}"
    root = load_config(None, [f"log.root={place}"]).log_root
    assert root == f"{place}/{SPEC.digest}"
    return root


def log_of(root: str, incarnation: str) -> StepLog:
    return StepLog(root, "w", incarnation, SPEC, LogConfig(tidy_every=10, keep_hours=0))


def test_a_worker_commits_cares_for_its_table_and_comes_back(root: str) -> None:
    assert list_workers(root) == [] and len(read_steps(root)) == 0
    log = log_of(root, "one")
    for n in range(9):
        commit(log, n)
    before = content(root)
    commit(log, 9)
    assert tidy(log) and content(root)[:9] == before and list_workers(root) == ["w"]
    assert len(DeltaTable(f"{root}/w").file_uris()) == 1
    successor = log_of(root, "two")
    restored = successor.restore()
    assert restored is not None and restored.commit == 9
    commit(successor, 10)
    with pytest.raises(Fenced, match=r"commit 10 of w follows commit 10 \(at s3://bucket/"):
        commit(log, 10)
    assert [n for n, _ in read_commits(root, "w", 8)] == [9, 10]
    assert len(read_newest(root, 1, lambda rows: rows["commit"].to_numpy() >= 0)) == len(read_steps(root)) == 9
    assert erase_user(root, "w", {"u"}, now_ms=NOW_MS, dry_run=False).rows == 18 and len(read_steps(root)) == 0


def test_two_that_pass_the_check_together_do_not_both_commit(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store itself refuses a second object of the same name: Delta's log entry of a version is put only if there is none."""
    old = log_of(root, "one")
    commit(old, 0)
    new = log_of(root, "two")

    def check_then_pause(self: DeltaTable) -> None:
        monkeypatch.setattr(DeltaTable, "update_incremental", update)
        commit(new, 1)

    update = DeltaTable.update_incremental
    monkeypatch.setattr(DeltaTable, "update_incremental", check_then_pause)
    with pytest.raises(Fenced, match="made by another incarnation two"):
        commit(old, 1)
    assert [len(rows) for _, rows in read_commits(root, "w")] == [2, 2]
