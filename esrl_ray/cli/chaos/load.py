"""Generated events whose effect on the step log does not depend on the clock, on pauses or on how polls cut the topics.

Event times begin a day ahead of the clock (`join.max_ahead_s` allows it), so that a topic that is read to its end never moves the watermark
past events that are still to come, however long a broker or a worker is down. Everything that is out of order is so by less than
`join.lateness_s`, or changes the same step to the same values whether it is applied in order or behind (sums are of quarters, so they are
exact in any order), or is too late for certain: it is sent after a barrier, when every worker has committed all that came before, and
is older than what the join remembers then. One partition is idle from the start, its events in the past: there the watermark must follow
the clock. One gets nothing at all, and one goes idle half way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from esrl_ray.config import Config
from streaming.session_state import DECISIONS, FEEDBACK, Topic
from streaming.source import partition_of
from streaming.wire import JSON, LEAVE, MSGPACK, SCHEMA_VERSION, SHOWN, Decision, Feedback, encode

AHEAD_MS, PAST_MS = 86_400_000, 3_600_000
EVENTS_PER_S = 100  # of event time
EVENTS_PER_SESSION = 45  # about
OUT_OF_ORDER, TWICE, POISONED, TOO_LATE = 0.2, 0.05, 0.005, 0.003
LISTED, UNSHOWN = 3, 1
LONG_EVERY, LONG_LISTS = 12, 25  # every 12th session: long enough to be open whenever its late events are applied
IDLE_SESSIONS = 12
PAUSE_S = (20.0, 40.0)  # longer than join.gap_s

Kind = Literal["event", "late", "duplicate", "too_late", "poison"]


class Planned(NamedTuple):
    """A record to be produced."""

    arrival_ms: int  # order of production
    topic: Topic
    partition: int
    key: bytes | None
    value: bytes | None
    content_type: bytes
    kind: Kind
    event_time_ms: int  # of a valid event, else 0


@dataclass(frozen=True, slots=True)
class Load:
    """What is produced: some before anything else runs, then phase by phase with a barrier between."""

    before: list[Planned]
    phases: list[list[Planned]]
    idle_partition: int
    idle_from_ms: int  # the watermark of the idle partition reaches this once all in it has ended

    def count(self) -> Counter[str]:
        """Records by kind, and `decisions`, `feedback` by topic."""
        counts: Counter[str] = Counter()
        for planned in [*self.before, *(p for phase in self.phases for p in phase)]:
            counts[planned.kind] += 1
            counts[planned.topic] += 1
        return counts


@dataclass(slots=True)
class _Made:
    """Valid events by their place in time, and the steps that too late ones can refer to."""

    planned: list[Planned] = field(default_factory=list)
    shown: list[tuple[int, int, str, str]] = field(default_factory=list)  # event time, partition, session, decision


def generate(config: Config, *, seed: int, num_events: int, num_phases: int, start_ms: int) -> Load:
    """Make a load.

    Args:
        config: Spec, behaviours `click`, `watch`, `rating`, partitions (at least 4), and the times of the join.
        seed: Of everything.
        num_events: At least so many records.
        num_phases: Parts with a barrier between; too late events need at least 2 that are longer than `join.dedup_s`.
        start_ms: Clock; event times begin a day after it.
    """
    rng = np.random.default_rng([seed, num_events])
    num_partitions = config.kafka.num_partitions
    idle, active = num_partitions - 2, range(num_partitions - 2)
    begin_ms = start_ms + AHEAD_MS
    sessions = _Sessions(config, rng)
    number, made, at_ms, every_ms = 0, _Made(), float(begin_ms), 1000 * EVENTS_PER_SESSION / EVENTS_PER_S
    while len(made.planned) < num_events:
        wanted = active if len(made.planned) < num_events / 2 else active[:-1]
        number = _next_session(number + 1, wanted, num_partitions)
        sessions.make(made, number, round(at_ms))
        at_ms += float(rng.exponential(every_ms))
    quiet = _Made()
    for i in range(IDLE_SESSIONS):
        number = _next_session(number + 1, [idle], num_partitions)
        sessions.make(quiet, number, start_ms - PAST_MS + 1_000 * i)
    planned = [*made.planned, *_duplicates(made.planned, rng)]
    planned += list(_poison(config, rng, planned, active))  # as a whole, or poison would be made of poison
    planned.sort(key=lambda p: p.arrival_ms)
    cuts = np.linspace(begin_ms, at_ms, num_phases + 1)[:-1]  # what comes after the last session began belongs to the last
    phases: list[list[Planned]] = [[] for _ in range(num_phases)]
    for p in planned:
        phases[int(np.searchsorted(cuts, p.arrival_ms, side="right")) - 1].append(p)
    _add_too_late(config, rng, phases, made.shown, sessions, num_late=round(TOO_LATE * len(planned)))
    before = sorted([*quiet.planned, *_duplicates(quiet.planned, rng)], key=lambda p: p.arrival_ms)
    idle_until = max(p.event_time_ms for p in before) + round(1000 * ((config.join.gap_s or 0) + config.join.label_age_s)) + 1_000
    return Load(before, phases, idle, idle_until)


def _next_session(number: int, wanted: Sequence[int], num_partitions: int) -> int:
    """The next number whose session id falls into one of the partitions."""
    while partition_of(_session_id(number), num_partitions) not in wanted:
        number += 1
    return number


def _session_id(number: int) -> bytes:
    return f"s{number}".encode()


class _Sessions:
    """Makes the events of one session after the other."""

    def __init__(self, config: Config, rng: np.random.Generator) -> None:
        self._rng, self._spec = rng, config.spec.build()
        self._num_partitions = config.kafka.num_partitions
        self._lateness_ms = round(1000 * config.join.lateness_s)

    def make(self, made: _Made, number: int, start_ms: int) -> None:
        """One visit of one user: lists some seconds apart, feedback to each, then a `leave` or nothing."""
        rng, session = self._rng, _session_id(number).decode()
        long = number % LONG_EVERY == 0
        num_lists = LONG_LISTS if long else int(rng.integers(2, 9))
        pause_at = int(rng.integers(1, num_lists)) if not long and rng.random() < 0.12 else 0
        at_ms = start_ms
        for i in range(num_lists):
            if i:
                at_ms += round(1000 * float(rng.uniform(*(PAUSE_S if i == pause_at else (2.0, 6.0)))))
            name = f"{session}-{i}"
            late = long and 0 < i < num_lists - 12  # open whenever something of this list is applied
            late_list = late and i % 3 == 1 and rng.random() < 0.5
            shown = late or rng.random() > 0.05
            delay_ms = round(float(rng.uniform(8_000, 12_000))) if late_list else None
            self._add(made, self._decision(name, session, at_ms), delay_ms)
            self._feedback(made, name, session, at_ms, shown=shown, late=late and not late_list)
            if shown:
                made.shown.append((at_ms, self._partition(session), session, name))
        if rng.random() < 0.6:
            self._add(made, self._event(f"{session}-leave", f"{session}-{num_lists - 1}", session, LEAVE, at_ms + 4_000))

    def _feedback(self, made: _Made, name: str, session: str, at_ms: int, *, shown: bool, late: bool) -> None:
        rng = self._rng
        if shown:
            self._add(made, self._event(f"{name}.shown", name, session, SHOWN, at_ms + int(rng.integers(50, 300))))
        for j in range(LISTED):
            for behaviour, chance, values in (("click", 0.5, (1,)), ("watch", 0.4, (3, 9)), ("rating", 0.2, (2, 4))):
                if rng.random() > chance:
                    continue
                for n, value in enumerate(values[: int(rng.integers(1, len(values) + 1))]):
                    wait_ms = int(rng.integers(300, 9_000 if rng.random() < 0.1 else 3_500))
                    item = "elsewhere" if rng.random() < 0.005 else f"{name}/{j}"
                    event_id = f"{name}.{behaviour}.{j}.{n}"
                    of = name if rng.random() > 0.01 else f"{name}?"  # a decision that nobody knows
                    event = self._event(event_id, of, session, behaviour, at_ms + wait_ms, item, value / 4)
                    delay_ms = round(float(rng.uniform(8_000, 20_000))) if late and wait_ms < 3_500 and rng.random() < 0.2 else None
                    self._add(made, event, delay_ms)

    def too_late(self, rng: np.random.Generator, arrival_ms: int, step: tuple[int, int, str, str], *, forgotten: bool) -> Planned:
        """Feedback to a step that cannot change any more; or, of a time that is forgotten, now and then a decision."""
        at_ms, _, session, name = step
        event_id = f"{name}.late.{int(rng.integers(1 << 40))}"
        if forgotten and rng.random() < 0.3:
            return self._planned(self._decision(event_id, session, at_ms), arrival_ms, "too_late")
        return self._planned(self._event(event_id, name, session, "click", at_ms + 500, f"{name}/0"), arrival_ms, "too_late")

    def _add(self, made: _Made, event: Decision | Feedback, delay_ms: int | None = None) -> None:
        kind: Kind = "event" if delay_ms is None else "late"
        if delay_ms is None:
            out_of_order = self._rng.random() < OUT_OF_ORDER
            delay_ms = round(float(self._rng.uniform(0.1, 0.9)) * self._lateness_ms) if out_of_order else 0
        made.planned.append(self._planned(event, event.event_time_ms + delay_ms, kind))

    def _partition(self, session: str) -> int:
        return partition_of(session.encode(), self._num_partitions)

    def _planned(self, event: Decision | Feedback, arrival_ms: int, kind: Kind) -> Planned:
        topic, session = (DECISIONS if isinstance(event, Decision) else FEEDBACK), event.session_id
        as_json = isinstance(event, Feedback) and self._rng.random() < 0.3
        value = msgspec.json.encode(event) if as_json else encode(event)
        content_type = JSON if as_json else MSGPACK
        return Planned(arrival_ms, topic, self._partition(session), session.encode(), value, content_type, kind, event.event_time_ms)

    def _event(
        self, event_id: str, decision_id: str, session: str, behaviour: str, at_ms: int, item: str | None = None, value: float = 1.0
    ) -> Feedback:
        return Feedback(
            schema_version=SCHEMA_VERSION,
            event_id=event_id,
            decision_id=decision_id,
            session_id=session,
            behaviour=behaviour,
            event_time_ms=at_ms,
            item_id=item,
            value=value,
        )

    def _decision(self, name: str, session: str, at_ms: int) -> Decision:
        spec, g = self._spec, LISTED + UNSHOWN
        widths = (spec.num_features, spec.num_scores, spec.num_actions, spec.num_actions, 1)
        columns = [self._rng.random((g, width), np.float32).tobytes() for width in widths]
        codes = [self._rng.integers(0, c.cardinality, g) for c in spec.categorical_features]
        return Decision(
            schema_version=SCHEMA_VERSION,
            decision_id=name,
            request_id=f"r-{name}",
            session_id=session,
            user_id=f"u{session}",
            event_time_ms=at_ms,
            policy_version=1,
            round=0,
            arm="explore",
            spec_digest=spec.digest,
            num_candidates=50,
            item_ids=[f"{name}/{j}" for j in range(g)],
            positions=[*range(LISTED), *[-1] * UNSHOWN],
            states=columns[0],
            categorical=np.stack(codes, 1).astype("<i4").tobytes() if codes else b"",
            scores=columns[1],
            actions=columns[2],
            anchor_actions=columns[3],
            fused_scores=columns[4],
            candidate_means=(columns[0] + columns[1])[-4 * (spec.num_features + spec.num_scores) :],
        )


def _duplicates(planned: Sequence[Planned], rng: np.random.Generator) -> Iterator[Planned]:
    """Some records once more, byte by byte, up to 10 s later."""
    for p in planned:
        if rng.random() < TWICE:
            yield p._replace(arrival_ms=p.arrival_ms + int(rng.integers(1, 10_000)), kind="duplicate")


def _poison(config: Config, rng: np.random.Generator, planned: Sequence[Planned], active: Sequence[int]) -> Iterator[Planned]:
    """Records that are no valid events: every kind in turn, each made of a record of the load and sent near it."""
    for i in range(max(len(POISON), round(POISONED * len(planned)))):
        make = POISON[i % len(POISON)]
        topic = make.topic
        while (p := planned[int(rng.integers(len(planned)))]).topic != topic or p.content_type != MSGPACK or b"leave" in (p.value or b""):
            continue
        kind: type[Decision] | type[Feedback] = Decision if topic == DECISIONS else Feedback
        fields = msgspec.to_builtins(msgspec.msgpack.decode(p.value or b"", type=kind), builtin_types=(bytes,))
        key, value, content_type = make.of(fields)
        partition = p.partition
        if make.name == "wrong partition":
            partition = next(a for a in active if a != p.partition)
        elif key is not None and key != p.key:
            partition = partition_of(key, config.kafka.num_partitions)
            partition = partition if partition in active else p.partition
        yield Planned(p.arrival_ms, topic, partition, key, value, content_type, "poison", 0)


class Poison(NamedTuple):
    """One way of being no valid event."""

    name: str
    topic: Topic
    changes: Mapping[str, object] | bytes | None  # of the fields of a valid event; or the whole value

    def of(self, fields: dict[str, object]) -> tuple[bytes | None, bytes | None, bytes]:
        """(key, value, content type) from the fields of a valid event."""
        key = str(fields["session_id"]).encode()
        if self.name == "no key":
            key = b""
        elif self.name == "wrong key":
            key += b"!"
        if not isinstance(self.changes, Mapping):
            return key or None, self.changes, JSON
        changes = {name: fields[name] if value is ... else value for name, value in self.changes.items()}
        changed = {name: value for name, value in (fields | changes).items() if value is not _REMOVED}
        content_type = b"application/x-unknown" if self.name == "unknown content type" else MSGPACK
        return key or None, msgspec.msgpack.encode(changed), content_type


_REMOVED = object()
_NAN = float("nan")
POISON = (
    Poison("bad JSON", FEEDBACK, b'{"event_id": "e", '),
    Poison("empty", FEEDBACK, b""),
    Poison("null", DECISIONS, None),
    Poison("not UTF-8", FEEDBACK, b'{"event_id": "\xff\xfe"}'),
    Poison("deeply nested", DECISIONS, b"[" * 5_000),
    Poison("wrong type", FEEDBACK, {"event_time_ms": "yesterday"}),
    Poison("missing field", DECISIONS, {"positions": _REMOVED}),
    Poison("NaN in feedback", FEEDBACK, {"value": _NAN}),
    Poison("NaN in a decision", DECISIONS, {"fused_scores": np.full(LISTED + UNSHOWN, _NAN, "<f4").tobytes()}),
    Poison("wrong width", DECISIONS, {"states": b"\0\0\0\0"}),
    Poison("another spec", DECISIONS, {"spec_digest": "0123456789abcdef"}),
    Poison("unknown schema version", FEEDBACK, {"schema_version": 99}),
    Poison("unknown schema version", DECISIONS, {"schema_version": 99}),
    Poison("no key", FEEDBACK, {}),
    Poison("wrong key", FEEDBACK, {}),
    Poison("wrong partition", FEEDBACK, {}),
    Poison("wrong partition", DECISIONS, {}),
    Poison("undeclared behaviour", FEEDBACK, {"behaviour": "teleport", "item_id": "i"}),
    Poison("far future", FEEDBACK, {"event_time_ms": 4_102_444_800_000 + 10 * 365 * 86_400_000}),
    Poison("far future", DECISIONS, {"event_time_ms": 4_102_444_800_000 + 10 * 365 * 86_400_000}),
    Poison("unknown content type", FEEDBACK, {}),
)


def _add_too_late(
    config: Config,
    rng: np.random.Generator,
    phases: list[list[Planned]],
    shown: Sequence[tuple[int, int, str, str]],
    sessions: _Sessions,
    *,
    num_late: int,
) -> None:
    """At the head of each phase, events that the watermark of the barrier before it has passed for good.

    The barrier's watermark of a partition is known exactly: both topics' newest event time so far, the smaller one, minus the lateness.
    """
    join = config.join
    lateness_ms, dedup_ms = round(1000 * join.lateness_s), round(1000 * join.dedup_s)
    settled_ms = round(1000 * (join.label_age_s + join.amend_s)) + 2_000
    newest: dict[tuple[int, Topic], int] = {}
    for i, phase in enumerate(phases):
        marks: dict[int, int] = {}
        for p, _ in newest:
            if (p, DECISIONS) in newest and (p, FEEDBACK) in newest:
                marks[p] = min(newest[p, DECISIONS], newest[p, FEEDBACK]) - lateness_ms
        for planned in phase:
            if planned.event_time_ms:
                place = planned.partition, planned.topic
                newest[place] = max(newest.get(place, 0), planned.event_time_ms)
        if not i or not phase:
            continue
        first_ms = phase[0].arrival_ms
        forgotten = [s for s in shown if s[1] in marks and s[0] + 1_000 < marks[s[1]] - dedup_ms]
        remembered = [s for s in shown if s[1] in marks and first_ms - dedup_ms + 10_000 < s[0] < marks[s[1]] - settled_ms]
        late = []
        for steps, gone in ((forgotten, True), (remembered, False)):
            for _ in range(num_late // (2 * (len(phases) - 1)) + 1 if steps else 0):
                late.append(sessions.too_late(rng, first_ms, steps[int(rng.integers(len(steps)))], forgotten=gone))
        phase[:0] = late
