"""The replay of a KuaiRand log: which requests, which feedback, in which order; and the evaluation on days that are not replayed."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from esrl_ray.cli.importing import import_files
from esrl_ray.cli.kuairand_files import write_files
from esrl_ray.cli.logged import read_log
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError, RequestError
from esrl_ray.policy.policy import Policy
from esrl_ray.simulation.kuairand import KuaiRandTraffic, evaluate_kuairand, prepare
from esrl_ray.simulation.kuairand_replay import KuaiRandInput, default_cache
from serve.schemas import parse
from streaming.steplog import read_steps
from tests.unit.test_kuairand_data import write_folder

CONFIG = Path(__file__).parents[2] / "configs" / "kuairand.yaml"
FAST = ("demo.requests_per_s=4000", "demo.feedback_delay_s=0", "demo.late_s=0", "demo.duplicate_share=0")


def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def deployment() -> Config:
    """configs/kuairand.yaml at a high rate."""
    return load_config(CONFIG, FAST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world; `cache` inside holds its upstream scores."""
    return write_folder(tmp_path_factory.mktemp("kuairand"))


@pytest.fixture(scope="module")
def real_input(deployment: Config, folder: Path) -> KuaiRandInput:
    """The small world as input."""
    return KuaiRandInput(deployment, folder, cache=folder / "cache", say=quiet)


def test_every_request_passes_the_checks_of_the_endpoint(deployment: Config, real_input: KuaiRandInput) -> None:
    spec = deployment.spec.build()
    for i in range(len(real_input.lists)):
        parsed = parse(msgspec.json.encode(real_input.request(i)), spec, deployment)
        n = len(parsed.request.candidates)
        assert 2 <= n <= 8
        assert parsed.list_size == n // 2


def test_a_list_is_the_first_exposures_of_one_user_and_block_without_repeats_and_blocks_follow_each_other(
    real_input: KuaiRandInput,
) -> None:
    x = real_input.log.exposures
    blocks = [int(x.block[rows[0]]) for rows in real_input.lists]
    assert blocks == sorted(blocks) and set(blocks) == {1, 2, 3, 4}
    seen = set()
    for rows in real_input.lists:
        unit = np.flatnonzero((x.user == x.user[rows[0]]) & (x.block == x.block[rows[0]]))
        firsts = list(dict.fromkeys(x.video[unit].tolist()))[:8]
        assert x.video[rows].tolist() == firsts
        seen.add((int(x.user[rows[0]]), int(x.block[rows[0]])))
    assert len(seen) == len(real_input.lists)


def test_within_a_block_users_come_by_their_first_exposure(real_input: KuaiRandInput) -> None:
    x = real_input.log.exposures
    keys = [(int(x.block[rows[0]]), int(x.time_ms[rows[0]])) for rows in real_input.lists]
    assert keys == sorted(keys)


def test_behaviours_are_those_that_were_logged_for_the_first_exposure_of_a_shown_item(real_input: KuaiRandInput) -> None:
    x = real_input.log.exposures
    rows = real_input.lists[3]
    items = [str(v) for v in real_input.log.video_ids[x.video[rows]]]
    told = {(item, behaviour): value for item, behaviour, value in real_input.behaviours(3, items[:2])}
    for row, item in zip(rows[:2], items[:2], strict=True):
        logged = {"watch_s": x.play_s[row], "click": x.click[row], "like": x.like[row], "valid": x.valid[row], "finish": x.finish[row]}
        for behaviour, value in logged.items():
            assert told.get((item, behaviour), 0.0) == pytest.approx(float(value)), (item, behaviour)
    assert {item for item, _ in told} <= set(items[:2])


class Endpoint:
    """Ranks candidates in the reverse order of the request, after a moment."""

    def __init__(self, *, fails: frozenset[int] = frozenset(), error: type[Exception] = ConnectionError) -> None:
        self.requests: list[dict[str, Any]] = []
        self.running: Counter[str] = Counter()
        self._numbers, self._fails, self._error = itertools.count(), fails, error

    async def __call__(self, body: bytes) -> tuple[SimpleNamespace, Mapping[str, str]]:
        request = msgspec.json.decode(body)
        number = next(self._numbers)
        self.requests.append(request)
        self.running[request["user_id"]] += 1
        assert self.running[request["user_id"]] == 1, "two lists of one user at once"
        await asyncio.sleep(0.001)
        self.running[request["user_id"]] -= 1
        if number in self._fails:
            raise self._error("no")
        ranked = [c["item_id"] for c in reversed(request["candidates"])]
        return SimpleNamespace(decision_id=f"d{number}-{request['request_id']}", item_ids=ranked), {
            "x-replica": "r",
            "x-policy-version": "1",
        }


def played(config: Config, folder: Path, endpoint: Endpoint) -> tuple[KuaiRandTraffic, list[dict[str, Any]]]:
    """The whole log through an endpoint; the clock advances by 5 ms a reading."""
    sent: list[dict[str, Any]] = []
    clock = itertools.count(1_700_000_000_000, 5)

    async def run() -> KuaiRandTraffic:
        traffic = KuaiRandTraffic(
            config, folder, fuse=endpoint, send=lambda **f: sent.append(f), clock_ms=lambda: next(clock), cache=folder / "cache"
        )
        await traffic.run()
        await traffic.stop()
        return traffic

    return asyncio.run(run()), sent


def test_the_log_is_played_once_and_each_list_gets_the_feedback_of_its_shown_items_only(
    deployment: Config, folder: Path, real_input: KuaiRandInput
) -> None:
    endpoint = Endpoint()
    traffic, sent = played(deployment, folder, endpoint)
    status = traffic.status(whole=True)
    count = len(real_input.lists)
    assert (status["requests"], status["decisions"], status["requests_failed"], status["finished"]) == (count, count, 0, True)
    assert sorted(r["request_id"] for r in endpoint.requests) == sorted(f"kuairand-{i}" for i in range(count))
    assert len(status["latencies_ms"]) == count and status["error"] is None
    feedback = defaultdict(list)
    for event in sent:
        feedback[event["decision_id"].split("-", 1)[1]].append(event)
    assert len({event["event_id"] for event in sent}) == len(sent) == status["feedback"]
    for i in range(count):
        request, events = real_input.request(i), feedback[f"kuairand-{i}"]
        shown = [c["item_id"] for c in reversed(request["candidates"])][: request["list_size"]]
        expected = Counter((item, behaviour) for item, behaviour, _ in real_input.behaviours(i, shown))
        assert Counter((e["item_id"], e["behaviour"]) for e in events if e["behaviour"] != "shown") == expected
        assert [e["item_id"] for e in events if e["behaviour"] == "shown"] == [None]
        decided = next(e["event_time_ms"] for e in events if e["behaviour"] == "shown")
        assert all(0 <= e["event_time_ms"] - decided <= 2_000 for e in events)
    assert not any(e["behaviour"] == "leave" for e in sent)


def test_a_session_is_the_successive_blocks_of_one_user_in_order(deployment: Config, folder: Path, real_input: KuaiRandInput) -> None:
    endpoint = Endpoint()
    played(deployment, folder, endpoint)
    sessions = defaultdict(list)
    for request in endpoint.requests:
        sessions[request["session_id"]].append((request["user_id"], int(request["request_id"].split("-")[1])))
    assert max(map(len, sessions.values())) == 4
    for session in sessions.values():
        assert len({user for user, _ in session}) == 1
        blocks = [int(real_input.log.exposures.block[real_input.lists[i][0]]) for _, i in session]
        assert blocks == sorted(set(blocks))


def test_a_request_that_fails_is_counted_and_gets_no_feedback_but_a_refusal_ends_the_traffic(deployment: Config, folder: Path) -> None:
    traffic, sent = played(deployment, folder, Endpoint(fails=frozenset({2})))
    status = traffic.status()
    assert (status["requests_failed"], status["requests"] - status["decisions"]) == (1, 1)
    assert not any(event["decision_id"].startswith("d2-") for event in sent)
    with pytest.raises(RequestError):
        played(deployment, folder, Endpoint(fails=frozenset({2}), error=RequestError))


def test_stop_ends_the_replay_before_the_end_and_sends_what_is_waiting(folder: Path) -> None:
    config = load_config(CONFIG, ["demo.requests_per_s=50", "demo.feedback_delay_s=60"])
    endpoint, sent = Endpoint(), list[dict[str, Any]]()
    clock = itertools.count(1_700_000_000_000, 200)

    async def run() -> dict[str, Any]:
        traffic = KuaiRandTraffic(
            config, folder, fuse=endpoint, send=lambda **f: sent.append(f), clock_ms=lambda: next(clock), cache=folder / "cache"
        )
        running = asyncio.create_task(traffic.run())
        while traffic.counts.decisions < 10:
            await asyncio.sleep(0.005)
        await traffic.stop()
        await running
        return traffic.status()

    status = asyncio.run(run())
    assert 10 <= status["requests"] < 150 and not status["finished"]
    assert status["feedback_waiting"] == 0
    assert {e["decision_id"].split("-", 1)[1] for e in sent} == {r["request_id"] for r in endpoint.requests}


def test_frozen_policies_are_judged_on_days_that_no_request_has(deployment: Config, folder: Path, real_input: KuaiRandInput) -> None:
    pairs = real_input.test_pairs()
    x = real_input.log.exposures
    assert len(pairs.labels) == int((x.block == 5).sum())
    assert not {int(x.block[row]) for rows in real_input.lists for row in rows} & {0, 5}
    clicks = np.zeros(deployment.spec.build().num_actions, np.float32)
    clicks[0] = 1.0
    policies = [
        Policy.static(deployment.spec.build()).numbered(1),
        Policy.static(deployment.spec.build(), clicks, note="click").numbered(2),
    ]
    table = evaluate_kuairand(policies, deployment, folder, cache=folder / "cache", resamples=50)
    assert list(table) == ["user_block", "user_block_difference", "user_tab", "user_tab_difference"]
    assert [len(row) for row in table.values()] == [2, 1, 2, 1]
    best = table["user_block"][1]
    assert best.gauc is not None and best.gauc > 0.6  # videos of the small world differ in quality


def test_the_state_of_a_test_pair_is_the_one_that_a_request_would_carry(deployment: Config, real_input: KuaiRandInput) -> None:
    # The same code makes both; a replayed block asked for as pairs must give the numbers of its request.
    spec = deployment.spec.build()
    i = 5
    parsed = parse(msgspec.json.encode(real_input.request(i)), spec, deployment)
    pairs = real_input.pairs(real_input.lists[i])
    assert np.allclose(parsed.states, pairs.states) and np.allclose(parsed.scores, pairs.scores)
    assert np.array_equal(parsed.categorical, pairs.categorical)


def test_prepare_says_how_long_the_replay_lasts(deployment: Config, folder: Path, real_input: KuaiRandInput) -> None:
    said: list[str] = []
    prepare(deployment, folder, say=said.append, cache=folder / "cache")
    assert f"{len(real_input.lists)} requests" in said[-1]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("spec.user_features=[age]", "spec.user_features"),
        ("spec.categorical_features=[{name: tab, cardinality: 4, side: context}]", "spec.categorical_features"),
        ("reward.behaviours=[{name: share}]", "reward.behaviours"),
    ],
)
def test_a_deployment_that_names_what_the_log_does_not_have_is_refused(folder: Path, change: str, key: str) -> None:
    overrides = [change, *(["reward.groups=[{name: a, expression: share}]"] if "share" in change else [])]
    with pytest.raises(ConfigError) as caught:
        KuaiRandInput(load_config(CONFIG, overrides), folder, cache=folder / "cache", say=quiet)
    assert key in str(caught.value)


def test_a_user_with_one_video_in_a_block_makes_no_request(tmp_path: Path, deployment: Config) -> None:
    def one_video(made: dict[str, pa.Table]) -> None:
        log = made["log_standard_small"]
        position = log.column_names.index("video_id")
        made["log_standard_small"] = log.set_column(position, "video_id", pa.array([100] * log.num_rows))

    assert KuaiRandInput(deployment, write_folder(tmp_path, one_video), cache=tmp_path / "cache", say=quiet).lists == []


def test_the_cache_lies_in_the_folder_of_this_project() -> None:
    assert default_cache().parts[-2:] == ("esrl-ray", "kuairand")


def test_an_import_takes_all_files_of_a_log(deployment: Config, folder: Path, real_input: KuaiRandInput, tmp_path: Path) -> None:
    config = deployment.model_copy(update={"run": deployment.run.model_copy(update={"dir": str(tmp_path)})})
    decisions, events = write_files(config, folder, tmp_path / "files", say=quiet, cache=folder / "cache")
    root = str(tmp_path / "log" / config.spec.build().digest)
    paths = (tmp_path / "files" / f"{name}.jsonl" for name in ("decisions", "feedback"))
    ledger = import_files(config, root, *paths, worker="import-0", rejects=tmp_path / "rejects.jsonl", say=quiet)
    assert ledger["decisions"]["joined"] == decisions == len(real_input.lists)
    assert ledger["feedback"]["joined"] == events
    steps = read_log(str(tmp_path), config).steps
    for i, rows in enumerate(real_input.lists):  # both are in order of time
        shown = len(rows) // 2 if len(rows) > 1 else 1
        assert steps.columns["shown"][i].sum() == shown
        np.testing.assert_allclose(steps.columns["behaviours"][i, :shown], real_input.logged(rows[:shown]), atol=1e-3)
    assert set(read_steps(root)["ended"].to_pylist()) <= {"has_next", "truncated"}
