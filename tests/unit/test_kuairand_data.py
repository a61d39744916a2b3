"""Reading a folder of KuaiRand files, on a small one with the same columns; `write_folder` makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from esrl_ray.errors import InputDataError
from esrl_ray.simulation.kuairand_data import USER_NUMBERS, KuaiRandLog, read_log

REAL = Path(__file__).parents[3] / "shared" / "data" / "kuairand"
NUM_USERS, NUM_VIDEOS, NUM_DAYS = 40, 30, 12


def tables(seed: int = 0) -> dict[str, pa.Table]:
    """A small world: videos differ in quality, some users watch anything."""
    rng = np.random.default_rng(seed)
    n = NUM_USERS * NUM_DAYS * 3
    user, video, day = rng.integers(0, NUM_USERS, n), rng.integers(0, NUM_VIDEOS, n), rng.integers(0, NUM_DAYS, n)
    hour = rng.integers(0, 24, n)
    liked = rng.random(n) < (0.1 + 0.6 * (video % 5) / 4)
    play = np.where(liked, 12_000, 2_000) + rng.integers(0, 3_000, n)
    date = np.array([20220425 + d if d < 6 else 20220501 + d - 6 for d in day])
    log = {
        "user_id": user * 3,
        "video_id": video + 100,
        "date": date,
        "hourmin": hour * 100,
        "time_ms": 1_650_816_000_000 + day * 86_400_000 + hour * 3_600_000 + rng.integers(0, 3_600_000, n),
        "tab": rng.integers(0, 3, n),
        "is_click": liked.astype(int),
        "is_like": (rng.random(n) < 0.05).astype(int),
        "long_view": (play > 13_000).astype(int),
        "play_time_ms": play,
        "duration_ms": np.full(n, 14_000),
        "comment_stay_time": np.where(rng.random(n) < 0.05, 900, 0),
        "is_profile_enter": (rng.random(n) < 0.05).astype(int),
    }
    u, v = np.arange(NUM_USERS), np.arange(NUM_VIDEOS)
    users = {"user_id": u * 3, "user_active_degree": [f"degree_{i % 3}" for i in u]}
    users |= dict.fromkeys(USER_NUMBERS, u)
    videos = {"video_id": v + 100, "author_id": v // 2, "video_type": ["NORMAL"] * NUM_VIDEOS, "upload_dt": ["2022-04-10"] * NUM_VIDEOS}
    videos |= {"upload_type": ["Web", "App"] * (NUM_VIDEOS // 2), "tag": [None if i == 0 else str(i % 4) for i in v]}
    videos |= {k: v.astype(float) for k in ("video_duration", "server_width", "server_height", "music_type")}
    watched = [[100 + (i + j) % NUM_VIDEOS for j in range(5)] for i in u]
    sequences = {"user_id": u * 3, "watch_seq": watched, "long_watch_seq": [w[:2] for w in watched], "like_seq": [w[:1] for w in watched]}
    return {
        "log_standard_small": pa.table(log),
        "user_features_small": pa.table(users),
        "video_features_basic_small": pa.table(videos),
        "user_sequences_small": pa.table(sequences),
    }


def write_folder(folder: Path, change: Callable[[dict[str, pa.Table]], None] = lambda _: None, *, seed: int = 0) -> Path:
    """Write the small world, after a change to its tables."""
    made = tables(seed)
    change(made)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in made.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def with_column(table: pa.Table, name: str, values: object) -> pa.Table:
    """The table with one column replaced."""
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def test_a_folder_becomes_exposures_ordered_by_block_user_and_time(tmp_path: Path) -> None:
    log = read_log(write_folder(tmp_path))
    x = log.exposures
    assert (log.num_blocks, log.num_training_blocks) == (6, 4)
    order = np.lexsort((x.time_ms, x.user, x.block))
    assert np.array_equal(order, np.arange(len(x.user)))
    written = tables()["log_standard_small"]
    assert len(x.user) == written.num_rows
    assert x.click.sum() == sum(written["is_click"].to_pylist())
    assert set(log.user_ids[x.user]) == set(written["user_id"].to_pylist())


def test_labels_are_those_of_the_definition(tmp_path: Path) -> None:
    def two_exposures(made: dict[str, pa.Table]) -> None:
        log = made["log_standard_small"]
        # 10 s are not more than 10 s; 13.3 s of 14 s are 95 %; the third was a long view of 3 s.
        play = [10_000, 13_300, 3_000, *[0] * (log.num_rows - 3)]
        log = with_column(log, "play_time_ms", play)
        made["log_standard_small"] = with_column(log, "long_view", [0, 0, 1, *[0] * (log.num_rows - 3)])

    x = read_log(write_folder(tmp_path, two_exposures)).exposures
    assert {(round(float(p), 1), float(v), float(f)) for p, v, f in zip(x.play_s, x.valid, x.finish, strict=True)} == {
        (10.0, 0.0, 0.0),
        (13.3, 1.0, 1.0),
        (3.0, 1.0, 0.0),
        (0.0, 0.0, 0.0),
    }


def test_earlier_exposures_know_long_views_and_likes_from_the_sequences(tmp_path: Path) -> None:
    earlier = read_log(write_folder(tmp_path)).earlier
    assert len(earlier.user) == 5 * NUM_USERS
    assert (earlier.long_view.sum(), earlier.like.sum()) == (2 * NUM_USERS, NUM_USERS)


def test_the_sequences_may_be_missing(tmp_path: Path) -> None:
    log = read_log(write_folder(tmp_path, lambda made: made.pop("user_sequences_small") and None))
    assert len(log.earlier.user) == 0


def test_users_and_videos_without_features_are_read_with_missing_values(tmp_path: Path) -> None:
    def cut(made: dict[str, pa.Table]) -> None:
        made["user_features_small"] = made["user_features_small"].slice(1)
        made["video_features_basic_small"] = made["video_features_basic_small"].slice(1)

    log = read_log(write_folder(tmp_path, cut))
    assert log.user_ids[0] == 0 and np.isnan(log.users[0, log.user_columns.index("register_days")])
    assert log.users[0, log.user_columns.index("user_active_degree")] == -1
    assert log.video_ids[0] == 100 and log.tag[0] == -1 and log.author[0] == -1
    assert not np.isnan(log.users[1:]).any()


def test_csv_files_and_several_parts_of_the_log_are_the_same_log(tmp_path: Path) -> None:
    one = read_log(write_folder(tmp_path / "parquet"))
    (tmp_path / "csv").mkdir()
    for name, table in tables().items():
        if name == "user_sequences_small":
            pq.write_table(table, tmp_path / "csv" / f"{name}.parquet")
        else:
            parts = {"": table} if name != "log_standard_small" else {"_1": table.slice(0, 500), "_2": table.slice(500)}
            for end, part in parts.items():
                pyarrow.csv.write_csv(part, tmp_path / "csv" / f"{name}{end}.csv")
    other = read_log(tmp_path / "csv")
    for field in one.exposures.__dataclass_fields__:
        assert np.array_equal(getattr(one.exposures, field), getattr(other.exposures, field)), field
    assert np.array_equal(one.videos, other.videos) and np.array_equal(one.tag, other.tag)
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("file", "column", "value", "types"),
    [
        ("log_standard_small", "tab", 0.5, ("double", "integer")),
        ("log_standard_small", "is_click", "yes", ("string", "integer")),
        ("user_features_small", "register_days", "long", ("string", "number")),
        ("video_features_basic_small", "tag", 7, ("int64", "text")),
        ("user_sequences_small", "watch_seq", 7, ("int64", "list of integer")),
    ],
)
def test_a_column_of_another_type_names_file_column_and_both_types(
    tmp_path: Path, file: str, column: str, value: object, types: tuple[str, str]
) -> None:
    def change(made: dict[str, pa.Table]) -> None:
        made[file] = with_column(made[file], column, [value] * made[file].num_rows)

    with pytest.raises(InputDataError) as caught:
        read_log(write_folder(tmp_path, change))
    assert all(word in str(caught.value) for word in (f"{file}.parquet", repr(column), *types))


@pytest.mark.parametrize("file", ["log_standard_small", "user_features_small", "video_features_basic_small"])
def test_a_missing_file_and_a_missing_column_are_named(tmp_path: Path, file: str) -> None:
    stem = file.removesuffix("_small")
    with pytest.raises(InputDataError, match=rf"no file {stem}\*"):
        read_log(write_folder(tmp_path / "file", lambda made: made.pop(file) and None))

    def drop(made: dict[str, pa.Table]) -> None:
        made[file] = made[file].drop_columns([made[file].column_names[1]])

    with pytest.raises(InputDataError, match=rf"column '{tables()[file].column_names[1]}' is missing.*{file}\.parquet"):
        read_log(write_folder(tmp_path / "column", drop))


def test_missing_values_in_the_log_are_refused(tmp_path: Path) -> None:
    def change(made: dict[str, pa.Table]) -> None:
        log = made["log_standard_small"]
        made["log_standard_small"] = with_column(log, "tab", [None, *log["tab"].to_pylist()[1:]])

    with pytest.raises(InputDataError, match="column 'tab' has 1 missing values"):
        read_log(write_folder(tmp_path, change))


def test_a_folder_that_is_not_there_and_a_file_that_is_no_table_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="is not there"):
        read_log(tmp_path / "nowhere")
    write_folder(tmp_path)
    (tmp_path / "user_features_small.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputDataError, match=r"cannot be read as parquet.*user_features_small"):
        read_log(tmp_path)


@pytest.mark.parametrize(("dates", "message"), [(20220425, "in 1 blocks of 2 days"), (20221399, "not yyyymmdd")])
def test_a_log_that_cannot_be_split_by_date_is_refused(tmp_path: Path, dates: int, message: str) -> None:
    def change(made: dict[str, pa.Table]) -> None:
        made["log_standard_small"] = with_column(made["log_standard_small"], "date", [dates] * made["log_standard_small"].num_rows)

    with pytest.raises(InputDataError, match=message):
        read_log(write_folder(tmp_path, change))


def real_log() -> KuaiRandLog:
    """The real excerpt, or a skip that says why."""
    if not REAL.is_dir():
        pytest.skip(f"NOT RUN: {REAL} is missing")
    return read_log(REAL)


def test_the_real_excerpt_has_the_facts_of_its_read_me() -> None:
    log = real_log()
    x = log.exposures
    assert (len(x.user), log.num_blocks) == (193_583, 6)
    for values, share in ((x.click, 0.44), (x.long_view, 0.31), (x.finish, 0.16), (x.comment_open, 0.044), (x.profile_enter, 0.019)):
        assert float(values.mean()) == pytest.approx(share, abs=0.015)
