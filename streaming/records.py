"""Raw Kafka messages, read out of what a fetch brought: what kafka-python does record by record, in a quarter of its time.

kafka-python 3.0.12 needs 6.5 us a record: some thirty calls for a dozen numbers, an object in between, headers decoded each time. Here each
record is one tuple, and headers, the same bytes almost every time, are looked up. Checksums are checked as before. Messages of old formats
are kafka-python's to take apart. Its own reading of headers fails on a name that is not UTF-8, which any producer may send and no broker
refuses: one such record would hold up its partition for good.

Memory: nobody but us bounds what a batch unpacks to. One above `MAX_BATCH_BYTES` is not read: each of its records becomes a dead letter, as
one too large for us does, and the reader goes on. To stop would let anybody who may write to a topic hold up a partition with one message.
For one partition of a topic a poll takes at most `FETCH_BYTES` and one batch more.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from kafka.consumer.fetcher import Fetcher, IsolationLevel
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.legacy_records import LegacyRecordBatch
from kafka.record.util import decode_varint

from streaming.unpacking import unpack
from streaming.wire import JSON

ATTEMPTS = "attempts"

_logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 64 * 2**20
"""Of the records of one batch, unpacked. Kafka bounds the packed bytes only: to a megabyte, unless a topic's `max.message.bytes` says more;
feedback as JSON packs to a twentieth at best."""
FETCH_BYTES = 16 * 2**20
"""When so much of a fetch is unpacked, what is left of it is fetched again: it may be four hundred such batches, and 15 s of work."""

_MAGIC = 2  # of the format of batches that Kafka has since 0.11
_OF_TRANSACTIONS = DefaultRecordBatch.TRANSACTIONAL_MASK | DefaultRecordBatch.CONTROL_MASK
_USUAL_BYTES = 128  # of headers that are worth remembering
_MAX_HEADER_BYTES = 2**16  # of headers that are looked at; as objects they are thirty times as large
_ATTEMPTS_DIGITS = 6  # more are none of ours; Python refuses to read 5,000


class Record(NamedTuple):
    """One raw Kafka message."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    content_type: bytes  # of the header; JSON when there is none
    attempts: int = 0  # of the header: how often a dead letter with this value was sent again
    too_large: str = ""  # why key and value are not there: its batch unpacks to more than `MAX_BATCH_BYTES`


class FetchedRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # kafka-python is untyped
    """The records of one fetch of one partition, as `Record`; stands in for kafka-python's class of a fetcher."""

    def _unpack_records(self, tp: Any, fetched: Any, *deserializers: None) -> Iterator[Record]:
        last, num_bytes = None, 0
        while fetched.has_next() and num_bytes < FETCH_BYTES:  # what is left is fetched again
            last = fetched.next_batch()
            where = f"{tp.topic}[{tp.partition}]@{last.base_offset}{f'-{last.last_offset}' if last.magic == _MAGIC else ''}"
            if not last.validate_crc():
                raise CorruptRecordError(f"{where}: the batch fails its checksum")
            self.bytes_read += last.size_in_bytes
            if last.magic != _MAGIC:
                yield from self._old_records(tp, last, where)
                continue
            self.leader_epoch = last.leader_epoch
            if last.attributes & _OF_TRANSACTIONS and self._is_unread(last):
                self.next_fetch_offset = last.next_offset
                continue
            self.records_read += last.records_count
            content = _unpacked(last.compression_type, memoryview(last._buffer)[last._pos :], where)
            num_bytes += MAX_BATCH_BYTES if content is None else len(content)
            if content is None:
                yield from self._too_large(tp, last, where)
            else:
                yield from self._records(tp, last, content, where)
            self.next_fetch_offset = last.next_offset  # compaction may have removed the last record
        self.drain()

    def _is_unread(self, batch: DefaultRecordBatch) -> bool:
        """Whether a batch marks the end of a transaction, or belongs to one that was aborted."""
        if self.isolation_level == IsolationLevel.READ_COMMITTED:
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if self._contains_abort_marker(batch):
                self.aborted_producer_ids.discard(batch.producer_id)
            elif self._is_batch_aborted(batch):
                return True
        return bool(batch.is_control_batch)

    def _records(self, tp: Any, batch: DefaultRecordBatch, content: bytes, where: str) -> Iterator[Record]:
        """Those of one batch of format 2: length, attributes, time, offset, key, value, headers; numbers are varints.

        One by one: the smallest record has seven bytes, and two hundred as a tuple.
        """
        (topic, partition), at, num_bytes, varint = tp, 0, len(content), decode_varint
        first_offset, first_ms = batch.base_offset, batch.first_timestamp
        appended_ms = batch.max_timestamp if batch.timestamp_type == DefaultRecordBatch.LOG_APPEND_TIME else None
        try:
            for _ in range(batch.records_count):
                length, at = varint(content, at)
                end = at + length
                later_ms, at = varint(content, at + 1)
                number, at = varint(content, at)
                size, at = varint(content, at)
                key = content[at : at + size] if size >= 0 else None
                size, at = varint(content, at + size if size > 0 else at)
                value = content[at : at + size] if size >= 0 else None
                if size > 0:
                    at += size
                if not at < end <= num_bytes:
                    raise ValueError(f"it ends at {end} of {num_bytes} bytes, and its headers begin at {at}")
                told = content[at:end]
                content_type, attempts = (_usual_headers if end - at <= _USUAL_BYTES else _headers)(told)
                time_ms = first_ms + later_ms if appended_ms is None else appended_ms
                at = end
                self.next_fetch_offset = (offset := first_offset + number) + 1
                yield Record(topic, partition, offset, time_ms, key, value, content_type, attempts)
        except (ValueError, IndexError) as error:
            raise CorruptRecordError(f"{where}: a record cannot be read: {error!r}") from error
        if at != num_bytes:
            raise CorruptRecordError(f"{where}: {num_bytes} bytes, and its records end at {at}")

    def _too_large(self, tp: Any, batch: DefaultRecordBatch, where: str) -> Iterator[Record]:
        """Those of a batch that is not unpacked: all of them come from one producer, who sent no such batch by mistake."""
        _logger.warning("batch too large where=%s bytes=%d producer_id=%d", where, batch.size_in_bytes, batch.producer_id)
        reason = f"the batch {where} has {batch.size_in_bytes:,} bytes, unpacked more than {MAX_BATCH_BYTES:,}: it is not read"
        for offset in range(batch.base_offset, batch.next_offset):
            self.next_fetch_offset = offset + 1
            yield Record(tp.topic, tp.partition, offset, batch.max_timestamp, None, None, JSON, too_large=reason)

    def _old_records(self, tp: Any, batch: LegacyRecordBatch, where: str) -> Iterator[Record]:
        """Those of one batch of a format before 2: one message, which may hold others packed in its value."""
        try:
            if batch.compression_type:
                _, packed = batch._read_key_value(batch.KEY_OFFSET_V1 if batch.magic else batch.KEY_OFFSET_V0)
                if (content := _unpacked(batch.compression_type, packed, where)) is None:
                    raise CorruptRecordError(f"{where}: the batch unpacks to more than {MAX_BATCH_BYTES:,} bytes")
                batch._buffer, batch._decompressed = memoryview(content), True
            for raw in batch:
                if not raw.validate_crc():
                    raise CorruptRecordError(f"{tp.topic}[{tp.partition}]@{raw.offset}: the record fails its checksum")
                self.records_read += 1
                self.next_fetch_offset = raw.offset + 1
                yield Record(tp.topic, tp.partition, raw.offset, raw.timestamp, raw.key, raw.value, *_told(raw.headers))
        except (ValueError, IndexError, TypeError, AssertionError, struct.error) as error:
            raise CorruptRecordError(f"{where}: a record cannot be read: {error!r}") from error


def _unpacked(codec: int, packed: memoryview, where: str) -> bytes | None:
    if not codec:
        return bytes(packed)
    try:
        return unpack(codec, packed, MAX_BATCH_BYTES)
    except ValueError as error:
        raise CorruptRecordError(f"{where}: {error}") from error


def _headers(told: bytes) -> tuple[bytes, int]:
    """Content type and attempts from the bytes of all headers."""
    if len(told) > _MAX_HEADER_BYTES:
        return _told([])
    headers, at = [], 0
    count, at = decode_varint(told, at)
    for _ in range(count):
        size, at = decode_varint(told, at)
        name = told[at : at + size].decode(errors="replace")
        size, at = decode_varint(told, at + size)
        headers.append((name, told[at : at + size] if size >= 0 else None))
        at += max(size, 0)
    if at != len(told) or count < 0:
        raise ValueError(f"{count} headers in {len(told)} bytes end at {at}")
    return _told(headers)


_usual_headers = lru_cache(maxsize=1024)(_headers)


def _told(headers: list[tuple[str, bytes | None]]) -> tuple[bytes, int]:
    content_type, attempts = JSON, 0
    for name, value in headers:
        if name == "content-type" and value is not None:
            content_type = value
        elif name == ATTEMPTS and value is not None and value.isdigit() and len(value) <= _ATTEMPTS_DIGITS:
            attempts = int(value)
    return content_type, attempts
