"""The real input of the loop: a KuaiRand log, replayed through the endpoint, and its test days, on which frozen policies are judged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from esrl_ray.config import Config
from esrl_ray.errors import EsrlError
from esrl_ray.evaluation.metrics import NUM_RESAMPLES, gauc_of_policies
from esrl_ray.evaluation.report import Gauc
from esrl_ray.policy.policy import Policy
from esrl_ray.simulation.draws import uniform
from esrl_ray.simulation.kuairand_replay import KuaiRandInput
from esrl_ray.simulation.kuairand_upstream import Say
from esrl_ray.simulation.traffic import MAX_IN_FLIGHT, TICK_S, Counts, Fuse, Outbox, Send

MAX_RESPONSE_S = 1.5
"""Feedback happens up to this long after the decision."""
_RESPOND = 200

_logger = logging.getLogger(__name__)


def prepare(config: Config, data: Path, *, say: Say, cache: Path | None = None) -> None:
    """Read and check the files and fit the upstream models, unless they are cached.

    Args:
        config: Deployment, as configs/kuairand.yaml.
        data: Folder of the files.
        say: Told what takes long, in one line each.
        cache: Folder of the upstream models' scores; default the user's cache.

    Raises:
        InputDataError: a file or column is missing or has another type than needed.
        ConfigError: the deployment names features, scores or behaviours that this input does not have.
    """
    num_requests = len(KuaiRandInput(config, data, cache=cache, say=say).lists)
    rate = config.demo.requests_per_s
    say(f"KuaiRand: {num_requests} requests in time order, {num_requests / rate:.0f} s at {rate:g} requests/s")


def evaluate_kuairand(
    policies: Sequence[Policy], config: Config, data: Path, *, cache: Path | None = None, resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[Gauc, ...]]:
    """GAUC of frozen policies on the test days, which are never replayed; the first policy is the control.

    Args:
        policies: Control, then others.
        config: Deployment.
        data: Folder of the files.
        cache: Folder of the upstream models' scores; default the user's cache.
        resamples: Of users, for the 95 % intervals.

    Returns:
        `user_block` and `user_tab`: one `Gauc` per policy; `user_block_difference` and `user_tab_difference`: paired, against the control,
        one per other policy. No claim about learning: all trained fusions tie on this log.
    """
    pairs = KuaiRandInput(config, data, cache=cache, say=_logger.info).test_pairs()
    return gauc_of_policies(policies, pairs, seed=config.demo.seed, resamples=resamples)


class KuaiRandTraffic:
    """Replays a log once, in time order, at the configured rate; times are rebased to the clock.

    Lists of one user follow each other: a list is asked for when the one before has come back. At the end of the log it stops and does
    not begin again; nobody leaves, so that a user's last list is truncated by the join.

    Args:
        config: Deployment.
        data: Folder of the files.
        fuse: Sends a request.
        send: Sends feedback.
        clock_ms: Wall clock.
        cache: Folder of the upstream models' scores; default the user's cache.
    """

    def __init__(
        self, config: Config, data: Path, *, fuse: Fuse, send: Send, clock_ms: Callable[[], int], cache: Path | None = None
    ) -> None:
        self._demo, self._fuse, self._clock_ms = config.demo, fuse, clock_ms
        self._input = KuaiRandInput(config, data, cache=cache, say=_logger.info)
        self._next = 0  # request
        self._users: dict[str, asyncio.Task[None]] = {}  # the last list of each user, while it is under way
        self._seen: set[str] = set()
        self._stop = asyncio.Event()
        self._finished = False
        self._error: BaseException | None = None
        self.counts, self.outbox = Counts(), Outbox(config.demo, send=send, clock_ms=clock_ms)

    async def run(self) -> None:
        """Play until `stop` or the end of the log; then what is under way is finished and all feedback is sent at once."""
        tokens, last_ms, num_requests = 0.0, self._clock_ms(), len(self._input.lists)
        while not self._stop.is_set() and self._next < num_requests:
            await asyncio.sleep(TICK_S)
            now_ms = self._clock_ms()
            tokens = min(tokens + self._demo.requests_per_s * (now_ms - last_ms) / 1e3, self._demo.requests_per_s)
            last_ms = now_ms
            count = max(0, min(int(tokens), MAX_IN_FLIGHT - len(self._users), num_requests - self._next))
            for i in range(self._next, self._next + count):
                self._begin(i)
            self._next += count
            tokens -= count
            self.outbox.post()
        await asyncio.gather(*self._users.values(), return_exceptions=True)
        self.outbox.post(everything=True)
        self._finished = self._next == num_requests

    async def stop(self) -> None:
        """Ask `run` to end; raises what ended it before."""
        self._stop.set()
        if self._error is not None:
            raise self._error

    def status(self, *, whole: bool = False) -> dict[str, Any]:
        """Numbers so far, the error that ended the traffic, and whether the log is at its end."""
        error = None if self._error is None else repr(self._error)
        return {**self.counts.status(whole=whole), **self.outbox.status(), "finished": self._finished, "error": error}

    def _begin(self, i: int) -> None:
        user = self._input.user_id(i)
        if user not in self._seen:
            self._seen.add(user)
            self.counts.sessions_started += 1
            self.counts.sessions_running += 1
        task = asyncio.create_task(self._turn(i, self._users.get(user)))
        self._users[user] = task

        def done(task: asyncio.Task[None]) -> None:
            if self._users.get(user) is task:
                del self._users[user]
            if not task.cancelled() and (error := task.exception()) is not None:
                self._error = error
                self._stop.set()

        task.add_done_callback(done)

    async def _turn(self, i: int, before: asyncio.Task[None] | None) -> None:
        """One list: ask, show, and give the feedback that was logged."""
        if before is not None:
            await asyncio.wait([before])
        request = self._input.request(i)
        body = msgspec.json.encode(request)
        sent_ms = self._clock_ms()
        self.counts.requests += 1
        try:
            reply, headers = await self._fuse(body)
        except EsrlError:  # a refusal: our request is wrong, and so would be the next ones
            raise
        except Exception:  # whatever the client raises when there is no 200 after all tries
            self.counts.requests_failed += 1
            return
        now_ms = self._clock_ms()
        self.counts.replied(headers, sent_ms=sent_ms, now_ms=now_ms)
        common = {"decision_id": reply.decision_id, "session_id": request["session_id"]}
        self.outbox.put(event_id=f"k{i}-shown", behaviour="shown", event_time_ms=now_ms, item_id=None, value=1.0, **common)
        for n, (item, behaviour, value) in enumerate(self._input.behaviours(i, reply.item_ids[: request["list_size"]])):
            moment_ms = int(1e3 * MAX_RESPONSE_S * uniform(self._demo.seed, i, n, _RESPOND))
            event = {"event_id": f"k{i}-{item}-{behaviour}", "behaviour": behaviour, "item_id": item, "value": round(value, 3)}
            self.outbox.put(event_time_ms=now_ms + moment_ms, **event, **common)
