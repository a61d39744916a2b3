"""Reads and checks a folder of KuaiRand files: the standard log, user features, video features and, when there, earlier sequences.

Time is cut in blocks of two days from the first day of the log. The last block is for testing, the one before it for development, all
before are for training; upstream models, replay and evaluation go by these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from esrl_ray.errors import InputDataError
from esrl_ray.vocabulary import Floats, Ints

BLOCK_DAYS = 2
MIN_BLOCKS = 4
VALID_PLAY_S = 10.0
FINISHED_SHARE = 0.95

Kind = Literal["integer", "number", "text", "list of integer"]
Longs = npt.NDArray[np.int64]

LOG: Mapping[str, Kind] = dict.fromkeys(
    (
        *("user_id", "video_id", "date", "hourmin", "time_ms", "tab", "is_click", "is_like", "long_view"),
        *("play_time_ms", "duration_ms", "comment_stay_time", "is_profile_enter"),
    ),
    "integer",
)
USER_NUMBERS = ("is_live_streamer", "is_video_author", "follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USERS: Mapping[str, Kind] = {"user_id": "integer", "user_active_degree": "text", **dict.fromkeys(USER_NUMBERS, "number")}
VIDEOS: Mapping[str, Kind] = {
    **dict.fromkeys(("video_id", "author_id"), "integer"),
    **dict.fromkeys(("video_type", "upload_dt", "upload_type", "tag"), "text"),
    **dict.fromkeys(("video_duration", "server_width", "server_height", "music_type"), "number"),
}
SEQUENCES: Mapping[str, Kind] = {"user_id": "integer", **dict.fromkeys(("watch_seq", "long_watch_seq", "like_seq"), "list of integer")}


@dataclass(frozen=True, slots=True)
class Exposures:
    """n exposures of the standard log, ordered by block, user and time. `user` and `video` are positions in the feature tables."""

    user: Ints  # (n,)
    video: Ints  # (n,)
    block: Ints  # (n,) 0..num_blocks-1
    time_ms: Longs  # (n,)
    hour: Ints  # (n,) 0..23
    tab: Ints  # (n,)
    duration_s: Floats  # (n,)
    play_s: Floats  # (n,)
    click: Floats  # (n,) 0 or 1, as all below
    long_view: Floats  # (n,)
    finish: Floats  # (n,) played at least 95 % of its duration
    like: Floats  # (n,)
    comment_open: Floats  # (n,)
    profile_enter: Floats  # (n,)

    @property
    def valid(self) -> Floats:
        """(n,) 1 = played more than 10 s or a long view: the label of MTF-GAUC."""
        return np.maximum(self.play_s > VALID_PLAY_S, self.long_view).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Earlier:
    """m exposures before the log, ordered by user; only these facts are known of them."""

    user: Ints  # (m,)
    video: Ints  # (m,)
    long_view: Floats  # (m,)
    like: Floats  # (m,)


@dataclass(frozen=True, slots=True)
class KuaiRandLog:
    """Everything that was read. Texts and identifiers are codes; missing numbers are NaN, missing texts -1."""

    exposures: Exposures
    earlier: Earlier
    user_ids: Longs  # (U,)
    users: Floats  # (U, len(user_columns))
    user_columns: tuple[str, ...]
    video_ids: Longs  # (V,)
    videos: Floats  # (V, len(video_columns))
    video_columns: tuple[str, ...]
    author: Ints  # (V,)
    tag: Ints  # (V,)
    num_blocks: int
    digest: str  # of all files read

    @property
    def num_training_blocks(self) -> int:
        """Blocks 0..this-1 train the upstream models; then come the development block and the test block."""
        return self.num_blocks - 2


def read_log(folder: Path) -> KuaiRandLog:
    """Read and check a folder.

    Args:
        folder: Holds `log_standard*`, `user_features*`, `video_features_basic*` and perhaps `user_sequences*`, each one or more
            `.parquet` or `.csv` files.

    Raises:
        InputDataError: a file or column is missing, has another type than needed, or the log is too short to be split.
    """
    digest = hashlib.sha256()
    log = _read(folder, "log_standard", LOG, digest)
    users = _read(folder, "user_features", USERS, digest)
    videos = _read(folder, "video_features_basic", VIDEOS, digest)
    earlier = _read(folder, "user_sequences", SEQUENCES, digest, optional=True)
    block = _blocks(log["date"].to_numpy(), folder)
    user_ids, user_rows = _ids(users["user_id"].to_numpy(), log["user_id"].to_numpy())
    video_ids, video_rows = _ids(videos["video_id"].to_numpy(), log["video_id"].to_numpy())
    user_columns = tuple(n for n in USERS if n != "user_id")
    video_columns = tuple(n for n in VIDEOS if n not in ("video_id", "author_id", "tag"))
    return KuaiRandLog(
        exposures=_exposures(log, block, user_ids, video_ids),
        earlier=_earlier(earlier, user_ids, video_ids),
        user_ids=user_ids,
        users=np.stack([_values(users[n], user_rows) for n in user_columns], axis=1),
        user_columns=user_columns,
        video_ids=video_ids,
        videos=np.stack([_values(videos[n], video_rows) for n in video_columns], axis=1),
        video_columns=video_columns,
        author=_codes(videos["author_id"], video_rows),
        tag=_codes(videos["tag"], video_rows),
        num_blocks=int(block.max()) + 1,
        digest=digest.hexdigest(),
    )


def _read(folder: Path, stem: str, needed: Mapping[str, Kind], digest: hashlib._Hash, *, optional: bool = False) -> pa.Table:
    files = sorted(p for p in folder.glob(f"{stem}*") if p.suffix in (".parquet", ".csv")) if folder.is_dir() else []
    if not files:
        if optional:
            return pa.table(
                {n: pa.array([], pa.list_(pa.int64()) if kind == "list of integer" else pa.int64()) for n, kind in needed.items()}
            )
        state = "is not there" if not folder.is_dir() else f"holds {sorted(p.name for p in folder.iterdir())[:8]}"
        raise InputDataError(f"no file {stem}*.parquet or {stem}*.csv: the folder {state}", str(folder), "name a folder of KuaiRand files")
    tables = []
    for file in files:
        content = file.read_bytes()
        digest.update(f"{stem}{file.suffix}{len(content)}".encode() + content)
        tables.append(_checked(_table(file, needed), file, needed))
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    if not table.num_rows and not optional:
        raise InputDataError("the file has no rows, expected at least one", ", ".join(map(str, files)))
    return table


def _table(file: Path, needed: Mapping[str, Kind]) -> pa.Table:
    try:
        if file.suffix == ".parquet":
            return pa.parquet.ParquetFile(file).read(columns=None)
        texts = {n: pa.string() for n, kind in needed.items() if kind == "text"}
        return pa.csv.read_csv(file, convert_options=pa.csv.ConvertOptions(column_types=texts, strings_can_be_null=True))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputDataError(f"cannot be read as {file.suffix[1:]}: {error}", str(file)) from error


def _checked(table: pa.Table, file: Path, needed: Mapping[str, Kind]) -> pa.Table:
    for name, kind in needed.items():
        if name not in table.column_names:
            raise InputDataError(f"column {name!r} is missing, expected {kind}; found {table.column_names}", str(file))
        column = table[name]
        found = column.type
        if not _is(found, kind):
            raise InputDataError(f"column {name!r} has the type {found}, expected {kind}", str(file))
        if kind == "integer" and column.null_count:
            raise InputDataError(f"column {name!r} has {column.null_count} missing values, expected an {kind} in each row", str(file))
    return table.select(list(needed))


def _is(found: pa.DataType, kind: Kind) -> bool:
    types = pa.types
    if kind == "text":
        return bool(types.is_string(found) or types.is_large_string(found))
    if kind == "list of integer":
        return bool((types.is_list(found) or types.is_large_list(found)) and types.is_integer(found.value_type))
    return bool(types.is_integer(found) or (kind == "number" and (types.is_floating(found) or types.is_null(found))))


def _blocks(dates: npt.NDArray[np.generic], folder: Path) -> Ints:
    """Block of each exposure from its date as yyyymmdd."""
    unique, inverse = np.unique(dates, return_inverse=True)
    texts = [f"{int(d):08d}" for d in unique]
    where = str(folder / "log_standard*")
    try:
        days = np.array([f"{t[:4]}-{t[4:6]}-{t[6:]}" for t in texts], "datetime64[D]")
    except ValueError as error:
        raise InputDataError(f"column 'date' holds a value that is not yyyymmdd: {error}", where) from error
    block = ((days - days[0]).astype(np.int64) // BLOCK_DAYS).astype(np.int32)
    if (found := len(np.unique(block))) < MIN_BLOCKS or found != block[-1] + 1:
        raise InputDataError(
            f"column 'date' has {len(texts)} days from {texts[0]} to {texts[-1]}, in {found} blocks of {BLOCK_DAYS} days, "
            f"expected at least {MIN_BLOCKS} such blocks and none of them empty",
            where,
        )
    per_row: Ints = block[inverse]
    return per_row


def _exposures(log: pa.Table, block: Ints, user_ids: Longs, video_ids: Longs) -> Exposures:
    c = {n: log[n].to_numpy() for n in log.column_names}
    order = np.lexsort((c["video_id"], c["time_ms"], c["user_id"], block))
    c = {n: v[order] for n, v in c.items()}
    flags = {n: (c[n] > 0).astype(np.float32) for n in ("is_click", "long_view", "is_like", "comment_stay_time", "is_profile_enter")}
    play_s, duration_s = (np.maximum(c[n], 0).astype(np.float32) / 1000 for n in ("play_time_ms", "duration_ms"))
    return Exposures(
        user=np.searchsorted(user_ids, c["user_id"]).astype(np.int32),
        video=np.searchsorted(video_ids, c["video_id"]).astype(np.int32),
        block=block[order],
        time_ms=c["time_ms"].astype(np.int64),
        hour=np.clip(c["hourmin"].astype(np.int32) // 100, 0, 23),
        tab=np.maximum(c["tab"], 0).astype(np.int32),
        duration_s=duration_s,
        play_s=play_s,
        click=flags["is_click"],
        long_view=flags["long_view"],
        finish=((play_s >= FINISHED_SHARE * duration_s) & (duration_s > 0)).astype(np.float32),
        like=flags["is_like"],
        comment_open=flags["comment_stay_time"],
        profile_enter=flags["is_profile_enter"],
    )


def _earlier(sequences: pa.Table, user_ids: Longs, video_ids: Longs) -> Earlier:
    """Exposures from the sequences; a watched video is a long view or liked when it is in the user's sequence of those."""
    width = np.int64(len(video_ids))
    pairs = {}
    for name in ("watch_seq", "long_watch_seq", "like_seq"):
        column = sequences[name]
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        user = _position(user_ids, np.repeat(sequences["user_id"].to_numpy(), lengths))
        video = _position(video_ids, pc.list_flatten(column).to_numpy())
        known = (user >= 0) & (video >= 0)
        pairs[name] = user[known] * width + video[known]
    watched = np.sort(pairs["watch_seq"])
    return Earlier(
        user=(watched // width).astype(np.int32),
        video=(watched % width).astype(np.int32),
        long_view=is_in(watched, pairs["long_watch_seq"]).astype(np.float32),
        like=is_in(watched, pairs["like_seq"]).astype(np.float32),
    )


def _ids(described: npt.NDArray[np.generic], logged: npt.NDArray[np.generic]) -> tuple[Longs, Longs]:
    """All ids, ascending, and the row of each in the features; -1 for one that only the log knows."""
    ids, rows = np.unique(np.concatenate([described, logged]).astype(np.int64), return_index=True)
    return ids, np.where(rows < len(described), rows, -1)


def is_in(wanted: Longs, members: Longs) -> npt.NDArray[np.bool_]:
    """Whether each wanted number is among the members; by sorting, which is 5 times faster here than the hashing of `np.isin`."""
    return _position(np.sort(members), wanted) >= 0 if len(members) else np.zeros(len(wanted), bool)


def _position(ids: Longs, wanted: npt.NDArray[np.generic]) -> Longs:
    """Position in ascending ids, -1 where unknown."""
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1)


def _values(column: pa.ChunkedArray, rows: Longs) -> Floats:
    """Numbers at feature rows, NaN where missing; texts as codes."""
    if _is(column.type, "text"):
        return _codes(column, rows).astype(np.float32)
    numbers = np.append(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.nan).astype(np.float32)
    return numbers[rows]


def _codes(column: pa.ChunkedArray, rows: Longs) -> Ints:
    """Ranks among the sorted values at feature rows, -1 where missing."""
    distinct = pc.unique(column.drop_null())
    found = pc.fill_null(pc.index_in(column, distinct.take(pc.sort_indices(distinct))), -1)
    return np.append(found.to_numpy(zero_copy_only=False), -1).astype(np.int32)[rows]
