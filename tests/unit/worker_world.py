"""A log, topics and a clock in memory for tests of the ingest worker, and the moments at which it can be made to die."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import pyarrow as pa

from esrl_ray.config import Config, IngestConfig, JoinConfig, KafkaConfig, SpecConfig
from esrl_ray.errors import WireError
from streaming.records import Record
from streaming.source import partition_of
from streaming.steplog import WorkerState, step_schema
from streaming.steptable import merge_steps
from streaming.wire import MSGPACK, Decision, DecodedDecision, Event, Feedback, decode_decision, decode_feedback, encode
from streaming.worker import IngestWorker
from tests.unit.test_sessions import REWARD, SPEC, T0, decision, feedback

PARTITIONS = 2
CONFIG = Config(
    join=JoinConfig(),
    reward=REWARD,
    spec=SpecConfig(item_features=("age",)),
    kafka=KafkaConfig(num_partitions=PARTITIONS),
    ingest=IngestConfig(commit_interval_s=2, max_poll_records=5),
)


def _id_of(late: Record | Event) -> str:
    if isinstance(late, Record):
        decision = late.topic == "decisions"
        late = decode_decision(late.value, SPEC, late.content_type).event if decision else decode_feedback(late.value, late.content_type)
    return late.decision_id if isinstance(late, Decision) else late.event_id


class CrashError(RuntimeError):
    """The process dies here."""


class World:
    """What survives a worker: the topics, the log, the dead letters, the clock; and where the next crash happens."""

    def __init__(self, num_partitions: int = PARTITIONS) -> None:
        self.now_ms, self.num_partitions = T0, num_partitions
        self.topics: dict[tuple[str, int], list[Record]] = {(t, p): [] for t in ("decisions", "feedback") for p in range(num_partitions)}
        self.state: WorkerState | None = None
        self.commits: list[pa.Table] = []
        self.dead: dict[tuple[str, int, int], str] = {}
        self.topic_ids: dict[str, str] = {}
        self.skipped: dict[tuple[str, int], int] = {}
        self.late_events: dict[tuple[str, str], Record | Event] = {}
        self.published: list[tuple[str, int, pa.Table, int]] = []
        self.crash_at = ""
        self.moments: list[str] = []

    def moment(self, name: str) -> None:
        self.moments.append(name)
        if name == self.crash_at:
            self.crash_at = ""
            raise CrashError(name)

    def write(self, event: DecodedDecision | Feedback, *, partition: int | None = None, key: bytes | None = None) -> None:
        sent: Decision | Feedback = event.event if isinstance(event, DecodedDecision) else event
        topic, key = ("feedback" if isinstance(event, Feedback) else "decisions"), key or sent.session_id.encode()
        self.raw(topic, encode(sent), partition=partition_of(key, self.num_partitions) if partition is None else partition, key=key)

    def raw(self, topic: str, value: bytes, *, partition: int = 0, key: bytes = b"s", content_type: bytes = MSGPACK) -> None:
        records = self.topics[topic, partition]
        records.append(Record(topic, partition, len(records), self.now_ms, key, value, content_type))

    @property
    def ends(self) -> dict[str, int]:
        return {f"{topic}/{p}": len(records) for (topic, p), records in self.topics.items()}

    # -- the log

    incarnation = "i"

    num_since_restart = 0

    @property
    def base(self) -> int | None:
        """Every third state is whole."""
        return len(self.commits) - self.num_since_restart % 3 if self.num_since_restart % 3 else None

    def restore(self) -> WorkerState | None:
        self.num_since_restart = 0
        return self.state

    def commit(self, state: WorkerState, table: pa.Table) -> None:
        assert state.commit == len(self.commits) and state.incarnation == "i" and table.schema == step_schema()
        assert not self.waiting_late, "late events are acknowledged before the commit"
        assert state.builds_on == self.base
        assert not (set(self.refused) - set(self.dead)), "a commit must not pass a dead letter that is not acknowledged"
        self.moment("before commit")
        if self.base is not None:
            assert self.state is not None
            joiners = {p: self.state.joiners[p] + state.joiners[p] for p in state.joiners}
            state = msgspec.structs.replace(state, joiners=joiners, builds_on=None)
        self.state, self.num_since_restart = state, self.num_since_restart + 1
        self.commits.append(table)
        self.moment("after commit")

    def tidy(self, clock_ms: Callable[[], int], budget_ms: int) -> bool:
        assert clock_ms() == self.now_ms and budget_ms == 1_000
        return False

    # -- the dead letters

    refused: dict[tuple[str, int, int], str]
    waiting_late: list[tuple[str, Record | Event]]
    num_passed = 0

    def passed(self, num_records: int) -> None:
        self.num_passed += num_records

    def send(self, record: Record, error: WireError) -> None:
        self.refused[record.topic, record.partition, record.offset] = str(error)

    def late(self, topic: str, late: Record | Event) -> None:
        self.waiting_late.append((topic, late))

    def flush(self) -> None:
        self.dead |= self.refused
        self.late_events |= {(topic, _id_of(late)): late for topic, late in self.waiting_late}
        self.waiting_late.clear()
        self.moment("after flush")

    def publish(self, worker: str, commit: int, rows: pa.Table, committed_ms: int) -> None:
        assert commit == len(self.commits) - 1, "commit first, publish second"
        self.published.append((worker, commit, rows, committed_ms))

    def worker(self, partitions: Sequence[int] = (0, 1), config: Config = CONFIG) -> IngestWorker:
        """A new process."""
        self.refused, self.waiting_late = {}, []
        return IngestWorker(
            config,
            "ingest-0",
            partitions,
            log=self,
            source_factory=lambda positions: Topics(self, partitions, positions),
            dead_letters=self,
            publish=[self.publish],
            clock_ms=lambda: self.now_ms,
        )


class Topics:
    """A source over the world's topics: at most five records a poll, 0.5 s each."""

    def __init__(self, world: World, partitions: Sequence[int], positions: Mapping[str, int]) -> None:
        self.world, self.keys = world, [key for key in world.topics if key[1] in partitions]
        self.at = {key: positions.get(f"{key[0]}/{key[1]}", 0) for key in self.keys}
        self.again: list[Record] = []
        self.topic_ids = world.topic_ids
        self.held: set[tuple[str, int]] = set()

    def hold(self, partitions: Iterable[tuple[str, int]]) -> None:
        self.held = set(partitions)

    def take_skipped(self) -> dict[tuple[str, int], int]:
        skipped, self.world.skipped = self.world.skipped, {}
        return skipped

    def read_again(self, starts: Mapping[str, int]) -> None:
        for where, start in starts.items():
            topic, partition = where.split("/")
            key = topic, int(partition)
            self.again += [record for record in self.world.topics[key][: self.at[key]] if record.offset >= start]

    @property
    def reads_again(self) -> bool:
        return bool(self.again)

    def poll(self, timeout_ms: int) -> list[Record]:
        assert 0 <= timeout_ms <= 100
        self.world.moment("poll")
        self.world.now_ms += 500
        if self.again:
            records, self.again = self.again[:5], self.again[5:]
            return records
        records = []
        for key in (key for key in self.keys if key not in self.held):
            batch = self.world.topics[key][self.at[key] :][: 5 - len(records)]
            self.at[key] += len(batch)
            records += batch
        return records

    def positions(self) -> dict[str, int]:
        return {f"{topic}/{p}": offset for (topic, p), offset in self.at.items()}

    def at_end(self, topic: str, partition: int) -> bool:
        return self.at[topic, partition] == len(self.world.topics[topic, partition])

    def lag(self) -> dict[tuple[str, int], int]:
        return {key: len(self.world.topics[key]) - at for key, at in self.at.items()}


def visits(world: World, *, sessions: int = 6, lists: int = 4) -> None:
    """Some sessions of some lists, 1 s apart, with a click each, and one duplicate; the last of every second session leaves."""
    for i in range(lists):
        for s in range(sessions):
            name, session, at = f"d{s}-{i}", f"s{s}", i + s / 10
            world.write(decision(name, at, session=session))
            for _ in range(2):
                world.write(feedback(name, "shown", at + 0.1, session=session))
            world.write(feedback(name, "click", at + 0.5, item="i0", session=session))
            if s % 2 and i == lists - 1:
                world.write(feedback(name, "leave", at + 0.9, session=session))


def comparable(world: World) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = (
        merge_steps(pa.concat_tables(world.commits)).drop_columns(["commit", "closed_ms", "revision"]).to_pylist()
    )
    return rows
