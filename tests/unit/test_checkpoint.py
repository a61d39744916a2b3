"""The folder of checkpoints: what a crash left of ours goes, what others put there stays."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.checkpoint import Progress, save_checkpoint


class Saving:
    """An algorithm whose checkpoints hold a learner's state and nothing else."""

    def save_to_path(self, path: str) -> None:
        """As RLlib lays it out."""
        learner = Path(path, "learner_group", "learner")
        learner.mkdir(parents=True)
        (learner / "state.pkl").touch()


def test_a_save_removes_folders_of_an_interrupted_one_and_leaves_hidden_files_and_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / ".00000001.4711" / "learner_group").mkdir(parents=True)
    files, folders = (".nfs000000000001a2b3", ".DS_Store", ".00000001.4712"), (".snapshot", ".Trash-1000")
    for name in files:
        (tmp_path / name).touch()
    for name in folders:
        (tmp_path / name).mkdir()
    for number in range(1, 4):
        path = save_checkpoint(cast(EnhancedRL, Saving()), tmp_path, Progress("spec", "reward", round=number))
        assert path == tmp_path / f"{number:08d}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, *folders, "00000002", "00000003"])
