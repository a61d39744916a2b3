"""`esrl chaos` refuses what it cannot do before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from esrl_ray.cli.chaos.command import chaos
from esrl_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill", "ingest,printer"], "unknown part 'printer'.*expected some of ingest, replay, broker, learner, zombie, deal"),
        (["--kill", "learner,zombie"], "plain processes, with learner.*leave out zombie or learner"),
        (["--out", "."], "the folder exists.*name a new one"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(chaos, arguments)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception
