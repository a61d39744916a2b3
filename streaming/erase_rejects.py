"""Taking one user out of files of rejects: samples of rows that an import refused or counted late (`streaming.files.Rejects`).

The row's place and code stay, or the next import would write it again. What it quotes is blanked where it stands, in as many bytes: an
import may append to the file meanwhile, and no copy with the user is left. Running it again finds nothing.

Which samples: those that hold an id as a text, whatever the field's name is, for a row may be refused because its fields have other names.
A sample that was cut, or was no event to begin with, has no fields: it goes when the id stands in it as a word, or may have been cut there.
"""

from __future__ import annotations

import binascii
import os
import re
import time
from base64 import b64decode
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

TORN_TRIES, TORN_S = 20, 0.05
"""A last line without its end is read again, so often and after so long: an import is writing it."""
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")


def erase_rejects(path: Path, user_ids: Collection[str], *, dry_run: bool) -> tuple[int, int]:
    """Blank what a file quotes of a user.

    Args:
        path: File of rejects.
        user_ids: Every form of the user's id that it may have.
        dry_run: Only count.

    Returns:
        Rows that quote the user; lines that have the id in them and are no refused rows (something else, or cut off by a crash): they stay.
    """
    num_rows = num_unreadable = at = 0
    with path.open("rb" if dry_run else "r+b") as file:
        tries = 0
        while line := file.readline():
            if not line.endswith(b"\n") and (tries := tries + 1) <= TORN_TRIES:  # an import is writing it, or was cut off
                time.sleep(TORN_S)
                file.seek(at)
                continue
            try:
                if (blank := _blanked(line, user_ids)) is not None:
                    num_rows += 1
                    if not dry_run:
                        os.pwrite(file.fileno(), blank, at)
            except (msgspec.MsgspecError, KeyError, TypeError):
                text = line.decode(errors="replace")
                num_unreadable += _has_word(text, user_ids) or _ends_within(text, user_ids)
            at += len(line)
        if num_rows and not dry_run:
            os.fsync(file.fileno())
    return num_rows, num_unreadable


def _blanked(line: bytes, user_ids: Collection[str]) -> bytes | None:
    """The line without what it quotes of the user, as long as it was; None when that is nothing."""
    entry = msgspec.json.decode(line, type=dict[str, Any])
    in_reason = _has_word(entry["reason"], user_ids)
    if not in_reason and not _quotes(entry["sample"], user_ids):
        return None
    blank = msgspec.json.encode(entry | {"reason": "" if in_reason else entry["reason"], "sample": ""})
    return blank[:-1].ljust(len(line.rstrip(b"\n")) - 1) + b"}" + line[len(line.rstrip(b"\n")) :]


def _quotes(sample: str, user_ids: Collection[str]) -> bool:
    """Whether a sample, text or msgpack in base64, holds the id."""
    try:
        packed = b64decode(sample, validate=True)
    except (binascii.Error, ValueError):
        packed = b""
    for decode, content in ((msgspec.json.decode, sample.encode()), (msgspec.msgpack.decode, packed)):
        try:
            if isinstance(fields := decode(content), dict):
                return str(fields.get("user_id")) in user_ids or _holds(fields, user_ids)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            continue
    for encoded in map(msgspec.msgpack.encode, user_ids):
        if encoded in packed or any(packed.endswith(encoded[:n]) for n in range(2, len(encoded))):
            return True
    text = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), sample).rstrip("\ufffd")
    return _ends_within(text, user_ids) or _has_word(text, user_ids)


def _ends_within(text: str, user_ids: Collection[str]) -> bool:
    """Whether a text was cut off in the middle of the id."""
    return any(text.endswith(f'"{user_id[:n]}') for user_id in user_ids for n in range(1, len(user_id) + 1))


def _holds(value: Any, user_ids: Collection[str]) -> bool:
    if isinstance(value, dict):
        return any(_holds(name, user_ids) or _holds(inner, user_ids) for name, inner in value.items())
    if isinstance(value, list):
        return any(_holds(inner, user_ids) for inner in value)
    return isinstance(value, str) and value in user_ids


def _has_word(text: str, user_ids: Collection[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(user_id)}(?!\w)", text) for user_id in user_ids)
