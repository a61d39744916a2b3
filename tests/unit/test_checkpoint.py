"""The folder of checkpoints: what a crash left of ours goes, what others put there stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from esrl_ray.algo.update import LearnState
from esrl_ray.config import Config
from esrl_ray.errors import Diverged
from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.checkpoint import Progress, save_checkpoint


class Saving:
    """An algorithm of one learner, whose checkpoints hold its state and nothing else."""

    def __init__(self, config: Config) -> None:
        self.learner = SimpleNamespace(learn_state=LearnState.create(config, device="cpu"))

    def each_learner(self, call: Callable[[Any], bool]) -> list[bool]:
        """On the one."""
        return [call(self.learner)]

    def save_to_path(self, path: str) -> None:
        """As RLlib lays it out."""
        learner = Path(path, "learner_group", "learner")
        learner.mkdir(parents=True)
        (learner / "state.pkl").touch()


def test_a_save_removes_folders_of_an_interrupted_one_and_leaves_hidden_files_and_folders_of_others(config: Config, tmp_path: Path) -> None:
    (tmp_path / ".00000001.4711" / "learner_group").mkdir(parents=True)
    files, folders = (".nfs000000000001a2b3", ".DS_Store", ".00000001.4712"), (".snapshot", ".Trash-1000")
    for name in files:
        (tmp_path / name).touch()
    for name in folders:
        (tmp_path / name).mkdir()
    saving = cast(EnhancedRL, Saving(config))
    for number in range(1, 4):
        path = save_checkpoint(saving, tmp_path, Progress("spec", "reward", round=number))
        assert path == tmp_path / f"{number:08d}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, *folders, "00000002", "00000003"])


@pytest.mark.parametrize("name", ["actor.layers.0.weight", "critics.long_term.gram"])
def test_numbers_that_are_not_finite_are_not_saved_for_a_rebuild_to_begin_with(name: str, config: Config, tmp_path: Path) -> None:
    saving = Saving(config)
    save_checkpoint(cast(EnhancedRL, saving), tmp_path, Progress("spec", "reward"))
    saving.learner.learn_state.networks.state_dict()[name][0, 0] = float("nan")
    with pytest.raises(Diverged, match="no checkpoint is written"):
        save_checkpoint(cast(EnhancedRL, saving), tmp_path, Progress("spec", "reward"))
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
