"""The session join as one would write it first: `json`, dicts and a heap, with the standard library only.

A peer in `benchmarks/ingest.py`, and the join that the quix-streams peer runs in an environment of its own.

It keeps the watermark over both topics, label age, gap, de-duplication, masks, combined values, rewards and links. It leaves out what a
crash, a late event or a wrong record needs: no amendments, no checks, no state to go on from.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any

LATENESS_MS, LABEL_AGE_MS, GAP_MS, DEDUP_MS = 5_000, 4_000, 15_000, 120_000
SUMS = {"watch_s"}
WEIGHTS = {"like": 5.0, "comment": 1.0, "forward": 10.0, "dislike": -10.0}
SCALE, CAP_S = 6.5, 120.0


def rewards(values: dict[str, float]) -> list[float]:
    """Both reward groups of one pair, as in configs/demo.yaml."""
    watched = values.get("watch_s", 0.0)
    other = 0.5 * (watched > 10) + sum(weight * values.get(name, 0.0) for name, weight in WEIGHTS.items())
    return [0.05 * min(watched, CAP_S) / SCALE, other / SCALE]


class DictJoin:
    """One partition."""

    def __init__(self) -> None:
        self.newest: dict[str, int] = {}
        self.seen: set[str] = set()
        self.seen_at: dict[int, list[str]] = {}
        self.pending: list[tuple[int, str, int, dict[str, Any]]] = []
        self.steps: dict[str, dict[str, Any]] = {}
        self.last: dict[str, dict[str, Any]] = {}  # session id -> its newest step
        self.closing: list[tuple[int, str]] = []
        self.counts: Counter[str] = Counter()

    def push(self, topic: str, event: dict[str, Any]) -> None:
        """Take one event."""
        event_id, time_ms = event.get("event_id") or event["decision_id"], event["event_time_ms"]
        self.newest[topic] = max(time_ms, self.newest.get(topic, 0))
        if event_id in self.seen:
            self.counts["duplicate"] += 1
            return
        self.seen.add(event_id)
        self.seen_at.setdefault(time_ms // 1000, []).append(event_id)
        heapq.heappush(self.pending, (time_ms, event_id, len(self.pending), event))

    def advance(self) -> list[dict[str, Any]]:
        """Apply what the watermark has passed; the steps that closed, whole."""
        return self._until(min(self.newest.values()) - LATENESS_MS) if len(self.newest) == 2 else []

    def close(self) -> list[dict[str, Any]]:
        """Apply and close everything."""
        return self._until(1 << 62)

    def _until(self, watermark: int) -> list[dict[str, Any]]:
        while self.pending and self.pending[0][0] < watermark:
            event = heapq.heappop(self.pending)[-1]
            if "item_ids" in event:
                self._decision(event)
            else:
                self._feedback(event)
        for second in [second for second in self.seen_at if second < (watermark - DEDUP_MS) // 1000]:
            self.seen.difference_update(self.seen_at.pop(second))
        return list(self._closed(watermark))

    def _decision(self, event: dict[str, Any]) -> None:
        before = self.last.get(event["session_id"])
        step = {**event, "shown": [False] * len(event["item_ids"]), "values": [{} for _ in event["item_ids"]], "next_id": None}
        step |= {"index": 0, "last_ms": event["event_time_ms"], "ended": "open"}
        if before is not None and before["ended"] == "open" and event["event_time_ms"] <= before["last_ms"] + GAP_MS:
            before["next_id"], before["ended"], step["index"] = event["decision_id"], "has_next", before["index"] + 1
        self.last[event["session_id"]] = self.steps[event["decision_id"]] = step
        heapq.heappush(self.closing, (event["event_time_ms"] + LABEL_AGE_MS + GAP_MS, event["decision_id"]))

    def _feedback(self, event: dict[str, Any]) -> None:
        step, behaviour = self.steps.get(event["decision_id"]), event["behaviour"]
        if step is None:
            self.counts["unmatched"] += 1
            return
        step["last_ms"] = max(step["last_ms"], event["event_time_ms"])
        if behaviour == "shown":
            step["shown"] = [position >= 0 for position in step["positions"]]
        elif behaviour == "leave":
            step["ended"] = "terminated"
        else:
            values, value = step["values"][step["item_ids"].index(event["item_id"])], event["value"]
            values[behaviour] = values.get(behaviour, 0.0) + value if behaviour in SUMS else max(values.get(behaviour, value), value)
        self.counts["joined"] += 1

    def _closed(self, watermark: int) -> Iterable[dict[str, Any]]:
        while self.closing and self.closing[0][0] <= watermark:
            step = self.steps.pop(heapq.heappop(self.closing)[1])
            if self.last.get(step["session_id"]) is step:
                del self.last[step["session_id"]]
            if any(step["shown"]):
                step["rewards"] = [rewards(values) for values in step["values"]]
                yield step
