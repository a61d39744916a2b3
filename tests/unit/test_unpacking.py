"""Packed bytes, and how far they are unpacked."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from types import SimpleNamespace

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kafka import codec as kafka_codec

from streaming.unpacking import CHUNK_BYTES, unpack

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
PACK = {GZIP: lambda content: gzip.compress(content, 1), LZ4: lz4.frame.compress, ZSTD: zstandard.ZstdCompressor().compress}


@given(
    codec=st.sampled_from(sorted(PACK)),
    parts=st.lists(st.binary(max_size=300), min_size=1, max_size=3),
    repeats=st.sampled_from([1, 7, 9_000]),
)
def test_everything_comes_back_up_to_the_bound_and_nothing_above_it(codec: int, parts: list[bytes], repeats: int) -> None:
    """Also of several frames one behind the other, but for lz4, where Kafka's own client reads one."""
    parts = [part * repeats for part in (parts[:1] if codec == LZ4 else parts)]
    packed, whole = b"".join(map(PACK[codec], parts)), b"".join(parts)
    assert unpack(codec, packed, len(whole)) == whole
    assert not whole or unpack(codec, packed, len(whole) - 1) is None


@pytest.mark.parametrize("codec", PACK)
def test_what_is_above_the_bound_is_not_made(codec: int) -> None:
    packed = PACK[codec](bytes(64 * CHUNK_BYTES))
    tracemalloc.start()
    assert unpack(codec, packed, 4 * CHUNK_BYTES) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * CHUNK_BYTES < peak < 8 * CHUNK_BYTES


def test_a_size_that_a_header_claims_is_not_believed() -> None:
    packed = bytearray(lz4.frame.compress(b"a" * 100, content_checksum=False, store_size=True))
    packed[6:14] = struct.pack("<Q", 2**50)
    with pytest.raises(ValueError, match="lz4 cannot unpack it"):
        unpack(LZ4, bytes(packed), 1_000)


@pytest.mark.parametrize("codec", [GZIP, LZ4])  # with zstd too little comes, and the reader misses records
def test_what_was_cut_off_is_no_end(codec: int) -> None:
    with pytest.raises(ValueError, match="cannot unpack it"):
        unpack(codec, PACK[codec](bytes(range(256)) * 40)[:-9], 2**20)


def test_a_codec_of_the_future_is_named() -> None:
    with pytest.raises(ValueError, match="codec 7 is unknown"):
        unpack(7, b"?", 1)


def literal(content: bytes) -> bytes:
    """A block of snappy, of less than 61 bytes: its length unpacked, then one literal."""
    return bytes([len(content), (len(content) - 1) << 2]) + content


@pytest.mark.parametrize("in_blocks", [False, True])
def test_snappy_is_unpacked_as_far_as_it_declares_and_not_at_all_above_the_bound(monkeypatch: pytest.MonkeyPatch, in_blocks: bool) -> None:
    """The package is not installed here: what it does is written down for literals."""
    unpacked: list[bytes] = []

    def decompress(block: bytes) -> bytes:
        unpacked.append(block[2:])
        return block[2:]

    monkeypatch.setattr(kafka_codec, "snappy", SimpleNamespace(decompress=decompress))
    blocks = [literal(b"abc"), literal(b"defgh")] if in_blocks else [literal(b"abcdefgh")]
    header = b"\x82SNAPPY\0" + struct.pack(">ii", 1, 1)
    packed = header + b"".join(struct.pack(">i", len(block)) + block for block in blocks) if in_blocks else blocks[0]
    assert unpack(SNAPPY, packed, 7) is None and not unpacked
    assert unpack(SNAPPY, packed, 8) == b"abcdefgh"
    long = b"\xff\xff\xff\xff\x0f" + b"?"  # 4 GiB
    assert unpack(SNAPPY, header + struct.pack(">i", len(long)) + long, 2**31) is None
