"""The end of a round with the second tier: what is judged is what may become the anchor, and no verdict holds up the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayTaskError

from esrl_ray import actors
from esrl_ray.algo.actor import PairNetwork, make_actor
from esrl_ray.config import Config, load_config
from esrl_ray.errors import LoopError, PolicyRejected
from esrl_ray.evaluation.second_tier import Rule, SecondTierVerdict, abstained, load_verdict
from esrl_ray.learning import loop as loop_module
from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.loop import TrainingLoop
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.policy.store import CONTROL_VERSION, PolicyStore, version_folder
from esrl_ray.spec import Spec
from tests.transitions import make_transitions


class Local:
    """An actor's handle that calls the plain object at once."""

    def __init__(self, real: object) -> None:
        self._real = real

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._real, name))


class FakeJudging:
    """Says nothing until the test lets it."""

    made: list[FakeJudging]

    def __init__(self, candidate: Policy, anchor: Policy, *_: object, **__: object) -> None:
        self.candidate, self.anchor, self.cancelled = candidate, anchor, False
        self.says: SecondTierVerdict | None = None
        self.made.append(self)

    def verdict(self) -> SecondTierVerdict | None:
        return self.says

    def cancel(self) -> None:
        self.cancelled = True


class Calls:
    """A learner that remembers what it was asked."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self.made.append(name)


class Ending:
    """A training loop at the end of round 0, over a real store, without Ray and without learners."""

    def __init__(self, folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = load_config("configs/demo.yaml", [f"policy.second_tier={mode}"])
        self.store = PolicyStore(folder / "policies", self.config, clock_ms=lambda: 5)
        FakeJudging.made = []
        monkeypatch.setattr(loop_module, "Judging", FakeJudging)
        monkeypatch.setattr(ray, "get", lambda found, timeout: found)
        monkeypatch.setattr(actors, "ask", lambda call, *args: call(*args))
        self.loop = TrainingLoop(
            self.config,
            store=Local(self.store),
            shards=[],
            checkpoint_dir=folder / "checkpoints",
            clock_ms=lambda: 5,
            read_newest=lambda *_: pa.table({}),
        )
        self.counted: list[str] = []
        self.loop._telemetry = SimpleNamespace(count=lambda name, **tags: self.counted.append(tags["outcome"]))  # type: ignore[assignment]
        self.loop._progress.anchor_version = CONTROL_VERSION
        # 700 steps are in, and none is recent, so that nothing is adopted: there is no learner
        monkeypatch.setattr(self.loop, "_shards", SimpleNamespace(inserted=700, recent=lambda _: None))

    def publish(self, value: float) -> int:
        spec = self.config.spec.build()
        return self.store.publish(Policy.static(spec, np.full(spec.num_actions, value, np.float32)).to_bytes(), None)

    def end(self) -> None:
        self.loop._end_round(None)  # type: ignore[arg-type]

    def says(self, outcome: str) -> FakeJudging:
        (judging,) = FakeJudging.made
        said = abstained(judging.candidate, judging.anchor, "as told", rule=Rule())
        judging.says = msgspec.structs.replace(said, outcome=outcome)
        return judging

    @property
    def anchor(self) -> int:
        return self.store.current.round.anchor_version


def scoring(spec: Spec) -> Policy:
    network = PairNetwork(spec, (8,), 4, num_outputs=1)
    made = Manifest(version=0, digest="", kind=PolicyKind.SCORE, spec=spec, hidden_sizes=(8,), embedding_size=4)
    return Policy.of(made, {name: value.numpy() for name, value in network.state_dict().items()}, Normaliser.identity(spec))


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Ending]:
    return lambda mode: Ending(tmp_path, mode, monkeypatch)


@pytest.mark.parametrize(
    ("mode", "outcome", "promoted"),
    [
        ("block", "pass", True),
        ("block", "abstain", True),
        ("block", "block", False),
        ("require", "pass", True),
        ("require", "abstain", False),
        ("require", "block", False),
    ],
)
def test_the_verdict_decides_whether_the_judged_version_becomes_the_anchor(
    ending: Callable[[str], Ending], tmp_path: Path, mode: str, outcome: str, *, promoted: bool
) -> None:
    at = ending(mode)
    judged = at.publish(0.1)
    at.end()
    newer = at.publish(0.2)
    at.end()  # still being judged: learning goes on
    assert at.anchor == CONTROL_VERSION and not at.counted and len(FakeJudging.made) == 1
    at.says(outcome)
    at.end()
    assert at.anchor == (judged if promoted else CONTROL_VERSION) and at.store.current.version == newer
    kept = load_verdict(version_folder(tmp_path / "policies", judged))
    assert kept is not None and kept.outcome == outcome and kept.against == CONTROL_VERSION
    assert at.counted == [outcome] and f"version {judged}: " in at.loop.status()["second_tier"]
    assert at.loop._progress.round_from == (0 if promoted else 700)


def test_the_next_judgement_after_a_blocked_one_is_of_what_serves_then(ending: Callable[[str], Ending]) -> None:
    at = ending("block")
    at.publish(0.1)
    at.end()
    at.says("block")
    at.end()
    newer = at.publish(0.2)
    at.end()
    assert [judging.candidate.version for judging in FakeJudging.made][1:] == [newer]
    assert FakeJudging.made[1].anchor.version == CONTROL_VERSION


def test_without_the_second_tier_the_newest_version_becomes_the_anchor_at_once(
    ending: Callable[[str], Ending], caplog: pytest.LogCaptureFixture
) -> None:
    at = ending("off")
    version = at.publish(0.1)
    with caplog.at_level("INFO"):
        at.end()
    assert at.anchor == version and not FakeJudging.made
    assert f"policy promoted version={version} round=1 by=first tier only" in caplog.text


@pytest.mark.parametrize("mode", ["off", "block"])
def test_a_policy_that_scores_pairs_by_itself_serves_and_does_not_become_the_anchor(ending: Callable[[str], Ending], mode: str) -> None:
    at = ending(mode)
    version = at.store.publish(scoring(at.config.spec.build()).to_bytes(), None)
    at.end()
    assert (at.store.current.version, at.anchor) == (version, CONTROL_VERSION) and not FakeJudging.made
    assert at.loop._progress.round_from == 700
    with pytest.raises(PolicyRejected, match=f"version {version} scores pairs by itself"):
        at.store.start_round(msgspec.structs.replace(at.store.current.round, number=1, anchor_version=version))


def test_a_pin_holds_back_what_was_judged_meanwhile(ending: Callable[[str], Ending]) -> None:
    at = ending("block")
    at.publish(0.1)
    at.end()
    at.store.pin("static")
    at.says("pass")
    at.end()
    assert at.anchor == CONTROL_VERSION and at.counted == ["pass"]


def test_what_was_rolled_back_while_it_was_judged_does_not_become_the_anchor(ending: Callable[[str], Ending]) -> None:
    at = ending("block")
    good = at.publish(0.1)
    bad = at.publish(0.2)
    at.end()
    assert FakeJudging.made[0].candidate.version == bad
    at.store.rollback(good)
    at.publish(0.3)  # learning goes on and serves again
    at.says("abstain")
    at.end()
    assert at.anchor == CONTROL_VERSION and at.loop._progress.round_from == 700


def test_a_round_that_someone_else_started_is_not_ended_by_an_old_verdict(ending: Callable[[str], Ending]) -> None:
    at = ending("block")
    at.publish(0.1)
    at.end()
    other = at.publish(0.2)
    at.store.start_round(msgspec.structs.replace(at.store.current.round, number=5, anchor_version=other))
    at.says("pass")
    at.end()
    assert (at.store.current.round.number, at.anchor) == (5, other)


@pytest.mark.parametrize("ours", [False, True])
def test_a_round_that_someone_else_started_is_entered_at_the_next_look_and_an_anchor_from_elsewhere_is_learnt_on_from(
    ending: Callable[[str], Ending], monkeypatch: pytest.MonkeyPatch, *, ours: bool
) -> None:
    at, spec, stop = ending("off"), load_config("configs/demo.yaml").spec.build(), threading.Event()
    brought = Policy.static(spec, np.full(spec.num_actions, 0.6, np.float32))
    digest = at.loop._config_digest if ours else "another"
    version = at.store.publish(brought.numbered(0, config_digest=digest).to_bytes(), None)
    at.store.start_round(msgspec.structs.replace(at.store.current.round, number=1, anchor_version=version))
    at.loop._shards = SimpleNamespace(  # type: ignore[assignment]
        inserted=700, watch=lambda _: None, at_most=lambda count: count, recent=lambda _: make_transitions(at.config, 50)
    )
    at.loop._progress.fitted, at.loop._last["watch"] = True, -loop_module.WATCH_MS
    monkeypatch.setattr(at.loop, "_train", lambda _: stop.set())
    monkeypatch.setattr(at.loop, "_save", lambda _: None)
    learner = Calls()
    at.loop._learn(learner, stop)  # type: ignore[arg-type]
    assert (at.loop.status()["round"], at.loop._progress.round_from) == (1, 700), "its own round has 4,300 steps to go"
    assert learner.made == ["set_scales", "set_anchor", *([] if ours else ["start_from_anchor"])]


@pytest.mark.parametrize(("value", "starts"), [(0.0, False), (0.6, True)])
def test_learning_that_begins_starts_from_any_anchor_but_control(
    ending: Callable[[str], Ending], monkeypatch: pytest.MonkeyPatch, value: float, *, starts: bool
) -> None:
    at = ending("off")
    at.store.start_round(msgspec.structs.replace(at.store.current.round, number=1, anchor_version=at.publish(value)))
    at.loop._shards = SimpleNamespace(inserted=5_000, recent=lambda _: make_transitions(at.config, 50))  # type: ignore[assignment]
    monkeypatch.setattr(at.loop, "_save", lambda _: None)
    learner = Calls()
    assert at.loop._warm_up(learner)  # type: ignore[arg-type]
    assert learner.made == ["set_scales", "set_anchor", *(["start_from_anchor"] if starts else [])]


def test_a_loop_that_ends_gives_up_its_judgement(ending: Callable[[str], Ending]) -> None:
    at = ending("block")
    at.publish(0.1)
    at.end()
    at.loop._forget_verdict()
    assert FakeJudging.made[0].cancelled
    at.end()
    assert len(FakeJudging.made) == 2


def full_disk(*_: object) -> None:
    """As Ray raises what an actor's method raised."""
    raise RayTaskError("PolicyStoreActor", "its traceback", OSError(28, "No space left on device")).as_instanceof_cause()


def test_a_store_that_cannot_write_costs_neither_the_learners_nor_the_round(
    ending: Callable[[str], Ending], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at = ending("off")
    learner, spec = at.config.learner, at.config.spec.build()
    actor = make_actor(spec, learner.hidden_sizes, learner.embedding_size, level=learner.level, shape=learner.actor)
    parameters = {name: tensor.numpy() for name, tensor in actor.state_dict().items()}
    algorithm = cast(EnhancedRL, SimpleNamespace(published=lambda: (parameters, Normaliser.identity(spec), 40), lineage={}))
    monkeypatch.setattr(at.loop, "_telemetry", SimpleNamespace(count=lambda *_, **__: None))
    version = at.publish(0.1)
    with monkeypatch.context() as failing:
        for name in ("publish", "start_round"):
            failing.setattr(at.store, name, full_disk)
        at.loop._publish(algorithm)
        at.end()
    text = "policy store failed: OSError(28, 'No space left on device'), trying again"
    assert caplog.text.count(text) == 2 and "does not answer" not in caplog.text
    assert at.loop.status()["published"] == 0 == at.loop._published_steps and at.anchor == CONTROL_VERSION
    at.loop._publish(algorithm)
    at.end()
    assert at.loop.status()["version"] == version + 1 == at.anchor and at.loop._published_steps == 40


def test_a_loop_without_a_log_to_read_is_refused(tmp_path: Path) -> None:
    config: Config = load_config("configs/demo.yaml", ["policy.second_tier=block"])
    handles: dict[str, Any] = {"store": None, "shards": [], "checkpoint_dir": tmp_path, "clock_ms": lambda: 0}
    with pytest.raises(LoopError, match="has no log to read"):
        TrainingLoop(config, **handles)
