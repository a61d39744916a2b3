"""Events for the ingest benchmark: written to a real broker in the order in which they would arrive, reproducible by seed.

One decision to eight feedback: `shown` of the whole list and seven on items, of which one in ten lists ends with `leave`. Lists of a
session follow each other by 1 to 3 s. Feedback comes up to 2 s after its list; a fifth of it is written up to 1 s out of order, one in a
hundred is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from kafka import KafkaProducer

from esrl_ray.config import Config, KafkaConfig, load_config
from streaming.client import connect
from streaming.wire import JSON, MSGPACK, SCHEMA_VERSION, encode
from streaming.wire import Decision as WireDecision
from streaming.wire import Feedback as WireFeedback

PAIRS, LISTED = 15, 5
FEEDBACK_PER_DECISION = 8
EVENTS_PER_S = 2_000
"""Of event time: what a worker reads in a second is then many seconds of traffic, as after a pause."""
ACTIONS = ("click", "watch_s", "like", "comment", "forward", "dislike")
ARRAYS = ("states", "categorical", "scores", "actions", "anchor_actions", "fused_scores", "candidate_means")


def deployment(num_features: int, kafka: KafkaConfig | None = None) -> Config:
    """The demo's behaviours and rewards with another width of state."""
    demo = load_config("configs/demo.yaml")
    spec = demo.spec.model_copy(
        update={"user_features": (), "context_features": (), "item_features": tuple(f"f{i}" for i in range(num_features))}
    )
    serve = demo.serve.model_copy(update={"list_size": LISTED, "num_unshown": PAIRS - LISTED})
    return demo.model_copy(update={"spec": spec, "serve": serve, "kafka": kafka or demo.kafka})


@dataclass(frozen=True, slots=True)
class Written:
    """What one topic pair holds."""

    num_decisions: int
    num_feedback: int  # with the repeats

    @property
    def num_events(self) -> int:
        """Of both topics."""
        return self.num_decisions + self.num_feedback


def _decisions(config: Config, count: int, start_ms: int, rng: np.random.Generator) -> Iterator[WireDecision]:
    """In the order of their time."""
    spec, digest = config.spec.build(), config.spec.build().digest
    step_ms = 1000 * (1 + FEEDBACK_PER_DECISION) / EVENTS_PER_S
    active = max(1, round(2_000 / step_ms))  # sessions that take turns: 2 s from list to list
    names, lists = [f"session-{i:08d}" for i in range(active)], [0] * active
    blocks = [rng.normal(size=(64, PAIRS, width)).astype("<f4") for width in (spec.num_features, spec.num_scores, spec.num_actions, 1)]
    for i in range(count):
        turn = i % active
        if lists[turn] >= 10:
            names[turn], lists[turn] = f"session-{i + active:08d}", 0
        lists[turn] += 1
        states, scores, actions, fused = (block[i % 64] for block in blocks)
        yield WireDecision(
            schema_version=SCHEMA_VERSION,
            decision_id=f"{i:032x}",
            request_id=f"r{i}",
            session_id=names[turn],
            user_id=f"user-{names[turn][8:]}",
            event_time_ms=start_ms + round(i * step_ms),
            policy_version=1,
            round=0,
            arm="explore",
            spec_digest=digest,
            num_candidates=50,
            item_ids=[f"item-{(i * 31 + j * 7919) % 100_000:06d}" for j in range(PAIRS)],
            positions=[j if j < LISTED else -1 for j in range(PAIRS)],
            states=states.tobytes(),
            categorical=b"",
            scores=scores.tobytes(),
            actions=actions.tobytes(),
            anchor_actions=actions.tobytes(),
            fused_scores=fused.tobytes(),
            candidate_means=np.concatenate([states[0], scores[0]]).tobytes(),
        )


def _feedback(decision: WireDecision, number: int, rng: np.random.Generator) -> Iterator[tuple[float, WireFeedback]]:
    """(when it arrives, feedback) of one list."""
    delays = rng.integers(50, 2_000, FEEDBACK_PER_DECISION).tolist()
    held = rng.random(FEEDBACK_PER_DECISION).tolist()
    for j, (delay_ms, late) in enumerate(zip(delays, held, strict=True)):
        last = j == FEEDBACK_PER_DECISION - 1 and number % 10 == 0
        behaviour = "shown" if j == 0 else "leave" if last else ACTIONS[(number + j) % len(ACTIONS)]
        time_ms = decision.event_time_ms + (50 if j == 0 else 2_000 if last else delay_ms)
        event = WireFeedback(
            schema_version=SCHEMA_VERSION,
            event_id=f"f{number:023x}{j:08x}",
            decision_id=decision.decision_id,
            session_id=decision.session_id,
            behaviour=behaviour,
            event_time_ms=time_ms,
            item_id=None if j == 0 or last else decision.item_ids[(number + j) % LISTED],
            value=float(delay_ms % 60) if behaviour == "watch_s" else 1.0,
        )
        yield time_ms + (1_000 * late if late < 0.2 else 0), event
        if late > 0.99:
            yield time_ms + 500, event


def plain(event: WireDecision | WireFeedback) -> bytes:
    """The event as anyone would write it: JSON with lists."""
    fields: dict[str, Any] = msgspec.to_builtins(event, builtin_types=(bytes,))
    for name in ARRAYS:
        if name in fields:
            fields[name] = np.frombuffer(fields[name], "<f4").astype(float).round(6).tolist()  # as an app would print them
    return json.dumps(fields, separators=(",", ":")).encode()


def arrivals(config: Config, count: int, start_ms: int) -> Iterator[WireDecision | WireFeedback]:
    """`count` decisions and their feedback, in the order in which they arrive.

    Args:
        config: Spec and widths.
        count: Decisions.
        start_ms: Event time of the first.
    """
    rng = np.random.default_rng(0)
    waiting: list[tuple[float, WireFeedback]] = []
    for number, decision in enumerate(_decisions(config, count, start_ms, rng)):
        yield decision
        waiting += _feedback(decision, number, rng)
        if number % 500 == 499 or number == count - 1:
            waiting.sort(key=lambda entry: entry[0])
            until = decision.event_time_ms if number < count - 1 else float("inf")
            due = [event for arrives, event in waiting if arrives <= until]
            yield from due
            waiting = waiting[len(due) :]


def write_events(config: Config, count: int, start_ms: int, *, json_decisions: bool, json_feedback: bool) -> Written:
    """Fill both topics with the arrivals; in JSON as lists, in msgpack as serving does it."""
    kafka, num_feedback = config.kafka, 0
    producer: KafkaProducer = connect(
        KafkaProducer, kafka, acks="all", linger_ms=20, batch_size=262_144, compression_type="lz4", max_request_size=8 * 2**20,
        metrics_enabled=False,
    )  # fmt: skip
    for event in arrivals(config, count, start_ms):
        is_feedback = isinstance(event, WireFeedback)
        num_feedback += is_feedback
        as_json, topic = (json_feedback, kafka.feedback_topic) if is_feedback else (json_decisions, kafka.decisions_topic)
        content_type, value = (JSON, plain(event)) if as_json else (MSGPACK, encode(event))
        producer.send(topic, value=value, key=event.session_id.encode(), headers=[("content-type", content_type)])
    producer.flush(timeout=120.0)
    producer.close()
    return Written(count, num_feedback)
