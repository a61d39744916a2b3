"""Checkpoints of the learner: RLlib's own, with what the training loop must remember beside it, made whole by a rename.

RLlib's checkpoints contain pickles: they are read only from the run's own folder.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import msgspec
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_LEARNER_GROUP, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID

from esrl_ray.config import Config
from esrl_ray.errors import Diverged, LearnersLost, LoopError
from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.learner import EnhancedRLLearner

PROGRESS_FILE = "progress.json"
KEPT = 2

_logger = logging.getLogger(__name__)


class Progress(msgspec.Struct):
    """What the training loop remembers beside the learner's state."""

    spec_digest: str
    reward_digest: str
    fitted: bool = False  # the first normaliser is set
    round: int = 0
    anchor_version: int = 0
    round_from: int = 0  # inserted steps when the round began
    version: int = 0  # newest accepted by the store
    published: int = 0
    rejected: int = 0
    learnt_ms: int = 0  # clock of the last gradient step
    limiters: Sequence[Mapping[str, float] | None] = ()  # totals of each shard's limiter


def save_checkpoint(algorithm: EnhancedRL, folder: Path, progress: Progress) -> Path:
    """Write a checkpoint into a temporary folder, rename it, and delete all but the newest `KEPT`.

    Raises:
        LearnersLost: the learner died meanwhile: RLlib saves without it, and says nothing.
        Diverged: it holds numbers that are not finite, which every rebuild would begin with.
    """
    if not all(algorithm.each_learner(_finite)):
        raise Diverged("parameters are not finite, no checkpoint is written", str(folder), "lower learner.critic_lr and learner.actor_lr")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".[0-9]*.[0-9]*"):  # our own temporary folders only: file systems and desktops leave hidden files
        if leftover.is_dir():
            shutil.rmtree(leftover)
    numbers = _numbers(folder)
    final = folder / f"{(numbers[-1] if numbers else 0) + 1:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    algorithm.save_to_path(str(temporary))
    if not _has_learner(temporary):
        raise LearnersLost("a checkpoint was written without the learner's state", str(temporary), "rebuild from the newest checkpoint")
    (temporary / PROGRESS_FILE).write_bytes(msgspec.json.encode(progress))
    temporary.rename(final)
    for number in numbers[: 1 - KEPT]:
        shutil.rmtree(folder / f"{number:08d}")
    return final


def restore_checkpoint(algorithm: EnhancedRL, folder: Path, config: Config) -> Progress | None:
    """Restore the newest whole checkpoint; None when there is none.

    Raises:
        LoopError: there are checkpoints, but of another spec or reward, or none can be read.
    """
    spec_digest, reward_digest = config.spec.build().digest, config.reward.digest
    numbers = _numbers(folder)
    for number in reversed(numbers):
        path = folder / f"{number:08d}"
        try:
            progress = msgspec.json.decode((path / PROGRESS_FILE).read_bytes(), type=Progress)
            if not _has_learner(path):  # restoring it would cost the learner, without an error here
                raise FileNotFoundError("the learner's state")
            if progress.spec_digest != spec_digest:
                raise LoopError(
                    f"a checkpoint is for spec {progress.spec_digest}, this deployment's is {spec_digest}", str(path), "use another run.dir"
                )
            if progress.reward_digest != reward_digest:
                raise LoopError(
                    f"a checkpoint has learnt the reward {progress.reward_digest}, this deployment's is {reward_digest}",
                    str(path),
                    "move the folder away, or name another, to learn anew",
                )
            algorithm.restore_from_path(str(path))
        except LoopError:
            raise
        except Exception as error:  # unpickling a damaged file can raise anything
            _logger.warning("checkpoint %s cannot be read, trying an older one: %r", path, error)
            continue
        _logger.info("checkpoint restored path=%s round=%d", path, progress.round)
        return progress
    if numbers:
        raise LoopError(f"none of {len(numbers)} checkpoints can be read", str(folder), "delete the folder to learn from the start")
    return None


def set_aside_other_reward(folder: Path, config: Config) -> Path | None:
    """Move checkpoints that have learnt another reward out of the way; their new folder, or None when there are none.

    What their critics know is wrong now, and their actor stands in the policies that they published.
    """
    progress = next((found for number in reversed(_numbers(folder)) if (found := _read_progress(folder / f"{number:08d}"))), None)
    if progress is None or progress.spec_digest != config.spec.build().digest or progress.reward_digest == config.reward.digest:
        return None
    name = f"{folder.name}-reward-{progress.reward_digest}"
    aside = next(path for n in count(1) if not (path := folder.with_name(name if n == 1 else f"{name}-{n}")).exists())
    folder.rename(aside)
    return aside


def _read_progress(checkpoint: Path) -> Progress | None:
    try:
        return msgspec.json.decode((checkpoint / PROGRESS_FILE).read_bytes(), type=Progress)
    except (OSError, msgspec.MsgspecError):
        return None


def module_folder(checkpoint: Path) -> Path:
    """The module in a checkpoint: `RLModule.from_checkpoint(path, inference_only=True)` builds what decides from it."""
    return checkpoint.joinpath(COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID)


def _finite(learner: EnhancedRLLearner) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in learner.learn_state.networks.state_dict().values())


def _has_learner(checkpoint: Path) -> bool:
    return any(checkpoint.joinpath(COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER).glob("state.*"))


def _numbers(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()) if folder.is_dir() else []
