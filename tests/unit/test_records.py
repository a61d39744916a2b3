"""What a fetch holds, read by us and by kafka-python."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from kafka.record.legacy_records import LegacyRecordBatchBuilder
from kafka.record.memory_records import MemoryRecords

from streaming import records as reading
from streaming.records import FetchedRecords, Record
from streaming.unpacking import CODECS as CODEC_NAMES
from streaming.wire import JSON, MSGPACK

PLACE = TopicPartition("feedback", 3)
CODECS = (0, 1, 3, 4)  # all but snappy, which is not installed here
MEBI = 2**20
Message = tuple[int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]
"""Timestamp, key, value, headers."""

texts = st.none() | st.binary(max_size=300)
headers = st.lists(
    st.tuples(
        st.sampled_from(["content-type", "attempts", "trace"]) | st.text(max_size=200),
        st.sampled_from([MSGPACK, b"7", b"999999", b"1000000", b"9" * 5_000]) | texts,
    ),
    max_size=3,
)
messages = st.lists(st.tuples(st.integers(0, 2**42), texts, texts, headers), min_size=1, max_size=5)


def batch(records: list[Message], *, first: int = 0, codec: int = 0, transactional: bool = False) -> bytes:
    """As a producer writes it, its first record at an offset."""
    builder = DefaultRecordBatchBuilder(2, codec, transactional, 5 if transactional else -1, 0, 0, 2**30)
    for i, (time_ms, key, value, told) in enumerate(records):
        builder.append(i, time_ms, key, value, told)
    return struct.pack(">q", first) + bytes(builder.build())[8:]


def change(content: bytes, at: int, new: bytes) -> bytes:
    """A batch with other bytes and a checksum that fits."""
    changed = bytearray(content)
    changed[at : at + len(new)] = new
    start = DefaultRecordBatch.ATTRIBUTES_OFFSET
    return bytes(changed[:17]) + struct.pack(">I", crc32c.crc32c(bytes(changed[start:]))) + bytes(changed[start:])


def change_old(content: bytes, *, attributes: int) -> bytes:
    body = content[16:17] + bytes([attributes]) + content[18:]
    return content[:12] + struct.pack(">I", zlib.crc32(body)) + body


def read(content: bytes, kind: Any = FetchedRecords, *, start: int = 0, at_once: int = 2, **settings: Any) -> tuple[list[Any], list[int]]:
    """All records, taken some at a time, and the next offset after each time."""
    fetched = kind(start, PLACE, MemoryRecords(content), **settings)
    records, offsets = [], []
    while fetched:
        records += fetched.take(at_once)
        offsets.append(fetched.next_fetch_offset)
    return records, offsets


def plain(raw: Any) -> tuple[int, int, bytes | None, bytes | None]:
    """What both kinds of record have."""
    return raw.offset, raw.timestamp_ms if isinstance(raw, Record) else raw.timestamp, raw.key, raw.value


@given(batches=st.lists(st.tuples(messages, st.sampled_from(CODECS)), max_size=3), gap=st.integers(0, 2), start=st.integers(0, 4))
def test_records_and_positions_are_those_of_kafka_python(batches: list[tuple[list[Message], int]], gap: int, start: int) -> None:
    content, offset = b"", 0
    for records, codec in batches:
        content += batch(records, first=offset, codec=codec)
        offset += len(records) + gap
    (mine, my_offsets), (theirs, their_offsets) = read(content, start=start), read(content, Fetcher.PartitionRecords, start=start)
    assert list(map(plain, mine)) == list(map(plain, theirs))
    assert my_offsets == their_offsets
    assert all((record.topic, record.partition) == PLACE for record in mine)


@given(records=messages)
def test_headers_tell_content_type_and_attempts(records: list[Message]) -> None:
    for record, (*_, told) in zip(read(batch(records))[0], records, strict=True):
        last = {name: value for name, value in told if value is not None and (name != "attempts" or (value.isdigit() and len(value) < 7))}
        assert record.content_type == last.get("content-type", JSON)
        assert record.attempts == int(last.get("attempts", b"0"))


def test_the_broker_s_time_counts_where_the_topic_says_so() -> None:
    content = batch([(1_000, b"a", b"1", []), (5_000, b"b", b"2", [])])
    appended = change(content, 22, bytes([content[22] | DefaultRecordBatch.TIMESTAMP_TYPE_MASK]))
    assert [record.timestamp_ms for record in read(appended)[0]] == [5_000, 5_000]


def test_batches_of_aborted_transactions_are_left_out() -> None:
    records: list[Message] = [(1, b"a", b"1", [("content-type", MSGPACK)])]
    content = batch(records) + batch(records, first=1, transactional=True) + batch(records, first=2)

    class Aborted:
        first_offset, producer_id = 1, 5

    committed, _ = read(content, isolation_level=1)
    aborted, offsets = read(content, isolation_level=1, aborted_transactions=[Aborted()])
    assert [record.offset for record in committed] == [0, 1, 2]
    assert [(record.offset, record.content_type) for record in aborted] == [(0, MSGPACK), (2, MSGPACK)]
    assert offsets[-1] == 3


@pytest.mark.parametrize("transactional", [False, True])
def test_a_header_whose_name_is_no_text_is_passed_over(transactional: bool) -> None:
    records: list[Message] = [(1, b"a", b"1", []), (2, b"b", b"2", [("name", b"x"), ("attempts", b"3")]), (3, b"c", b"3", [])]
    content = batch(records, transactional=transactional)
    found, _ = read(change(content, content.find(b"name"), b"\xff"), isolation_level=1)
    assert [(record.key, record.attempts) for record in found] == [(b"a", 0), (b"b", 3), (b"c", 0)]


def old_batch(*values: bytes, codec: int = 0) -> bytes:
    builder = LegacyRecordBatchBuilder(magic=1, compression_type=codec, batch_size=2**30)
    for i, value in enumerate(values):
        builder.append(i, timestamp=7, key=b"a", value=value)
    return bytes(builder.build())


@pytest.mark.parametrize("codec", [0, 1, 3])
def test_messages_of_an_old_format_are_read_and_so_are_batches_behind_them(codec: int) -> None:
    content = old_batch(b"1", b"2", codec=codec) + batch([(8, b"b", b"3", [])], first=2, codec=4)
    expected = [(0, 7, b"a", b"1"), (1, 7, b"a", b"2"), (2, 8, b"b", b"3")]
    found, offsets = read(content)
    assert (list(map(plain, found)), offsets) == (expected, [2, 3])


def test_an_old_batch_that_is_too_large_or_damaged_is_refused_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    content = old_batch(bytes(MEBI), codec=1)
    assert len(read(content)[0]) == 1
    monkeypatch.setattr(reading, "MAX_BATCH_BYTES", MEBI)
    with pytest.raises(CorruptRecordError, match=r"feedback\[3\]@0: the batch unpacks to more than 1,048,576 bytes"):
        read(content)
    value = gzip.compress(b"no message")
    with pytest.raises(CorruptRecordError, match=r"feedback\[3\]@0"):
        read(change_old(old_batch(value), attributes=1))


MIDDLE = DefaultRecordBatch.HEADER_STRUCT.size


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + b"?",  # its checksum no longer fits
        lambda content: change(content, MIDDLE, b"\x7e"),  # a record longer than the batch
        lambda content: change(content, MIDDLE, b"\x02"),  # shorter than its fields
        lambda content: change(content, MIDDLE + 4, b"\x7e"),  # a key longer than the record
        lambda content: change(content, MIDDLE, b"\xff" * 11),  # a number of more than 64 bits
        lambda content: change(content, len(content) - 1, b"\x02"),  # a header that is not there
        lambda content: change(content, len(content) - 1, b"\x01"),  # fewer headers than none
        lambda content: change(content, 57, struct.pack(">i", 3)),  # more records than it has
        lambda content: change(content, 57, struct.pack(">i", 1)),  # fewer
    ],
)
def test_a_damaged_batch_is_refused_with_its_place(damage: Callable[[bytes], bytes]) -> None:
    content = batch([(1, b"a", b"1", []), (2, b"b", b"2", [])], first=40)
    assert len(read(content)[0]) == 2
    with pytest.raises(CorruptRecordError, match=r"feedback\[3\]@40"):
        read(damage(content))


@pytest.mark.parametrize("codec", CODECS[1:])
def test_a_batch_that_is_too_large_unpacked_gives_its_offsets_only_and_takes_little_memory(
    codec: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "MAX_BATCH_BYTES", MEBI)
    around: list[Message] = [(1, b"a", b"1", [])]
    bomb = batch([(5, b"b", bytes(16 * MEBI), []), (6, b"c", bytes(16 * MEBI), [])], first=41, codec=codec)
    content = batch(around, first=40) + bomb + batch(around, first=43)
    tracemalloc.start()
    (before, first, second, after), offsets = read(content, start=40, at_once=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * MEBI
    assert (before.offset, before.too_large, after.offset, after.too_large) == (40, "", 43, "")
    assert [first, second] == [Record("feedback", 3, offset, 6, None, None, JSON, too_large=first.too_large) for offset in (41, 42)]
    assert first.too_large == f"the batch feedback[3]@41-42 has {len(bomb):,} bytes, unpacked more than 1,048,576: it is not read"
    assert offsets[:4] == [41, 42, 43, 44]
    assert f"batch too large where=feedback[3]@41-42 bytes={len(bomb)} producer_id=-1" in caplog.text
    assert [record.offset for record in read(content, start=42)[0]] == [42, 43]  # a worker that was replaced within the batch
    monkeypatch.setattr(reading, "FETCH_BYTES", MEBI)
    assert read(content, start=40)[1][-1] == 43, "one of them is enough work for a poll"


def test_the_smallest_records_are_made_when_they_are_wanted() -> None:
    smallest = batch([(0, None, None, [])])
    num, one = MEBI, smallest[MIDDLE:]
    crowd = smallest[:8] + struct.pack(">i", MIDDLE - 12 + num * len(one)) + smallest[12:MIDDLE] + num * one
    crowd = change(crowd, 57, struct.pack(">i", num))
    fetched = FetchedRecords(0, PLACE, MemoryRecords(crowd))
    tracemalloc.start()
    assert len(fetched.take(100)) == 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(crowd), "as records they take thirty times as much"


def test_what_is_left_of_a_fetch_is_fetched_again_when_much_of_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "FETCH_BYTES", 2 * MEBI)
    content = b"".join(batch([(1, b"a", bytes(MEBI), [])], first=i, codec=4) for i in range(5))
    found, offsets = read(content)
    assert [record.offset for record in found] == [0, 1] and offsets[-1] == 2
    assert [record.offset for record in read(content[2 * len(content) // 5 :], start=2)[0]] == [2, 3]


@pytest.mark.parametrize("codec", CODECS[1:])
def test_a_batch_that_cannot_be_unpacked_is_refused_with_its_place_and_codec(codec: int) -> None:
    content = batch([(1, b"a", bytes(1_000), [])], first=40, codec=codec)
    with pytest.raises(CorruptRecordError, match=rf"feedback\[3\]@40-40: {CODEC_NAMES[codec]} cannot unpack it"):
        read(change(content, MIDDLE, b"?" * 8))


def test_snappy_that_is_not_installed_is_asked_for_with_the_place() -> None:
    content = batch([(1, b"a", b"1", [])], first=40)
    with pytest.raises(CorruptRecordError, match=r"feedback\[3\]@40-40: it was packed with snappy: install python-snappy"):
        read(change(content, 22, bytes([2])))


def test_headers_of_a_size_that_no_honest_record_has_are_not_looked_into() -> None:
    large: list[Message] = [(1, b"a", b"1", [("content-type", MSGPACK), ("trace", bytes(2**16))])]
    (found,), _ = read(batch(large))
    assert (found.value, found.content_type) == (b"1", JSON)
