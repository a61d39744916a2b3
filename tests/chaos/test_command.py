"""`esrl chaos` refuses what it cannot do before it starts anything, and keeps what shows why it failed."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from esrl_ray.cli.chaos import command
from esrl_ray.cli.chaos.command import chaos
from esrl_ray.cli.chaos.compare import Report, StepDifference
from esrl_ray.errors import ConfigError, EsrlError, LoopError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill", "ingest,printer"], "unknown part 'printer'.*expected some of ingest, replay, broker, learner, zombie, deal"),
        (["--kill", "learner,zombie"], "plain process, with learner.*leave out zombie or learner"),
        (["--kill", ","], "no part is named.*--faults 0"),
        (["--kill", ""], "no part is named"),
        (["--out", "."], "the folder exists.*name a new one"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(chaos, arguments)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


@pytest.mark.parametrize(
    ("problems", "error"),
    [([], None), (["zombie:before_state found no moment"], None), ([], LoopError("a part does not come up")), ([], KeyboardInterrupt())],
)
def test_the_folder_is_kept_when_something_is_wrong(
    problems: list[str], error: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broker = SimpleNamespace(bootstrap_servers="127.0.0.1:1")
    monkeypatch.setattr(command, "EmbeddedBroker", SimpleNamespace(start=lambda *_, **__: nullcontext(broker)))

    def ran(*_: object, **__: object) -> Report:
        if error is not None:
            raise error
        return Report(
            seed=0, seconds=1.0, records={}, kills={}, not_reached=[], recovery_s={}, steps=StepDifference(0, [], [], [], {}), ledger={},
            ledger_without_faults={}, dead_letters=dict.fromkeys(("sent", "unique", "copies"), 0), zombies=[], shards={}, problems=problems,
        )  # fmt: skip

    monkeypatch.setattr(command, "run_chaos", ran)
    result = CliRunner().invoke(chaos, ["--events", "1000"])
    folder = next(tmp_path.glob("esrl-chaos-*"), None)
    assert (folder is not None) == bool(problems or isinstance(error, EsrlError))
    assert isinstance(result.exception, LoopError) == (folder is not None)
    assert folder is None or f"are kept in {folder}" in result.output
