"""Upstream multi-task scores of a KuaiRand log: seven LightGBM models, free of leaks, cached.

What a model may know of an exposure in block b: its user, video, tab and hour, and the history of all blocks before b, frozen at the start
of b. With a daily history the second day of a block would carry labels of its first day, and a model of users alone would seem to gain.
Scores of a training block come from models fitted on the other training blocks (cross-fitting), those of later blocks from models fitted on
all training blocks.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esrl_ray.simulation.kuairand_data import KuaiRandLog, is_in
from esrl_ray.vocabulary import Bools, Floats, Ints

TASKS = ("click", "long_view", "play", "finish", "like", "comment_open", "profile_enter")
"""Upstream scores. `play` is the expected log of 1 + seconds, the others are probabilities; each is divided by the mean label of the first
block, which is not replayed, so that a score is about 1 and one bias fits all."""
STATES = {
    "user": ("user_seen", "user_click", "user_long_view", "user_play", "user_finish", "register"),
    "item": ("duration", "video_seen", "video_click", "video_long_view", "video_play", "user_tag_seen", "user_tag_long_view", "met"),
    "context": ("hour_sin", "hour_cos"),
}
"""Numeric features that a deployment's spec may name. There is no age of a video: all were uploaded within three days, so that it would
only be the day of the replay, and leave the range that a policy was trained on."""
NUM_TREES = 40
SETTINGS = {
    "learning_rate": 0.15,
    "num_leaves": 15,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.6,
    "lambda_l2": 5.0,
    "max_bin": 31,
    "seed": 1,
    "deterministic": True,
    "force_col_wise": True,
    "num_threads": 1,  # many threads of one fit wait for each other, which is slow on a busy machine; many fits do not
    "verbose": -1,
}
CODE_VERSION = 1
"""Part of the cache's key: raise it when features or fitting change."""
PRIOR = 5.0
NUM_JOBS = 2

Say = Callable[[str], None]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sums:
    """Per key: how many past exposures, and sums of what happened in them. Facts that earlier sequences lack have counts of their own."""

    seen: Doubles  # exposures, earlier ones included
    logged: Doubles  # exposures of the log
    long_view: Doubles  # over seen
    like: Doubles  # over seen
    click: Doubles  # over logged, as all below
    play: Doubles
    finish: Doubles


class History:
    """Everything that happened before a block: the only past that its features may use."""

    def __init__(self, log: KuaiRandLog, block: int) -> None:
        x, e = log.exposures, log.earlier
        past = x.block < block
        self._log = log
        self._user = np.concatenate([e.user, x.user[past]]).astype(np.int64)
        self._video = np.concatenate([e.video, x.video[past]]).astype(np.int64)
        nothing = np.zeros(len(e.user))
        self._facts = {
            "seen": np.ones(len(self._user)),
            "logged": np.concatenate([nothing, np.ones(int(past.sum()))]),
            "long_view": np.concatenate([e.long_view, x.long_view[past]]),
            "like": np.concatenate([e.like, x.like[past]]),
            "click": np.concatenate([nothing, x.click[past]]),
            "play": np.concatenate([nothing, np.log1p(x.play_s[past])]),
            "finish": np.concatenate([nothing, x.finish[past]]),
        }

    def keys(self, user: npt.NDArray[np.int64], video: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
        """Keys by which history is summed, of any exposures."""
        log = self._log
        author, tag = log.author[video].astype(np.int64), log.tag[video].astype(np.int64) + 1
        return {"user": user, "video": video, "author": author, "tag": tag, "user_tag": user * (log.tag.max() + 2) + tag}

    def sums(self, user: Ints, video: Ints) -> dict[str, Sums]:
        """Sums of the history of each exposure's user, video, author, tag and user x tag."""
        past, asked = self.keys(self._user, self._video), self.keys(user.astype(np.int64), video.astype(np.int64))
        found = {}
        for name, key in past.items():
            size = int(max(key.max(initial=0), asked[name].max(initial=0))) + 1
            found[name] = Sums(
                **{fact: np.bincount(key, values, size)[asked[name]].astype(np.float64) for fact, values in self._facts.items()}
            )
        return found

    def met(self, user: Ints, video: Ints) -> Bools:
        """Whether the user was shown this video before."""
        width = np.int64(len(self._log.video_ids))
        return is_in(user * width + video, self._user * width + self._video)

    def mean(self, fact: str, count: str) -> float:
        """Mean of a fact over the whole history; 0 without one."""
        return float(self._facts[fact].sum() / max(self._facts[count].sum(), 1.0))

    def rates(self, sums: Sums) -> dict[str, Doubles]:
        """Means per key, shrunk to the whole history's mean by a prior of `PRIOR` exposures."""
        facts = {"long_view": "seen", "like": "seen", "click": "logged", "play": "logged", "finish": "logged"}
        return {f: (getattr(sums, f) + PRIOR * self.mean(f, n)) / (getattr(sums, n) + PRIOR) for f, n in facts.items()}


def block_features(log: KuaiRandLog, block: int) -> tuple[Floats, list[str]]:
    """What the models and the policies may see of the exposures of a block.

    Returns:
        (n of the block, P) features and their P names; categorical ones end in `_code`.
    """
    x = log.exposures
    rows = np.flatnonzero(x.block == block)
    user, video = x.user[rows], x.video[rows]
    history = History(log, block)
    columns: dict[str, npt.NDArray[Any]] = {"tab_code": x.tab[rows], "tag_code": log.tag[video], "hour": x.hour[rows]}
    columns |= {"duration": np.log1p(x.duration_s[rows]), "met": history.met(user, video)}
    columns |= {n: log.users[user, i] for i, n in enumerate(log.user_columns)}
    columns |= {n: log.videos[video, i] for i, n in enumerate(log.video_columns)}
    for key, sums in history.sums(user, video).items():
        columns[f"{key}_seen"], columns[f"{key}_logged"] = np.log1p(sums.seen), np.log1p(sums.logged)
        columns |= {f"{key}_{fact}": rate for fact, rate in history.rates(sums).items()}
    return np.stack([np.asarray(c, np.float32) for c in columns.values()], axis=1), list(columns)


def labels(log: KuaiRandLog) -> Floats:
    """(n, 7) what the models predict, in the order of `TASKS`."""
    x = log.exposures
    return np.stack([x.click, x.long_view, np.log1p(x.play_s), x.finish, x.like, x.comment_open, x.profile_enter], axis=1)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Scores and states of the exposures after the first block, in the log's order."""

    scores: Floats  # (n, 7), about 1
    states: Floats  # (n, 16), in the order of `STATES`


def upstream(log: KuaiRandLog, cache: Path, *, say: Say) -> Upstream:
    """Scores and states of a log, from the cache or fitted now.

    Args:
        log: What was read.
        cache: Folder of the cache; made when missing.
        say: Told in one line what is being done.
    """
    key = hashlib.sha256(f"{log.digest} {CODE_VERSION} {SETTINGS} {NUM_TREES}".encode()).hexdigest()[:24]
    file = cache / f"upstream-{key}.npz"
    shape = (int((log.exposures.block > 0).sum()), len(TASKS)), (int((log.exposures.block > 0).sum()), sum(map(len, STATES.values())))
    if file.exists():
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                found = Upstream(arrays["scores"], arrays["states"])
            if (found.scores.shape, found.states.shape) == shape and np.isfinite(found.scores).all() and np.isfinite(found.states).all():
                return found
            say(f"upstream models: {file} has shapes {found.scores.shape} and {found.states.shape}, expected {shape}; fitting again")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            say(f"upstream models: {file} is damaged ({error}); fitting again")
    made = _fitted(log, say=say)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".tmp", delete=False) as temporary:
        np.savez(temporary, scores=made.scores, states=made.states)
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).replace(file)
    say(f"upstream models: cached in {file}")
    return made


def _fitted(log: KuaiRandLog, *, say: Say) -> Upstream:
    """Fit one model per task and fold: a fold is a training block held out, or all training blocks for what comes later."""
    import torch  # noqa: F401, I001 - first: it brings the libgomp.so.1 that LightGBM needs and a bare system may lack
    import lightgbm

    say(f"upstream models: features of {len(log.exposures.user)} exposures, history frozen at the start of each block")
    parts = [block_features(log, b) for b in range(log.num_blocks)]
    names, x = parts[0][1], np.concatenate([p[0] for p in parts])
    block, y, num_training = log.exposures.block, labels(log), log.num_training_blocks
    training = np.flatnonzero(block < num_training)
    categorical = [n for n in names if n.endswith("_code")]
    bins = lightgbm.Dataset(
        x[training], feature_name=names, categorical_feature=categorical, params=SETTINGS | {"feature_pre_filter": False}
    ).construct()

    def fit(held_out: int | None, task: int) -> Floats:
        rows = training if held_out is None else training[block[training] != held_out]
        objective = "regression" if TASKS[task] == "play" else "binary"
        fold = (
            bins.subset(rows).construct().set_label(y[rows, task])
        )  # positions in `bins`, where training rows come first; a label set before would be lost
        model = lightgbm.train(SETTINGS | {"objective": objective, "feature_pre_filter": False}, fold, NUM_TREES)
        asked = block >= num_training if held_out is None else block == held_out
        predicted: Floats = model.predict(x[asked], num_threads=1).astype(np.float32)
        return predicted

    jobs = [(held_out, task) for held_out in (None, *range(1, num_training)) for task in range(len(TASKS))]
    scores = np.empty((len(block), len(TASKS)), np.float32)
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        futures = {pool.submit(fit, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            held_out, task = futures[future]
            scores[block >= num_training if held_out is None else block == held_out, task] = future.result()
            if done % len(TASKS) == 0 or done == len(jobs):
                say(f"upstream models: {done} of {len(jobs)} fitted")
    first, later = block == 0, block > 0
    scale = np.maximum(y[first].mean(0), 1e-4)
    return Upstream(np.maximum(scores[later], 0) / scale, _states(x[later], names))


def _states(x: Floats, names: list[str]) -> Floats:
    """Columns of `STATES`; missing values are 0."""
    columns = {n: x[:, i] for i, n in enumerate(names)}
    angle = columns["hour"] * np.float32(2 * np.pi / 24)
    columns |= {"register": np.log1p(np.maximum(columns["register_days"], 0)), "hour_sin": np.sin(angle), "hour_cos": np.cos(angle)}
    states: Floats = np.nan_to_num(np.stack([columns[n] for side in STATES.values() for n in side], axis=1)).astype(np.float32)
    return states
