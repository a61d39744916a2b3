"""The traffic of a run: sessions that ask for lists over HTTP and tell over Kafka what their users did.

`SimulatedTraffic` plays users with a known truth. `Counts` and `Outbox` serve any traffic: what was seen of the endpoint, and feedback that
is sent late, twice, or much too late. Clock, client and producer are arguments.
"""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from esrl_ray.config import Config, DemoConfig
from esrl_ray.errors import EsrlError
from esrl_ray.simulation.draws import uniform
from esrl_ray.simulation.users import BEHAVIOURS, Page, Sessions, World

TICK_S = 0.02
MAX_IN_FLIGHT = 64
BLOCK = 1024
DIGITS = 5
"""Decimals of the numbers in a request: what a user's service would send, and half the bytes of all digits."""
_USER, _THINK, _MOMENT, _DELAY, _LATE, _TWICE, _VANISH = range(100, 107)


class Reply(Protocol):
    """What the endpoint answers: `serve.schemas.FuseReply`."""

    @property
    def decision_id(self) -> str:
        """Of the decision."""

    @property
    def item_ids(self) -> list[str]:
        """Ranked, best first."""


Fuse = Callable[[bytes], Awaitable[tuple[Any, Mapping[str, str]]]]
"""Sends a request's JSON; raises an `EsrlError` when it is refused, anything else when there is no 200 after all tries."""
Send = Callable[..., None]
"""Sends feedback: event_id, decision_id, session_id, behaviour, event_time_ms, item_id, value."""


class Counts:
    """What the traffic saw of the endpoint."""

    def __init__(self) -> None:
        self.requests = self.requests_failed = self.decisions = 0
        self.sessions_started = self.sessions_running = 0
        self.version_regressions = 0
        self.first_decision_ms = 0
        self.latencies_ms: list[float] = []
        self.served: dict[str, dict[int, int]] = {}  # replica -> version -> first time, epoch ms
        self._rises: dict[str, tuple[list[int], list[int]]] = {}  # replica -> times and versions at which its version rose

    def replied(self, headers: Mapping[str, str], *, sent_ms: int, now_ms: int) -> None:
        """Count a decision.

        A version counts as having gone down when it is lower than one that the same replica had already answered with before this
        request was sent: replies that overtake each other are no regression.
        """
        self.decisions += 1
        self.first_decision_ms = self.first_decision_ms or now_ms
        self.latencies_ms.append(float(now_ms - sent_ms))
        replica, version = headers["x-replica"], int(headers["x-policy-version"])
        self.served.setdefault(replica, {}).setdefault(version, now_ms)
        times, versions = self._rises.setdefault(replica, ([], []))
        before = bisect_left(times, sent_ms)
        if before and version < versions[before - 1]:
            self.version_regressions += 1
        if not versions or version > versions[-1]:
            times.append(now_ms)
            versions.append(version)

    def status(self, *, whole: bool) -> dict[str, Any]:
        """Numbers so far; `whole` adds every latency."""
        recent = self.latencies_ms if whole else self.latencies_ms[-1000:]
        return {
            "requests": self.requests,
            "requests_failed": self.requests_failed,
            "decisions": self.decisions,
            "sessions_started": self.sessions_started,
            "sessions_running": self.sessions_running,
            "version_regressions": self.version_regressions,
            "first_decision_ms": self.first_decision_ms,
            "latencies_ms": recent if whole else [],
            "latency_p99_ms": float(np.quantile(recent, 0.99)) if recent else None,
            "served": {replica: dict(seen) for replica, seen in self.served.items()},
        }


class Outbox:
    """Feedback on its way: each piece is sent some time after it happened, some much later, some twice.

    Args:
        config: Delays and shares.
        send: Takes the fields of one piece of feedback.
        clock_ms: Wall clock.
    """

    def __init__(self, config: DemoConfig, *, send: Send, clock_ms: Callable[[], int]) -> None:
        self._config, self._send, self._clock_ms = config, send, clock_ms
        self._due: list[tuple[int, int, dict[str, Any]]] = []
        self._number = 0
        self._chances: list[list[float]] = []
        self.num_sent = self.num_twice = self.num_late = 0

    def put(self, **feedback: Any) -> None:
        """Take one piece of feedback that happened (or will) at its `event_time_ms`."""
        config, n = self._config, self._number
        self._number += 1
        if n % BLOCK == 0:  # one draw at a time costs 50 times as much
            self._chances = uniform(config.seed, np.arange(n, n + BLOCK)[:, None], np.array([_DELAY, _LATE, _TWICE])).tolist()
        wait, late, twice = self._chances[n % BLOCK]
        delay_s = config.feedback_delay_s * wait + (config.late_s if late < config.late_share else 0.0)
        self.num_late += late < config.late_share
        times = 2 if twice < config.duplicate_share else 1
        self.num_twice += times - 1
        for again in range(times):
            due = feedback["event_time_ms"] + int(1e3 * delay_s) + 500 * again
            heapq.heappush(self._due, (due, 2 * n + again, feedback))

    def post(self, *, everything: bool = False) -> None:
        """Send what is due; `everything` does not wait any longer."""
        now_ms = self._clock_ms()
        while self._due and (everything or self._due[0][0] <= now_ms):
            self._send(**heapq.heappop(self._due)[2])
            self.num_sent += 1

    def status(self) -> dict[str, Any]:
        """Numbers so far."""
        return {
            "feedback": self.num_sent,
            "feedback_twice": self.num_twice,
            "feedback_late": self.num_late,
            "feedback_waiting": len(self._due),
        }


class SimulatedTraffic:
    """Concurrent sessions of the simulator, as many as it takes for the wanted rate of requests.

    Args:
        config: World, rate, times and shares.
        fuse: Sends a request.
        send: Sends feedback.
        clock_ms: Wall clock.
    """

    def __init__(self, config: Config, *, fuse: Fuse, send: Send, clock_ms: Callable[[], int]) -> None:
        self._config, self._demo, self._fuse, self._clock_ms = config, config.demo, fuse, clock_ms
        self._world = World(config, seed=config.demo.seed)
        self._sessions = self._world.start(np.arange(0), np.arange(0))
        self._due: list[tuple[int, int]] = []  # (epoch ms, session)
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._stop = asyncio.Event()
        self.counts, self.outbox = Counts(), Outbox(config.demo, send=send, clock_ms=clock_ms)

    async def run(self) -> None:
        """Play until `stop`; then what is under way is finished and all feedback is sent at once."""
        tokens, last_ms = 0.0, self._clock_ms()
        while not self._stop.is_set():
            await asyncio.sleep(TICK_S)
            now_ms = self._clock_ms()
            tokens = min(tokens + self._demo.requests_per_s * (now_ms - last_ms) / 1e3, self._demo.requests_per_s)
            last_ms = now_ms
            wanted = max(0, min(int(tokens), MAX_IN_FLIGHT - self._in_flight))
            rows: list[int] = []
            while self._due and self._due[0][0] <= now_ms and len(rows) < wanted:
                rows.append(heapq.heappop(self._due)[1])
            rows += self._begin(wanted - len(rows))
            tokens -= len(rows)
            if rows:
                self._in_flight += len(rows)
                task = asyncio.create_task(self._turn(np.array(rows)))
                self._tasks.add(task)
                task.add_done_callback(self._finished)
            self.outbox.post()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # `_finished` has noted them
        self.outbox.post(everything=True)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            self._stop.set()

    _error: BaseException | None = None

    async def stop(self) -> None:
        """Ask `run` to end; raises what ended it before."""
        self._stop.set()
        if self._error is not None:
            raise self._error

    def status(self, *, whole: bool = False) -> dict[str, Any]:
        """Numbers so far, and the error that ended the traffic."""
        error = None if self._error is None else repr(self._error)
        return {**self.counts.status(whole=whole), **self.outbox.status(), "finished": False, "error": error}

    def _begin(self, count: int) -> list[int]:
        """Start sessions; returns their rows."""
        if count <= 0:
            return []
        first = len(self._sessions.ids)
        ids = np.arange(first, first + count)
        users = (uniform(self._demo.seed, ids, _USER) * self._world.num_users).astype(np.int64)
        self._sessions = self._sessions.extend(self._world.start(ids, users))
        self.counts.sessions_started += count
        self.counts.sessions_running += count
        return ids.tolist()

    async def _turn(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """One page of some sessions: ask, show, respond."""
        try:
            part = self._sessions.take(rows)
            page = self._world.candidates(part)
            asked = await asyncio.gather(*(self._ask(body) for body in self._bodies(part, page)))
            answered = np.array([i for i, answer in enumerate(asked) if answer is not None], np.int64)
            self.counts.sessions_running -= len(rows) - len(answered)
            if len(answered):
                self._respond(rows[answered], part.take(answered), [a for a in asked if a is not None])
        finally:
            self._in_flight -= len(rows)

    async def _ask(self, body: bytes) -> tuple[Reply, int] | None:
        """Send one request; None when it failed for good, which ends the session."""
        sent_ms = self._clock_ms()
        self.counts.requests += 1
        try:
            reply, headers = await self._fuse(body)
        except EsrlError:  # a refusal: our request is wrong, and so would be the next ones
            raise
        except Exception:  # whatever the client raises when there is no 200 after all tries
            self.counts.requests_failed += 1
            return None
        now_ms = self._clock_ms()
        self.counts.replied(headers, sent_ms=sent_ms, now_ms=now_ms)
        return reply, now_ms

    def _bodies(self, part: Sessions, page: Page) -> list[bytes]:
        """One request's JSON for each session."""
        user, context = np.round(page.user_features, DIGITS).tolist(), np.round(page.context_features, DIGITS).tolist()
        features, scores = np.round(page.item_features.astype(float), DIGITS).tolist(), np.round(page.scores.astype(float), DIGITS).tolist()
        items = page.items.tolist()
        return [
            msgspec.json.encode(
                {
                    "request_id": f"r{self._demo.seed}-{part.ids[i]}-{part.page[i]}",
                    "session_id": f"s{self._demo.seed}-{part.ids[i]}",
                    "user_id": f"u{part.users[i]}",
                    "user_features": user[i],
                    "context_features": context[i],
                    "candidates": [
                        {"item_id": str(item), "features": f, "scores": s}
                        for item, f, s in zip(items[i], features[i], scores[i], strict=True)
                    ],
                }
            )
            for i in range(len(items))
        ]

    def _respond(self, rows: np.ndarray[Any, np.dtype[np.int64]], part: Sessions, asked: Sequence[tuple[Reply, int]]) -> None:
        """The users look at their lists; their feedback goes into the outbox, their next page onto the calendar."""
        shown = np.array([[int(item) for item in reply.item_ids[: self._config.serve.list_size]] for reply, _ in asked])
        pages = part.page.copy()
        behaviours, left = self._world.respond(part, shown)
        self._sessions.put(rows, part)
        low, high = self._demo.think_time_s
        think_ms = 1e3 * (low + (high - low) * uniform(self._demo.seed, part.ids, pages, _THINK))
        moments = uniform(self._demo.seed, part.ids[:, None], pages[:, None], np.arange(shown.shape[1])[None], _MOMENT)
        vanish = uniform(self._demo.seed, part.ids, _VANISH) < self._demo.vanish_share
        for i, (reply, now_ms) in enumerate(asked):
            session, event = f"s{self._demo.seed}-{part.ids[i]}", f"e{self._demo.seed}-{part.ids[i]}-{pages[i]}"
            common = {"decision_id": reply.decision_id, "session_id": session}
            self.outbox.put(event_id=f"{event}-shown", behaviour="shown", event_time_ms=now_ms, item_id=None, value=1.0, **common)
            for j, b in zip(*np.nonzero(behaviours[i]), strict=True):
                self.outbox.put(
                    event_id=f"{event}-{j}-{b}",
                    behaviour=BEHAVIOURS[b],
                    event_time_ms=now_ms + int(think_ms[i] * moments[i, j]),
                    item_id=reply.item_ids[j],
                    value=round(float(behaviours[i, j, b]), 3),
                    **common,
                )
            after_ms = now_ms + int(think_ms[i])
            if not left[i]:
                heapq.heappush(self._due, (after_ms, int(rows[i])))
                continue
            self.counts.sessions_running -= 1
            if not vanish[i]:
                self.outbox.put(event_id=f"{event}-leave", behaviour="leave", event_time_ms=after_ms, item_id=None, value=1.0, **common)
