"""A KuaiRand log as a bench for offline learning: splits, planted worlds whose answer is known, and rounds of exploration on logged lists.

What an item's user did is in the log and does not depend on the ranking: a round ranks each logged list by the anchor's actions plus noise,
shows the upper half, and uncovers what was logged for it. Leaving, position effects and long-term value cannot be seen here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from esrl_ray.config import Config
from esrl_ray.errors import InputDataError
from esrl_ray.evaluation.metrics import LabelledPairs
from esrl_ray.fusion import fused_scores
from esrl_ray.methods.method import Exploration, Method
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, LEFT, Steps
from esrl_ray.reward import rewards_of
from esrl_ray.simulation.kuairand_data import LOG
from esrl_ray.simulation.kuairand_replay import MAX_CANDIDATES, KuaiRandInput
from esrl_ray.simulation.kuairand_upstream import Say
from esrl_ray.vocabulary import Arm, Floats

Indices = npt.NDArray[np.int64]
Planting = Literal["item", "user"]
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Bench:
    """Labelled exposures of three periods and the lists of the first one.

    Attributes:
        config: Deployment; its control policy (a = 0) is where learning starts.
        train: Exposures that methods may learn from.
        dev: Exposures that gates may look at.
        test: Exposures that only the report looks at.
        random: Exposures of the random-exposure log in the periods of `dev` and `test`; None without that file.
        behaviours: (n, num_behaviours) what was logged for `train`.
        lists: (N, G) positions in `train` of each list's candidates; -1 = padding.
    """

    config: Config
    train: LabelledPairs
    dev: LabelledPairs
    test: LabelledPairs
    random: LabelledPairs | None
    behaviours: Floats
    lists: Indices


def read_bench(config: Config, folder: Path, *, cache: Path, say: Say) -> Bench:
    """Read a folder of KuaiRand files.

    Args:
        config: As configs/kuairand.yaml.
        folder: Of the files; the random-exposure log is `log_random*.parquet` and may be missing.
        cache: Folder of the upstream models' scores.
        say: Told what takes long.

    Raises:
        InputDataError: the files do not fit.
    """
    whole = KuaiRandInput(config, folder, cache=cache, say=say)
    log, x = whole.log, whole.log.exposures
    parts = [np.flatnonzero((x.block > 0) & (x.block < log.num_training_blocks))]
    parts += [np.flatnonzero(x.block == block) for block in range(log.num_training_blocks, log.num_blocks)]
    train, dev, test = (whole.pairs(rows) for rows in parts)
    in_training = [rows - parts[0][0] for rows in whole.lists if x.block[rows[0]] < log.num_training_blocks]
    lists = np.full((len(in_training), MAX_CANDIDATES), -1, np.int64)
    for i, rows in enumerate(in_training):
        lists[i, : len(rows)] = rows
    return Bench(config, train, dev, test, _random_pairs(config, folder, cache, say), whole.logged(parts[0]), lists)


def _random_pairs(config: Config, folder: Path, cache: Path, say: Say) -> LabelledPairs | None:
    """Random exposures of the last two blocks, scored by models that are fitted on the standard log before them.

    They are put in the standard log's place from the development block on, so that everything else is made by the same code: the last
    block's history is the standard log of the training blocks and the random exposures of the development block.
    """
    files = sorted(folder.glob("log_random*.parquet"))
    if not files:
        return None
    standard = pa.concat_tables([pa.parquet.read_table(f, columns=list(LOG)) for f in sorted(folder.glob("log_standard*.parquet"))])
    dates = np.unique(standard["date"].to_numpy())
    first_dev = dates[-4]  # two blocks of two days
    if len(dates) % 2:
        raise InputDataError(f"column 'date' has {len(dates)} days, expected whole blocks of 2", str(folder))
    chance = pa.concat_tables([pa.parquet.read_table(f, columns=list(LOG)) for f in files])
    chance = chance.filter(pc.field("date") >= first_dev).filter(pc.field("date") <= dates[-1])
    with tempfile.TemporaryDirectory() as name:
        mixed = Path(name)
        pa.parquet.write_table(standard.filter(pc.field("date") < first_dev), mixed / "log_standard_1.parquet")
        pa.parquet.write_table(chance, mixed / "log_standard_2.parquet")
        for file in folder.iterdir():
            if not file.name.startswith(("log_", "README", "LICENSE")):
                (mixed / file.name).symlink_to(file.resolve())
        found = KuaiRandInput(config, mixed, cache=cache, say=say)
    x = found.log.exposures
    return found.pairs(np.flatnonzero(x.block >= found.log.num_training_blocks))


def with_control(bench: Bench, powers: Floats) -> Bench:
    """The same bench where a = 0 is a vector of powers (k,): methods start there, and bounds are around it."""
    spec = bench.config.spec.model_copy(update={"power_base": tuple(float(p) for p in powers)})
    return replace(bench, config=bench.config.model_copy(update={"spec": spec}))


def plant(bench: Bench, by: Planting, *, seed: int) -> Bench:
    """A world whose answer is known: which upstream scores can be trusted depends on a feature, which no global vector can follow.

    Items by tag, or users by registration age, fall in two halves; in one half the first half of the scores is noise, in the other half
    the others are. Noise is the score of a random other exposure of the same period, so that its distribution stays.

    Args:
        bench: The real log.
        by: `item` (tag) or `user` (registration age).
        seed: Of the halves of tags and of the noise.
    """
    spec, rng = bench.config.spec.build(), np.random.default_rng(seed)
    tag = [c.name for c in spec.categorical_features].index("tag")
    age = (*spec.user_features, *spec.item_features, *spec.context_features).index("register")
    halves = rng.permutation(spec.categorical_features[tag].cardinality) % 2 == 0
    median = np.median(bench.train.states[:, age])

    def planted(pairs: LabelledPairs) -> LabelledPairs:
        first = halves[pairs.categorical[:, tag]] if by == "item" else pairs.states[:, age] > median
        noise = rng.permuted(pairs.scores, axis=0)
        even = np.arange(spec.num_scores) % 2 == 0
        return replace(pairs, scores=np.where(first[:, None] == even, noise, pairs.scores))

    train, dev, test = (planted(getattr(bench, name)) for name in SPLITS)
    return replace(bench, train=train, dev=dev, test=test, random=None if bench.random is None else planted(bench.random))


def permute_rewards(bench: Bench, *, seed: int) -> Bench:
    """Each training exposure gets what was logged for a random other one: nothing can be learnt, and a gain on dev or test is a leak."""
    return replace(bench, behaviours=np.random.default_rng(seed).permutation(bench.behaviours))


def explore(bench: Bench, exploration: Exploration, steps: Steps, rng: np.random.Generator, *, number: int, permute_actions: bool) -> None:
    """One round: every list is ranked by the centre's actions plus uniform noise, its upper half is shown; the lists are added as steps.

    Args:
        bench: Lists and what was logged.
        exploration: Centre and noise per pair.
        steps: Grows by N steps.
        rng: Of the noise.
        number: Of the round.
        permute_actions: Log the actions of random other pairs: a diagnostic.
    """
    config, spec, train = bench.config, bench.config.spec.build(), bench.train
    valid = bench.lists >= 0  # (N, G)
    states, categorical, scores = train.states[bench.lists], train.categorical[bench.lists], train.scores[bench.lists]
    anchors = exploration.centre.act(states, categorical, scores)
    shape = anchors.shape if exploration.scope == "pair" else (len(anchors), 1, anchors.shape[-1])
    noise = rng.uniform(exploration.low, exploration.high, shape).astype(np.float32)
    actions = np.clip(anchors + noise, -1, 1)
    fused = fused_scores(torch.from_numpy(scores), torch.from_numpy(actions), spec).numpy()
    rank = np.argsort(np.argsort(np.where(valid, -fused, np.inf), axis=1, kind="stable"), axis=1)
    shown = rank < valid.sum(1, keepdims=True) // 2
    if permute_actions:
        order = rng.permutation(int(valid.sum()))
        actions[valid], anchors[valid] = actions[valid][order], anchors[valid][order]
    behaviours = bench.behaviours[bench.lists] * shown[..., None]
    columns = {
        "states": states,
        "categorical": categorical,
        "scores": scores,
        "actions": actions,
        "anchor_actions": anchors,
        "rewards": rewards_of(behaviours, config.reward),
        "behaviours": behaviours,
    }
    columns = {name: np.where(valid[..., None], c, 1 if name == "scores" else 0).astype(c.dtype) for name, c in columns.items()}
    masks = {"shown": shown.astype(np.float32), "valid": valid.astype(np.float32)}
    users = train.user[bench.lists[:, 0]]
    keys: dict[str, npt.ArrayLike] = {
        "sessions": np.arange(len(users)) + len(steps),
        "users": users,
        "rounds": number,
        "arms": ARMS.index(Arm.EXPLORE),
    }
    steps.follow(steps.add(keys, {**columns, **masks}), LEFT)  # with gamma 0 nothing is asked of what follows


def learn_rounds(method: Method, bench: Bench, *, rounds: int, seed: int, permute_actions: bool = False) -> Iterator[Policy]:
    """Explore every list, learn, and again; yields the policy after each round.

    Args:
        method: Learns; its exploration says how lists are ranked.
        bench: Lists and what was logged.
        rounds: How many.
        seed: Of the noise.
        permute_actions: As in `explore`.
    """
    rng, steps = np.random.default_rng(seed), Steps(bench.config, rounds * len(bench.lists))
    for number in range(rounds):
        explore(bench, method.exploration(), steps, rng, number=number, permute_actions=permute_actions)
        yield method.fit(steps)
