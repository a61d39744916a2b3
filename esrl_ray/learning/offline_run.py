"""A run of offline training owns a folder: `run.json` (what it was started with), `checkpoints/` and, at its end, `policy/`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import msgspec

from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.policy.policy import Policy

RUN_FILE, CHECKPOINTS, POLICY = "run.json", "checkpoints", "policy"


class OfflineRun(msgspec.Struct, frozen=True):
    """What a run was started with. It goes on only with the same."""

    method: str
    log: str
    num_steps: int  # of the log
    lineage: dict[str, int]  # {worker: commit} that the log was read up to
    seed: int
    settings: str  # `settings_digest`


def settings_digest(config: Config) -> str:
    """First 16 hex digits of the sha256 of all settings that change what is learnt from a log."""
    tree = config.model_dump(mode="json", include={"spec", "reward", "exploration", "learner"})
    for name in ("seed", "num_learners", "device", "checkpoint_interval_s"):
        del tree["learner"][name]
    tree |= {"max_pairs": config.max_pairs, "sample_without_next": config.replay.sample_without_next}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def begin(folder: Path, run: OfflineRun, *, resume: bool) -> None:
    """Take a folder for a run.

    Raises:
        MethodError: it holds another run, or this one and `resume` was not asked for.
    """
    path = folder / RUN_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1))
        temporary.rename(path)
        return
    before = read_run(folder)
    if not resume:
        text = f"the folder holds a run of {before.method} on {before.log}"
        raise MethodError(text, str(folder), "go on with --resume, or name another folder with --out")
    for name in ("method", "log", "seed", "settings", "lineage", "num_steps"):
        if (was := getattr(before, name)) != (now := getattr(run, name)):
            raise MethodError(f"the run was started with {name} {was}, now it is {now}", str(path), "give what it was started with")


def read_run(folder: Path) -> OfflineRun:
    """What a folder's run was started with.

    Raises:
        MethodError: there is no run.
    """
    try:
        return msgspec.json.decode((folder / RUN_FILE).read_bytes(), type=OfflineRun)
    except (OSError, msgspec.MsgspecError) as error:
        raise MethodError(f"there is no run to go on with: {error}", str(folder), "start one without --resume") from error


def save_policy(policy: Policy, folder: Path) -> Path:
    """Write `policy/` in a run's folder; one that is there is replaced."""
    final, old = folder / POLICY, folder / f".{POLICY}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    policy.save(final)
    shutil.rmtree(old, ignore_errors=True)
    return final
