"""What producers packed, unpacked up to a bound: a megabyte of zeros in zstd is thirty gigabytes, and a broker takes it.

kafka-python 3.0.12 unpacks a batch whole, and its lz4 takes as much memory as the frame's header asks for. Here it is unpacked chunk by
chunk, and no further than the bound.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import lz4.frame
import zstandard
from kafka import codec as kafka_codec
from kafka.record.default_records import DefaultRecordBatch

CHUNK_BYTES = 2**20
CODECS = {
    DefaultRecordBatch.CODEC_GZIP: "gzip",
    DefaultRecordBatch.CODEC_SNAPPY: "snappy",
    DefaultRecordBatch.CODEC_LZ4: "lz4",
    DefaultRecordBatch.CODEC_ZSTD: "zstd",
}
_FAILURES = (OSError, EOFError, zlib.error, RuntimeError, zstandard.ZstdError, struct.error)  # RuntimeError: lz4
_XERIAL_BYTES = 16  # of the header that Java's snappy writes in front of its blocks


def unpack(codec: int, packed: bytes | memoryview, most_bytes: int) -> bytes | None:
    """The bytes that were packed; None when they are more than `most_bytes`, and then no more than that were made.

    Args:
        codec: Kafka's number of it.
        packed: As they stand in a batch.
        most_bytes: The bound.

    Raises:
        ValueError: they cannot be unpacked, for the reason given.
    """
    name, chunks, num_bytes = CODECS.get(codec, str(codec)), list[bytes](), 0
    try:
        if name == "snappy":
            return _snappy(bytes(packed), most_bytes)
        for chunk in _chunks(name, packed):
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > most_bytes:
                return None
    except _FAILURES as error:
        raise ValueError(f"{name} cannot unpack it: {error!r}") from error
    return b"".join(chunks)


def _chunks(name: str, packed: bytes | memoryview) -> Iterator[bytes]:
    if name == "lz4":
        frame, left = lz4.frame.LZ4FrameDecompressor(), packed
        while not frame.eof:
            if not (chunk := frame.decompress(left, CHUNK_BYTES)) and not frame.eof:
                raise EOFError("it was cut off")
            yield chunk
            left = b""
        return
    file: Any
    if name == "gzip":
        file = gzip.GzipFile(fileobj=io.BytesIO(packed))
    elif name == "zstd":
        file = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed), read_across_frames=True)
    else:
        raise ValueError(f"codec {name} is unknown")
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _snappy(packed: bytes, most_bytes: int) -> bytes | None:
    """Snappy says in front of each block how long it is unpacked, and makes no more than that."""
    if not kafka_codec.has_snappy():
        raise ValueError("it was packed with snappy: install python-snappy here, or let its producer use zstd, lz4 or gzip")
    blocks = list(_snappy_blocks(packed))
    if sum(map(_declared_bytes, blocks)) > most_bytes:
        return None
    try:
        return b"".join(map(kafka_codec.snappy.decompress, blocks))
    except Exception as error:  # of another class in each of its versions
        raise ValueError(f"snappy cannot unpack it: {error!r}") from error


def _snappy_blocks(packed: bytes) -> Iterator[bytes]:
    if not kafka_codec._detect_xerial_stream(packed):
        yield packed
        return
    at = _XERIAL_BYTES
    while at < len(packed):
        (size,) = struct.unpack_from(">I", packed, at)
        yield packed[at + 4 : at + 4 + size]
        at += 4 + size


def _declared_bytes(block: bytes) -> int:
    """A little-endian number in groups of seven bits, at most five of them."""
    num_bytes = 0
    for i, group in enumerate(block[:5]):
        num_bytes |= (group & 0x7F) << 7 * i
        if group < 0x80:
            break
    return num_bytes
