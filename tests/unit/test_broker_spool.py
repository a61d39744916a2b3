"""What waits on disk: order, crashes, owners, bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streaming.spool import SEGMENT_BYTES, Outgoing, Spool


def _records(first: int, last: int, size: int = 10) -> list[Outgoing]:
    return [Outgoing("topic", f"k{n}".encode(), str(n).encode().rjust(size)) for n in range(first, last)]


def _drain(spool: Spool) -> list[Outgoing]:
    found = []
    while not spool.empty:
        found += spool.oldest()
        spool.drop()
    return found


def test_records_come_out_in_the_order_they_went_in_across_segments_and_while_reading(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a")
    big = _records(0, 10, SEGMENT_BYTES // 3)
    assert spool.append(big) == 10
    first = spool.oldest()
    assert spool.append(_records(10, 12)) == 2
    assert first == big[: len(first)]
    assert len(first) < 10
    spool.drop()
    assert first + _drain(spool) == big + _records(10, 12)
    spool.close()
    assert not list(tmp_path.iterdir())


def test_the_segment_that_is_read_gets_no_more_records(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a")
    spool.append(_records(0, 2))
    assert spool.oldest() == _records(0, 2)
    spool.append(_records(2, 4))
    spool.drop()
    assert _drain(spool) == _records(2, 4)
    spool.close()


def test_what_a_process_left_is_in_front_for_the_next_one(tmp_path: Path) -> None:
    left = Spool(tmp_path, "a")
    left.append(_records(0, 3))
    left.close()
    again = Spool(tmp_path, "a")
    again.append(_records(3, 5))
    assert _drain(again) == _records(0, 5)
    again.close()


def test_a_dead_owners_records_are_adopted_and_a_live_owners_are_not(tmp_path: Path) -> None:
    live, dead = Spool(tmp_path, "live"), Spool(tmp_path, "dead")
    live.append(_records(0, 1))
    dead.append(_records(1, 3))
    dead._lock.close()  # as if its process had been killed
    heir = Spool(tmp_path, "heir")
    assert _drain(heir) == _records(1, 3)
    assert not (tmp_path / "dead").exists()
    assert _drain(live) == _records(0, 1)
    heir.close()
    live.close()
    dead._close_file()


def test_two_live_owners_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    one, two = Spool(tmp_path, "same/name"), Spool(tmp_path, "same/name")
    one.append(_records(0, 1))
    assert two.empty
    assert sorted(p.name for p in tmp_path.iterdir()) == ["same_name", "same_name-1"]
    one.close()
    two.close()


@pytest.mark.parametrize("cut", [1, 9, 25])
def test_a_cut_off_end_loses_the_last_record_only(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path, "a")
    spool.append(_records(0, 3))
    spool.close()
    (segment,) = (tmp_path / "a").glob("*.spool")
    segment.write_bytes(segment.read_bytes()[:-cut])
    again = Spool(tmp_path, "a")
    assert again.oldest() == _records(0, 2)
    again.close()


def test_what_does_not_fit_is_refused_and_fits_again_later(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a", max_bytes=1000)
    assert spool.append(_records(0, 5, 350)) == 2
    assert spool.append(_records(0, 1, 350)) == 0
    spool.oldest()
    spool.drop()
    assert spool.append(_records(0, 1, 350)) == 1
    spool.close()


def test_a_full_disk_is_an_error_and_what_comes_later_is_still_readable(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a")
    spool.append(_records(0, 2))
    assert spool._file is not None
    os.write(spool._file.fileno(), b"half a rec")
    os.close(spool._file.fileno())  # every write fails from now on
    with pytest.raises(OSError, match="Bad file descriptor"):
        spool.append(_records(2, 3))
    assert spool.append(_records(3, 5)) == 2
    assert _drain(spool) == _records(0, 2) + _records(3, 5)
    spool.close()
