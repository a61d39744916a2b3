"""What files of rejects quote of a user goes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from esrl_ray.errors import WireError
from esrl_ray.vocabulary import Refusal
from streaming.erase_rejects import erase_rejects
from streaming.files import SAMPLE_BYTES, Rejects
from streaming.records import Record
from streaming.wire import JSON, MSGPACK
from tests.unit.test_import import LATER, imported, visits, wire, write_lines, write_parquet

USER = "ann-\u00e4"
_encode: dict[bytes, Any] = {JSON: msgspec.json.encode, MSGPACK: msgspec.msgpack.encode}


def rejects_of(path: Path, values: Sequence[bytes], content_type: bytes = JSON) -> list[dict[str, Any]]:
    rejects = Rejects(path, "t", max_share=1.0)
    for row, value in enumerate(values):
        rejects.send(Record("decisions", 0, row, -1, None, value, content_type), WireError("wrong", Refusal.WRONG_FIELD))
    rejects.flush()
    return entries(path)


def entries(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def cut_in_the_id(content_type: bytes, user: str, kept: int) -> bytes:
    """A row of which the sample ends in the middle of the id."""
    whole = _encode[content_type]({"pad": "", "user_id": user, "states": "x" * SAMPLE_BYTES})
    end = whole.find(user.encode()) + kept
    return bytes(
        _encode[content_type]({"pad": "p" * (SAMPLE_BYTES - end - 2 * (content_type == MSGPACK)), "user_id": user, "x": "x" * SAMPLE_BYTES})
    )


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
def test_samples_that_hold_the_user_are_blanked_and_the_others_stay(tmp_path: Path, content_type: bytes) -> None:
    encode, path = _encode[content_type], tmp_path / "r.jsonl"
    named = [
        encode({"user_id": USER, "states": 7}),
        encode({"uid": USER}),  # refused because the field has another name
        encode({"users": [{"name": USER}]}),
        encode({"user_id": USER, "states": "x" * SAMPLE_BYTES}),  # cut behind it
        cut_in_the_id(content_type, USER, 3),
    ]
    others = [
        encode({"user_id": USER + "2", "states": 7}),
        encode({"user_id": "bob", "note": f"not {USER}, but like her"}),
        encode({"user_id": USER + "2", "states": "x" * SAMPLE_BYTES}),
        cut_in_the_id(content_type, "bob-bob", 3),
        b"",
    ]
    before = rejects_of(path, [*named, *others], content_type)
    size, inode = path.stat().st_size, path.stat().st_ino
    assert erase_rejects(path, {USER}, dry_run=True) == (len(named), 0) and entries(path) == before
    assert erase_rejects(path, {USER}, dry_run=False) == (len(named), 0)
    blank = [entry | {"sample": ""} for entry in before[: len(named)]]
    assert entries(path) == blank + before[len(named) :]
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode), "an import may be appending to it"
    assert erase_rejects(path, {USER}, dry_run=False) == (0, 0), "twice is once"


@pytest.mark.parametrize(
    ("sample", "quotes"),
    [
        (b"ann,7,8", True),  # no JSON at all
        (b'{"user_id": "ann", "states": [NaN]}', True),
        (b'{"user_id": "\\u0061nn", "states": [NaN]}', True),
        (b"anna,7,8", False),
        (b"{not json", False),
        (b'{"user_id": 17}', True),
        (b'{"user_id": "bob", "round": 17}', False),
    ],
)
def test_rows_without_fields_are_searched_as_text(tmp_path: Path, sample: bytes, quotes: bool) -> None:
    path = tmp_path / "r.jsonl"
    rejects_of(path, [sample])
    assert erase_rejects(path, {"ann", "17"}, dry_run=False) == (quotes, 0)
    assert entries(path)[0]["sample"] == ("" if quotes else sample.decode())


def test_a_reason_that_quotes_the_user_goes_too(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "r.jsonl", "t", max_share=1.0)
    rejects.send(Record("decisions", 0, 4, -1, None, b"{}", JSON), WireError("decision_id 'ann' is not signed", Refusal.NOT_SIGNED))
    rejects.flush()
    assert erase_rejects(tmp_path / "r.jsonl", {"ann"}, dry_run=False) == (1, 0)
    expected = {"table": "t", "topic": "decisions", "row": 4, "code": "not-signed", "reason": "", "sample": ""}
    assert entries(tmp_path / "r.jsonl") == [expected]


def test_lines_that_are_no_refused_rows_are_counted_when_they_have_the_id_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rejects_of(path, [b"ann"])
    content = path.read_bytes() + b'{}\nnotes on ann\n[1]\n{"table":"t","topic":"decisions","row":3,"sample":"ann'
    path.write_bytes(content)
    assert erase_rejects(path, {"ann"}, dry_run=False) == (1, 2)
    assert path.read_bytes().splitlines()[1:] == content.splitlines()[1:]


def test_a_line_that_an_import_is_writing_is_read_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    rejects_of(path, [b'{"user_id": "bob"}', b'{"user_id": "u-42"}'])
    whole = path.read_bytes()
    cut = whole.index(b"u-42") + 2
    path.write_bytes(whole[:cut])

    def write_on(seconds: float) -> None:
        with path.open("ab") as file:
            file.write(whole[cut:])

    monkeypatch.setattr("streaming.erase_rejects.time.sleep", write_on)
    assert erase_rejects(path, ["u-42"], dry_run=False) == (1, 0)
    assert b"u-42" not in path.read_bytes() and path.stat().st_size == len(whole)
    path.write_bytes(whole[:cut])
    monkeypatch.setattr("streaming.erase_rejects.time.sleep", lambda seconds: None)
    assert erase_rejects(path, ["u-42"], dry_run=False) == (0, 1)  # it was cut off for good


def test_an_import_knows_what_it_refused_when_its_sample_is_gone(tmp_path: Path) -> None:
    decisions, events = visits()
    rows = [wire(decision) for decision in decisions]
    user = str(rows[0]["user_id"])
    rows.insert(2, {**rows[0], "decision_id": "other", "states": [[1.0, 2.0]] * 3})
    paths = write_lines(tmp_path / "d.jsonl", rows), write_parquet(tmp_path / "f.parquet", [wire(event) for event in events])
    said = imported(tmp_path, *paths, LATER)
    rejects = tmp_path / "rejects.jsonl"
    assert erase_rejects(rejects, {user}, dry_run=False) == (1, 0)
    content = rejects.read_bytes()
    assert f'"{user}"'.encode() not in content
    assert imported(tmp_path, *paths, LATER) == said and rejects.read_bytes() == content
