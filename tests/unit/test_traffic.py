"""The traffic with an endpoint of a few lines: what it asks, what it tells, when, and what it counts."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from esrl_ray.config import Config, DemoConfig, load_config
from esrl_ray.errors import RequestError
from esrl_ray.simulation.traffic import Counts, Outbox, SimulatedTraffic
from serve.schemas import parse

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
START_MS = 1_000_000
LATENCY_S = 0.012
SETTINGS = ("demo.requests_per_s=30", "demo.late_share=0.05", "demo.duplicate_share=0.05", "demo.vanish_share=0.3")


class VirtualSelector(selectors.DefaultSelector):
    """Does not wait: it moves the loop's clock on by the time that it should have waited."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Ready files, at once."""
        self.now_s += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everything waits: a run is quick and always the same."""

    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds since the loop began."""
        return self._virtual.now_s


@dataclass
class Answer:
    """Ranks candidates as they come."""

    decision_id: str
    item_ids: list[str]


@dataclass
class Played:
    """What went in and out of one run of the traffic."""

    config: Config
    status: dict[str, Any] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    feedback: list[dict[str, Any]] = field(default_factory=list)
    sent_ms: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, behaviour: str) -> list[dict[str, Any]]:
        """Feedback of one behaviour, each event once."""
        return list({f["event_id"]: f for f in self.feedback if f["behaviour"] == behaviour}.values())


def play_for(seconds: float, *overrides: str, refuse: Callable[[dict[str, Any]], None] = lambda request: None) -> Played:
    """Run the traffic for some seconds of virtual time.

    Args:
        seconds: How long.
        overrides: Of the demo's configuration.
        refuse: Called with each request; raises to let it fail.
    """
    config = load_config(DEMO, [*SETTINGS, *overrides])
    played = Played(config)

    def clock_ms() -> int:
        return START_MS + int(1e3 * asyncio.get_running_loop().time())

    async def fuse(body: bytes) -> tuple[Answer, Mapping[str, str]]:
        request = msgspec.json.decode(body)
        played.requests.append(request)
        played.bodies.append(body)
        await asyncio.sleep(LATENCY_S)
        refuse(request)
        items = [candidate["item_id"] for candidate in request["candidates"]]
        return Answer(f"d-{request['request_id']}", items), {"x-policy-version": "3", "x-replica": "r1"}

    def send(**feedback: Any) -> None:
        played.feedback.append(feedback)
        played.sent_ms.append(clock_ms())

    async def main() -> None:
        traffic = SimulatedTraffic(config, fuse=fuse, send=send, clock_ms=clock_ms)
        running = asyncio.create_task(traffic.run())
        await asyncio.wait([running], timeout=seconds)
        played.seconds = (clock_ms() - START_MS) / 1e3
        if not running.done():
            await traffic.stop()
        await running
        played.status = traffic.status(whole=True)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    return played


@pytest.fixture(scope="module")
def played() -> Played:
    return play_for(60.0)


def test_the_rate_of_requests_is_held_from_the_start(played: Played) -> None:
    assert len(played.requests) == pytest.approx(30 * played.seconds, rel=0.03)
    early = [event for event in played.of("shown") if event["event_time_ms"] < START_MS + 3000]
    assert len(early) == pytest.approx(30 * 3, rel=0.1)
    assert played.status["requests"] == played.status["decisions"] == len(played.requests)
    assert played.status["requests_failed"] == 0 and played.status["error"] is None
    assert played.status["latencies_ms"] == pytest.approx([1e3 * LATENCY_S] * len(played.requests), abs=1.5)


def test_every_request_is_one_that_serving_accepts(played: Played) -> None:
    spec = played.config.spec.build()
    for body in played.bodies[:: max(1, len(played.bodies) // 50)]:
        parsed = parse(body, spec, played.config)
        assert parsed.states.shape == (played.config.simulation.num_candidates, spec.num_features)
        assert parsed.list_size == played.config.serve.list_size


def test_requests_of_a_session_come_one_after_the_other_with_time_to_think(played: Played) -> None:
    ids = [request["request_id"] for request in played.requests]
    assert len(set(ids)) == len(ids)
    shown: dict[str, list[int]] = defaultdict(list)
    for event in played.of("shown"):
        shown[event["session_id"]].append(event["event_time_ms"])
    low_s = played.config.demo.think_time_s[0]
    times = [sorted(moments) for moments in shown.values() if len(moments) > 1]
    assert times
    assert all(b - a >= 1e3 * low_s - 1 for moments in times for a, b in itertools.pairwise(moments))


def test_every_list_is_shown_once_and_feedback_is_about_its_items(played: Played) -> None:
    shown = Counter(event["decision_id"] for event in played.of("shown"))
    assert set(shown) == {f"d-{request['request_id']}" for request in played.requests}
    assert set(shown.values()) == {1}
    items = {f"d-{r['request_id']}": [c["item_id"] for c in r["candidates"][:5]] for r in played.requests}
    at = {event["decision_id"]: event["event_time_ms"] for event in played.of("shown")}
    longest_ms = 1e3 * played.config.demo.think_time_s[1]
    for event in played.feedback:
        if event["behaviour"] in {"shown", "leave"}:
            assert event["item_id"] is None
        else:
            assert event["item_id"] in items[event["decision_id"]]
            assert event["value"] > 0
        assert 0 <= event["event_time_ms"] - at[event["decision_id"]] <= longest_ms
    assert {b.name for b in played.config.reward.behaviours} - {"forward", "dislike"} <= {f["behaviour"] for f in played.feedback}


def test_only_repeated_feedback_has_an_id_twice_and_then_it_is_the_same(played: Played) -> None:
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in played.feedback:
        by_id[event["event_id"]].append(event)
    repeated = [events for events in by_id.values() if len(events) > 1]
    assert all(len(events) == 2 and events[0] == events[1] for events in repeated)
    assert len(repeated) == played.status["feedback_twice"] > 0
    assert played.status["feedback"] == len(played.feedback)
    assert played.status["feedback_late"] == pytest.approx(0.05 * len(by_id), rel=0.3)


def test_nothing_is_told_before_it_happened_while_the_traffic_runs(played: Played) -> None:
    before_end = [(f, at) for f, at in zip(played.feedback, played.sent_ms, strict=True) if at < START_MS + 1e3 * (played.seconds - 1)]
    assert before_end
    assert all(at >= f["event_time_ms"] for f, at in before_end)


def test_a_session_that_ended_left_or_vanished_and_asks_nothing_more(played: Played) -> None:
    left = {event["session_id"] for event in played.of("leave")}
    started = played.status["sessions_started"]
    ended = started - played.status["sessions_running"]
    assert {request["session_id"] for request in played.requests} >= left
    assert 0 < len(left) < ended
    assert len(left) / ended == pytest.approx(0.7, abs=0.2)
    last = {request["session_id"]: f"d-{request['request_id']}" for request in played.requests}
    assert all(last[event["session_id"]] == event["decision_id"] for event in played.of("leave"))


def test_after_stop_all_feedback_is_sent(played: Played) -> None:
    assert played.status["feedback_waiting"] == 0


def test_the_same_seed_tells_the_same_whatever_the_timing(played: Played) -> None:
    again = play_for(20.0, "demo.requests_per_s=15")
    first = {f["event_id"]: (f["decision_id"], f["behaviour"], f["item_id"], f["value"]) for f in played.feedback}
    second = {f["event_id"]: (f["decision_id"], f["behaviour"], f["item_id"], f["value"]) for f in again.feedback}
    common = set(first) & set(second)
    assert len(common) > 100
    assert all(first[event] == second[event] for event in common)


def test_a_request_that_fails_for_good_is_counted_and_ends_its_session() -> None:
    failing: set[str] = set()

    def refuse(request: dict[str, Any]) -> None:
        if request["session_id"].endswith("3"):
            failing.add(request["session_id"])
            raise ConnectionError("no 200 after all tries")

    played = play_for(20.0, refuse=refuse)
    asked = Counter(request["session_id"] for request in played.requests)
    assert failing and all(asked[session] == 1 for session in failing)
    assert played.status["requests_failed"] == len(failing)
    assert played.status["decisions"] == len(played.requests) - len(failing)
    assert not failing & {f["session_id"] for f in played.feedback}
    assert played.status["error"] is None


def test_a_refused_request_ends_the_traffic_and_says_why() -> None:
    def refuse(request: dict[str, Any]) -> None:
        raise RequestError("3 scores, expected 5", "candidates[0].scores")

    played = play_for(20.0, refuse=refuse)
    assert "3 scores, expected 5" in played.status["error"]
    assert played.seconds < 20.0
    assert not played.feedback


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms


def piece(number: int, at_ms: int) -> dict[str, Any]:
    """One piece of feedback."""
    return {"event_id": f"e{number}", "behaviour": "click", "event_time_ms": at_ms}


def test_feedback_waits_for_its_delay_and_late_feedback_longer() -> None:
    clock, sent = Clock(), list[int]()
    outbox = Outbox(
        DemoConfig(feedback_delay_s=2.0, late_share=0.2, late_s=20.0, duplicate_share=0.0),
        send=lambda **f: sent.append(clock.now_ms - f["event_time_ms"]),
        clock_ms=clock,
    )
    for number in range(2000):
        outbox.put(**piece(number, START_MS))
    while outbox.status()["feedback_waiting"]:
        clock.now_ms += 100
        outbox.post()
    prompt, late = [d for d in sent if d <= 2100], [d for d in sent if d > 2100]
    assert sum(prompt) / len(prompt) == pytest.approx(1050, rel=0.1)
    assert min(late) >= 20_000 and max(late) <= 22_100
    assert len(late) == outbox.num_late == pytest.approx(400, rel=0.2)


def test_everything_at_once_sends_each_piece_and_each_repetition() -> None:
    sent: list[str] = []
    outbox = Outbox(DemoConfig(duplicate_share=1.0), send=lambda **f: sent.append(f["event_id"]), clock_ms=Clock())
    for number in range(3000):
        outbox.put(**piece(number, START_MS + 5000))
    outbox.post()
    assert sent == []
    outbox.post(everything=True)
    assert Counter(Counter(sent).values()) == {2: 3000}
    assert outbox.status() == {"feedback": 6000, "feedback_twice": 3000, "feedback_late": outbox.num_late, "feedback_waiting": 0}


def reply(counts: Counts, version: int, *, sent_ms: int, now_ms: int, replica: str = "a") -> None:
    """A reply of one replica."""
    counts.replied({"x-policy-version": str(version), "x-replica": replica}, sent_ms=sent_ms, now_ms=now_ms)


def test_a_version_that_goes_down_at_a_replica_is_counted() -> None:
    counts = Counts()
    reply(counts, 1, sent_ms=100, now_ms=110)
    reply(counts, 2, sent_ms=120, now_ms=130)
    reply(counts, 1, sent_ms=140, now_ms=150)
    assert counts.version_regressions == 1
    reply(counts, 2, sent_ms=160, now_ms=170)
    assert counts.version_regressions == 1


def test_replies_that_overtake_each_other_and_other_replicas_are_no_regression() -> None:
    counts = Counts()
    reply(counts, 2, sent_ms=105, now_ms=110)
    reply(counts, 1, sent_ms=100, now_ms=111)  # was asked before version 2 was seen
    reply(counts, 1, sent_ms=200, now_ms=210, replica="b")
    assert counts.version_regressions == 0
    assert counts.served == {"a": {2: 110, 1: 111}, "b": {1: 210}}
    assert counts.first_decision_ms == 110
    assert counts.latencies_ms == [5.0, 11.0, 10.0]
