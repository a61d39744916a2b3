"""What a KuaiRand log is to the loop: list requests in time order, the feedback that was really logged, and exposures to evaluate on.

One request is a user's two-day block: its first 8 exposures are the candidates, half of them are shown. What is shown gets the behaviours
that were logged for it, what is not shown gets none. The last block is never replayed: frozen policies are evaluated on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from esrl_ray.config import Config
from esrl_ray.errors import ConfigError
from esrl_ray.evaluation.metrics import LabelledPairs
from esrl_ray.reward import rewards_of
from esrl_ray.simulation.kuairand_data import Exposures, KuaiRandLog, read_log
from esrl_ray.simulation.kuairand_upstream import STATES, TASKS, Say, upstream
from esrl_ray.vocabulary import Floats, Ints

MAX_CANDIDATES = 8
CATEGORICAL = ("tab", "tag")
"""Both belong to the item's side: a user's block spans several tabs, so that the tab is where this candidate would be shown."""
BEHAVIOURS: dict[str, Callable[[Exposures], Floats]] = {
    "watch_s": lambda x: x.play_s,
    "valid": lambda x: x.valid,
    "click": lambda x: x.click,
    "long_view": lambda x: x.long_view,
    "finish": lambda x: x.finish,
    "like": lambda x: x.like,
    "comment_open": lambda x: x.comment_open,
    "profile_enter": lambda x: x.profile_enter,
}
"""Behaviours that the log has; `valid` is the label of MTF-GAUC: played more than 10 s, or a long view."""


def default_cache() -> Path:
    """Where the upstream models' scores are kept."""
    return platformdirs.user_cache_path("esrl-ray") / "kuairand"


def replayed_lists(log: KuaiRandLog) -> list[npt.NDArray[np.int64]]:
    """Candidates of each request as rows of the log, in the order of replay.

    A request is a user's block from the second to the last but one; blocks follow each other, within a block the user's first exposure
    decides. A video that the user met twice in a block is a candidate once; fewer than two candidates are no request.
    """
    x = log.exposures
    rows = np.flatnonzero((x.block > 0) & (x.block < log.num_blocks - 1))
    unit = _units(log)[rows]
    _, firsts = np.unique(np.stack([unit, x.video[rows].astype(np.int64)]), axis=1, return_index=True)
    rows = rows[np.sort(firsts)]
    starts = np.flatnonzero(np.diff(_units(log)[rows], prepend=-1))
    lists = [part[:MAX_CANDIDATES] for part in np.split(rows, starts[1:]) if len(part) > 1]
    return sorted(lists, key=lambda part: (int(x.block[part[0]]), int(x.time_ms[part[0]]), int(x.user[part[0]])))


def _units(log: KuaiRandLog) -> npt.NDArray[np.int64]:
    """(n,) user x block of each exposure; not decreasing in the order of the log."""
    return log.exposures.block * np.int64(len(log.user_ids)) + log.exposures.user


class KuaiRandInput:
    """The real input of one deployment.

    Args:
        config: Its spec names features of `STATES`, scores of `TASKS` and categorical features of `CATEGORICAL`; its behaviours are
            of `BEHAVIOURS`.
        folder: Of the files.
        cache: Folder of the upstream models' scores.
        say: Told what takes long.

    Raises:
        ConfigError: the spec or the behaviours name something that this input does not have.
        InputDataError: the files do not fit.
    """

    def __init__(self, config: Config, folder: Path, *, cache: Path | None = None, say: Say) -> None:
        _check(config)
        self._config, self.spec = config, config.spec.build()
        self.log = read_log(folder)
        self._x, self._unit = self.log.exposures, _units(self.log)
        made = upstream(self.log, default_cache() if cache is None else cache, say=say)
        self._offset = int((self._x.block == 0).sum())  # the first block has no scores: it is only history
        self._scores = made.scores[:, [TASKS.index(n) for n in self.spec.scores]]
        names = [n for side in STATES.values() for n in side]
        self._states = {n: made.states[:, i] for i, n in enumerate(names)}
        codes = {"tab": self._x.tab, "tag": self.log.tag[self._x.video] + 1}
        self._codes = [np.minimum(codes[c.name], c.cardinality - 1) for c in self.spec.categorical_features]
        self._behaviours = np.stack([BEHAVIOURS[b.name](self._x) for b in config.reward.behaviours], axis=1)
        self.lists = replayed_lists(self.log)

    def user_id(self, i: int) -> str:
        """User of request i."""
        return str(self.log.user_ids[self._x.user[self.lists[i][0]]])

    def time_ms(self, i: int) -> int:
        """When request i was made: the first exposure of its list."""
        return int(self._x.time_ms[self.lists[i][0]])

    def request(self, i: int) -> dict[str, Any]:
        """Body of request i, as `POST /v1/fuse` takes it; the user's successive blocks are one session."""
        rows, user = self.lists[i], self.user_id(i)
        items, features, scores, codes = (
            self._items(rows),
            self._side("item", rows),
            self._scores[rows - self._offset],
            self._categorical(rows),
        )
        return {
            "request_id": f"kuairand-{i}",
            "session_id": f"kuairand-{user}",
            "user_id": user,
            "user_features": self._side("user", rows[:1])[0].tolist(),
            "context_features": self._side("context", rows[:1])[0].tolist(),
            "candidates": [
                {"item_id": item, "features": f, "scores": s, "categorical": c}
                for item, f, s, c in zip(items, features.tolist(), scores.tolist(), codes.tolist(), strict=True)
            ],
            "list_size": max(1, len(rows) // 2),
        }

    def behaviours(self, i: int, item_ids: Sequence[str]) -> list[tuple[str, str, float]]:
        """(item, behaviour, value) that was logged for shown items of request i; values of 0 are no feedback."""
        rows = dict(zip(self._items(self.lists[i]), self.lists[i], strict=True))
        names = [b.name for b in self._config.reward.behaviours]
        return [(item, name, float(v)) for item in item_ids for name, v in zip(names, self._behaviours[rows[item]], strict=True) if v > 0]

    def logged(self, rows: npt.NDArray[np.int64]) -> Floats:
        """(len(rows), num_behaviours) what was logged for exposures, as the configuration orders behaviours."""
        found: Floats = self._behaviours[rows].astype(np.float32)
        return found

    def test_pairs(self) -> LabelledPairs:
        """All exposures of the last block, which no request has."""
        return self.pairs(np.flatnonzero(self._x.block == self.log.num_blocks - 1))

    def pairs(self, rows: npt.NDArray[np.int64]) -> LabelledPairs:
        """Exposures with their states as a request of their user's block would carry them, grouped by user x block and by user x tab."""
        first = np.searchsorted(self._unit, self._unit[rows])  # a request has the context of its first exposure
        reward = rewards_of(self._behaviours[rows], self._config.reward).sum(-1) * np.float32(self._config.reward.scale)
        user = self._x.user[rows].astype(np.int64)
        return LabelledPairs(
            states=np.concatenate([self._side("user", rows), self._side("item", rows), self._side("context", first)], axis=1),
            categorical=self._categorical(rows),
            scores=self._scores[rows - self._offset],
            labels=self._x.valid[rows],
            weights=reward + 1,
            user=self._x.user[rows],
            groups={"user_block": self._unit[rows], "user_tab": user * (int(self._x.tab.max()) + 1) + self._x.tab[rows]},
        )

    def _items(self, rows: npt.NDArray[np.int64]) -> list[str]:
        return [str(v) for v in self.log.video_ids[self._x.video[rows]]]

    def _side(self, side: str, rows: npt.NDArray[np.int64]) -> Floats:
        """(len(rows), names of this side) features."""
        names = {"user": self.spec.user_features, "item": self.spec.item_features, "context": self.spec.context_features}[side]
        chosen: Floats = (
            np.stack([self._states[n][rows - self._offset] for n in names], axis=1) if names else np.empty((len(rows), 0), np.float32)
        )
        return chosen

    def _categorical(self, rows: npt.NDArray[np.int64]) -> Ints:
        codes = [c[rows] for c in self._codes]
        return np.stack(codes, axis=1).astype(np.int32) if codes else np.empty((len(rows), 0), np.int32)


def _check(config: Config) -> None:
    """Refuse a deployment that names what this input does not have."""
    spec = config.spec
    named = {
        "spec.user_features": (spec.user_features, STATES["user"]),
        "spec.item_features": (spec.item_features, STATES["item"]),
        "spec.context_features": (spec.context_features, STATES["context"]),
        "spec.categorical_features": ([c.name for c in spec.categorical_features if c.side == "item"], CATEGORICAL),
        "spec.scores": (spec.scores, TASKS),
        "reward.behaviours": ([b.name for b in config.reward.behaviours], tuple(BEHAVIOURS)),
    }
    for key, (names, known) in named.items():
        if unknown := [n for n in names if n not in known]:
            raise ConfigError(
                f"{unknown} is not in a KuaiRand log, expected some of {', '.join(known)}", key, "use configs/kuairand.yaml with --data"
            )
    if other := [c.name for c in spec.categorical_features if c.side != "item"]:
        raise ConfigError(f"{other} has another side than item", "spec.categorical_features", "tab and tag belong to a candidate here")
