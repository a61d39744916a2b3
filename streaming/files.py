"""Old logs as topics: files of decisions and feedback that an ingest worker reads as it reads Kafka, and a file for what it refuses.

Delivery: a row's place among the rows of its files, in the order of their names, is its offset, so that the worker's position says what was
taken. A refused row stands in the rejects before the commit that passes it; a row that is read again after a crash stands there once.
Memory: one Parquet batch or one line at a time.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import SecretStr

from esrl_ray.config import KafkaConfig
from esrl_ray.errors import InputDataError, WireError
from esrl_ray.secret import pseudonym
from esrl_ray.vocabulary import Bucket
from streaming.deadletter import RefusedShare
from streaming.records import Record
from streaming.wire import JSON, MAX_ID_BYTES, MSGPACK, Event, encode

PARQUET, LINES = (".parquet",), (".jsonl", ".ndjson", ".json")
BATCH_ROWS = 1_000
SAMPLE_BYTES = 2_000
SHARE_ROWS = 100  # fewer than of a topic: a small file of another schema should not pass as refused rows
_BEGINS = b'{"table":'  # of each line of the rejects
_ENDS_BYTES = 2**20  # of a file, at each end, that its id is made of


class _Keyed(msgspec.Struct):
    """What the key of a record is made of."""

    session_id: str


class _Identified(msgspec.Struct):
    """What tells a late event from others."""

    decision_id: str
    event_id: str = ""


class FileSource:
    """Two topics of one partition out of files; what the worker needs of `streaming.source.Source`.

    Args:
        config: Names of the topics.
        decisions: A file or a folder of files, Parquet or one JSON object a line, each in order of event time.
        feedback: The same.
        positions: `topic/0` -> row to begin with.
        max_poll_records: Rows of both topics per poll, at most.
        user_key: Of the pseudonyms that decisions get for their user ids, as serving gives them; None leaves what stands there.

    Raises:
        InputDataError: no files there, or files of another kind.
    """

    def __init__(
        self,
        config: KafkaConfig,
        decisions: Path,
        feedback: Path,
        positions: Mapping[str, int],
        *,
        max_poll_records: int,
        user_key: SecretStr | None = None,
    ) -> None:
        self._with_users, self._user_key = config.decisions_topic, user_key
        self._files = {config.decisions_topic: _files_of(decisions), config.feedback_topic: _files_of(feedback)}
        self._ids = {topic: _id_of(files) for topic, files in self._files.items()}
        self._next = {topic: positions.get(f"{topic}/0", 0) for topic in self._files}
        self._rows = {topic: self._records(topic, self._next[topic]) for topic in self._files}
        self._again: Iterator[Record] | None = None
        self._ended: set[str] = set()
        self._held: set[str] = set()
        self._share = max(1, max_poll_records // 2)

    @property
    def reads_again(self) -> bool:
        """Rows below the positions are still to come, and only those come now."""
        return self._again is not None

    @property
    def topic_ids(self) -> dict[str, str]:
        """Topic -> id of its files: of their names, sizes and ends, when this began."""
        return self._ids

    def read_again(self, starts: Mapping[str, int]) -> None:
        """Before the first poll: first return the rows from these on, up to the positions, once more."""
        for where, start in starts.items():
            topic = where.rpartition("/")[0]
            self._again = islice(self._records(topic, start), self._next[topic] - start)

    def take_skipped(self) -> dict[tuple[str, int], int]:
        """Nothing is passed over."""
        return {}

    def hold(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Return no rows of these topics, until the next call."""
        self._held = {topic for topic, _ in partitions}

    def poll(self, timeout_ms: int) -> list[Record]:
        """The next rows; files never make wait."""
        if self._again is not None:
            again = list(islice(self._again, self._share))
            self._again = self._again if again else None
            return again
        records = []
        for topic, rows in self._rows.items():
            if topic in self._held:
                continue
            taken = list(islice(rows, self._share))
            if len(taken) < self._share:
                self._ended.add(topic)
            self._next[topic] += len(taken)
            records += taken
        return records

    def positions(self) -> dict[str, int]:
        """`topic/0` -> number of the next row."""
        return {f"{topic}/0": row for topic, row in self._next.items()}

    @property
    def finished(self) -> bool:
        """Every row was returned."""
        return len(self._ended) == len(self._files)

    def at_end(self, topic: str, partition: int) -> bool:
        """Whether this topic has ended and the other goes on. At the end of both no watermark may follow the clock of today: what is open
        then was cut off, not left."""
        return topic in self._ended and not self.finished

    def lag(self) -> dict[tuple[str, int], int]:
        """Nobody has counted the rows."""
        return {}

    def _records(self, topic: str, start: int) -> Iterator[Record]:
        records, key = _records(topic, self._files[topic], start), self._user_key
        if key is None or topic != self._with_users:
            return records
        return (record._replace(value=_without_user(record.value or b"", record.content_type, key)) for record in records)


class Rejects:
    """Refused rows, and late ones with `kafka.late_topics`, as JSON lines; what the worker needs of `streaming.deadletter.DeadLetters`.

    Args:
        path: Made at the first one; appended to. Imports into other tables may have written to it, what they refused is theirs.
        table: Id of the table that rows are imported into.
        max_share: Of 100 rows that may be refused.

    Raises:
        InputDataError: the file is something else.
    """

    def __init__(self, path: Path, table: str, *, max_share: float) -> None:
        self._path, self._table, self._share = path, table, RefusedShare(max_share, window=SHARE_ROWS)
        self._waiting: list[dict[str, Any]] = []
        self._last: dict[str, int] = {}  # topic -> last refused row of this import that stands in the file
        self._late: dict[tuple[str, str], set[int | None]] = {}  # topic, event id -> rows of it that an earlier call wrote
        self.counts: Counter[tuple[str, str]] = Counter()  # (topic, code) of this import
        if path.exists():
            self._read()

    def passed(self, num_records: int) -> None:
        """Count rows that were fine."""
        self._share.passed(num_records)

    def send(self, record: Record, error: WireError) -> None:
        """Take one refused row; it is on the disk after `flush`.

        Raises:
            StreamError: too many are refused.
        """
        if record.offset > self._last.get(record.topic, -1):
            sample = _sample((record.value or b"")[:SAMPLE_BYTES], record.content_type)
            self._take({"topic": record.topic, "row": record.offset, "code": str(error.code), "reason": str(error), "sample": sample})
        self._share.refused(f"{record.topic} row {record.offset}", error)

    def late(self, topic: str, late: Record | Event) -> None:
        """Take one event that was counted late; its row is not known when a crash took its record."""
        value, content_type = (late.value or b"", late.content_type) if isinstance(late, Record) else (encode(late), MSGPACK)
        row = late.offset if isinstance(late, Record) else None
        event = _decode(content_type)(value, type=_Identified)
        event_id = event.event_id or event.decision_id
        if (rows := self._late.get((topic, event_id))) is None or (None not in rows and row is not None and row not in rows):
            place = {"event_id": event_id} if row is None else {"event_id": event_id, "row": row}
            self._take({"topic": topic, **place, "code": Bucket.LATE, "reason": "late", "sample": _sample(value, content_type)})

    def flush(self) -> None:
        """Make them durable."""
        if not self._waiting:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in self._waiting))
            file.flush()
            os.fsync(file.fileno())
        self._waiting.clear()

    def _take(self, entry: dict[str, Any]) -> None:
        self._waiting.append({"table": self._table, **entry})
        self._count(entry)

    def _count(self, entry: Mapping[str, Any]) -> None:
        self.counts[entry["topic"], entry["code"]] += 1
        if entry["code"] != Bucket.LATE:
            self._last[entry["topic"]] = max(entry["row"], self._last.get(entry["topic"], -1))

    def _read(self) -> None:
        """What an earlier call wrote; a last line that was cut off by a crash goes."""
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    try:
                        if (entry := msgspec.json.decode(line, type=dict[str, Any]))["table"] == self._table:
                            self._count(entry)
                            if entry["code"] == Bucket.LATE:
                                self._late.setdefault((entry["topic"], entry["event_id"]), set()).add(entry.get("row"))
                    except (msgspec.DecodeError, KeyError):
                        raise self._other(line) from None
                    whole += len(line)
                elif not line.startswith(_BEGINS[: len(line)]):
                    raise self._other(line)
        os.truncate(self._path, whole)

    def _other(self, line: bytes) -> InputDataError:
        what = f"the file has a line that is no refused row: {line[:80].decode(errors='replace')!r}"
        return InputDataError(what, str(self._path), "name another file with --rejects")


def _sample(value: bytes, content_type: bytes) -> str:
    return value.decode(errors="replace") if content_type == JSON else b64encode(value).decode()


def _files_of(path: Path) -> list[Path]:
    files = sorted(f for f in path.iterdir() if f.suffix in (*PARQUET, *LINES)) if path.is_dir() else [path] if path.exists() else []
    if not files or files[0].suffix not in (*PARQUET, *LINES):
        raise InputDataError("there are no files to read", str(path), f"name a file or a folder of files {', '.join((*PARQUET, *LINES))}")
    return files


def _id_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()[:16]


def _records(topic: str, files: Sequence[Path], start: int) -> Iterator[Record]:
    """Rows from number `start` on."""
    row = 0
    for path in files:
        try:
            if path.suffix in PARQUET:
                with pq.ParquetFile(path) as file:
                    if row + file.metadata.num_rows <= start:
                        row += file.metadata.num_rows
                        continue
                    for batch in file.iter_batches(BATCH_ROWS):
                        skipped = min(max(0, start - row), len(batch))
                        for i, value in enumerate(batch.slice(skipped).to_pylist(), row + skipped):
                            yield _record(topic, i, msgspec.msgpack.encode(value), MSGPACK)
                        row += len(batch)
                continue
            with path.open("rb") as lines:
                for line in lines:
                    if row >= start:
                        yield _record(topic, row, line.rstrip(b"\r\n"), JSON)
                    row += 1
        except (OSError, pa.ArrowException) as error:
            raise InputDataError(
                f"the file cannot be read: {str(error).splitlines()[0]}", str(path), "mend it, then import again"
            ) from error


def _without_user(value: bytes, content_type: bytes, key: SecretStr) -> bytes:
    """A decision with the pseudonym of its user. One whose user cannot be found out stays as it is, and the worker refuses it."""
    form: Any = msgspec.msgpack if content_type == MSGPACK else msgspec.json
    try:
        fields = form.decode(value, type=dict[str, msgspec.Raw])
        user_id = form.decode(fields["user_id"], type=str)
    except (KeyError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return value
    if not 0 < len(user_id.encode()) <= MAX_ID_BYTES:
        return value
    whole: bytes = form.encode(fields | {"user_id": msgspec.Raw(form.encode(pseudonym(user_id, key)))})
    return whole


def _decode(content_type: bytes) -> Any:
    return msgspec.msgpack.decode if content_type == MSGPACK else msgspec.json.decode


def _record(topic: str, row: int, value: bytes, content_type: bytes) -> Record:
    try:
        key = _decode(content_type)(value, type=_Keyed).session_id.encode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        key = None  # the worker says what is wrong with it
    return Record(topic, 0, row, -1, key, value, content_type)
