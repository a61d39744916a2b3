"""The policy store: numbers, current, rounds, ways back, crashes; and its long-poll."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.config import Config, ExplorationConfig, SpecConfig
from esrl_ray.errors import PolicyRejected
from esrl_ray.evaluation.second_tier import Rule, abstained, load_verdict
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import TENSORS_FILE, Manifest, Policy, PolicyKind
from esrl_ray.policy.store import CURRENT_FILE, HISTORY_FILE, PolicyStore, read_snapshot, version_folder
from esrl_ray.policy.store_actor import PolicyStoreActor, own, owner_address
from esrl_ray.vocabulary import Round

CONFIG = Config(spec=SpecConfig(user_features=("act",), item_features=("age",)))
SPEC = CONFIG.spec.build()


class Clock:
    """Goes one millisecond further at each reading."""

    def __init__(self) -> None:
        self.now_ms = 1_000

    def __call__(self) -> int:
        self.now_ms += 1
        return self.now_ms


def store_at(folder: Path) -> PolicyStore:
    return PolicyStore(folder, CONFIG, clock_ms=Clock())


def learnt(seed: int = 0, *, steps: int = 10) -> bytes:
    torch.manual_seed(seed)
    actor = Actor(SPEC, (8,), 4)
    manifest = Manifest(
        version=0, digest="", kind=PolicyKind.PAIR, spec=SPEC, hidden_sizes=(8,), embedding_size=4, gradient_steps=steps, created_ms=7
    )
    parameters = {name: value.detach().numpy() for name, value in actor.state_dict().items()}
    return Policy.of(manifest, parameters, Normaliser.identity(SPEC)).to_bytes()


def current(store: PolicyStore) -> Policy:
    return Policy.from_bytes(store.snapshot().current)


def round_1(anchor: int) -> Round:
    return Round(1, anchor, 5, -0.15, 0.15, 9)


def test_an_empty_folder_serves_control_as_version_1_and_anchor_of_round_0(tmp_path: Path) -> None:
    snapshot = store_at(tmp_path / "policies").snapshot()
    policy = Policy.from_bytes(snapshot.current)
    assert policy.version == 1 and policy.manifest.kind is PolicyKind.STATIC and not policy.parameters["action"].any()
    assert snapshot.anchor == snapshot.current and snapshot.round.number == 0 and snapshot.round.anchor_version == 1
    assert (snapshot.round.low, snapshot.round.high) == (CONFIG.exploration.low, CONFIG.exploration.high) and not snapshot.pinned


def test_publish_numbers_judges_and_offers(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    assert [store.publish(learnt(seed), None) for seed in (1, 2)] == [2, 3]
    policy = current(store)
    assert policy.version == 3 and "no probe" in policy.manifest.verdict and policy.manifest.created_ms == 7
    assert policy.manifest.digest == Policy.from_bytes(learnt(2)).manifest.digest
    assert [m.version for m in store.manifests()] == [1, 2, 3]
    assert store.snapshot().published_ms >= policy.manifest.published_ms > 1_000
    assert store.published_ms().keys() == {1, 2, 3}
    assert read_snapshot(tmp_path) == store.snapshot()


def test_a_refused_policy_changes_nothing(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(), None)
    before = sorted(p.name for p in tmp_path.iterdir()), store.snapshot()
    good = Policy.from_bytes(learnt())
    bad = {name: np.full_like(value, np.nan) for name, value in good.parameters.items()}
    for blob in (learnt()[:-5], b"x", Policy.of(good.manifest, bad, good.normaliser).to_bytes()):
        with pytest.raises(PolicyRejected):
            store.publish(blob, None)
    assert (sorted(p.name for p in tmp_path.iterdir()), store.snapshot()) == before


def test_a_rollback_serves_the_old_parameters_under_a_new_number(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    store.publish(learnt(2), None)
    assert store.rollback(2) == 4
    policy = current(store)
    assert policy.version == 4 and policy.manifest.note == "rollback to 2" and policy.manifest.parent == 2
    assert policy.manifest.digest == store.load(2).manifest.digest and policy.manifest.gradient_steps == 10
    assert store.publish(learnt(3), None) == 5 and current(store).version == 5


def test_pin_static_serves_control_to_everyone_until_unpin(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    assert store.pin("static") == 3
    assert store.snapshot().pinned and not current(store).parameters["action"].any()
    assert store.publish(learnt(2), None) == 4, "learning goes on"
    assert current(store).version == 3, "but does not serve"
    with pytest.raises(PolicyRejected, match="pinned"):
        store.rollback(2)
    store.unpin()
    assert current(store).version == 4 and not store.snapshot().pinned


def test_a_pin_can_hold_an_old_version_and_move_to_another(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    assert (store.pin(2), store.pin(1)) == (3, 4)
    assert current(store).manifest.note == "pin 1" and store.snapshot().pinned
    store.unpin()
    store.unpin()
    assert current(store).version == 4, "nothing newer: what was pinned stays until the next publish"


@pytest.mark.parametrize("version", [0, 7])
def test_there_is_no_way_back_to_a_version_that_does_not_exist(tmp_path: Path, version: int) -> None:
    store = store_at(tmp_path)
    before = store.snapshot()
    for way in (store.rollback, store.pin):
        with pytest.raises(PolicyRejected):
            way(version)
    assert store.snapshot() == before


def test_a_round_moves_the_anchor_and_keeps_the_version(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    before = store.snapshot()
    store.start_round(round_1(2))
    snapshot = store.snapshot()
    assert snapshot.sequence == before.sequence + 1 and snapshot.current == before.current
    assert Policy.from_bytes(snapshot.anchor).version == 2 and snapshot.round == round_1(2)
    assert snapshot.published_ms == before.published_ms
    store.start_round(round_1(2))
    assert store.snapshot() == snapshot, "the same round again is ignored"


def test_rounds_only_go_up_and_need_a_whole_anchor(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    store.start_round(round_1(2))
    for turn in (Round(1, 1, 5, -0.15, 0.15, 9), Round(0, 1, 0, -0.15, 0.15, 9), Round(2, 99, 5, -0.15, 0.15, 9)):
        with pytest.raises(PolicyRejected):
            store.start_round(turn)
    assert store.snapshot().round == round_1(2)


def test_a_verdict_is_kept_beside_its_version_and_changes_nothing_that_serves(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    version, before = store.publish(learnt(), None), store.current
    said = [abstained(store.load(version), store.load(1), why, rule=Rule()) for why in ("no data", "still no data")]
    for verdict in said:
        store.keep_verdict(version, verdict)
    assert load_verdict(version_folder(tmp_path, version)) == said[1] and said[1].against == 1
    assert store_at(tmp_path).load(version).version == version and store.current == before
    with pytest.raises(PolicyRejected, match="judge that version"):
        store.keep_verdict(1, said[0])
    with pytest.raises(PolicyRejected):
        store.keep_verdict(9, said[0])


def test_the_gate_measures_from_the_rounds_anchor(tmp_path: Path) -> None:
    """Distance 0.9 from control is refused by a drift limit that the same policy passes once it is the anchor itself."""
    from tests.unit.test_gate import SPEC as GATE_SPEC
    from tests.unit.test_gate import constant, probe

    config = Config(spec=SpecConfig(user_features=("act",), item_features=("age",)), exploration=ExplorationConfig(low=-0.15, high=0.15))
    assert config.spec.build() == GATE_SPEC
    store = PolicyStore(tmp_path, config, clock_ms=Clock())
    with pytest.raises(PolicyRejected, match="drift 3"):
        store.publish(constant(0.9).to_bytes(), probe())
    store.start_round(round_1(store.publish(constant(0.9).to_bytes(), None)))
    assert store.publish(constant(0.92).to_bytes(), probe()) == 3


def test_a_restarted_store_goes_on_where_it_was(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    store.start_round(round_1(2))
    store.pin(2)
    again = store_at(tmp_path)
    assert again.snapshot() == store.snapshot() and again.manifests() == store.manifests() and again.published_ms() == store.published_ms()
    again.unpin()
    assert again.publish(learnt(2), None) == 4


def test_a_crash_between_version_and_current_leaves_the_old_one_and_skips_a_number(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    written = (tmp_path / CURRENT_FILE).read_bytes()
    store.publish(learnt(2), None)
    (tmp_path / CURRENT_FILE).write_bytes(written)  # CRASH: version 3 is there, current.json still says 2
    (tmp_path / ".00000004.123").mkdir()  # CRASH: version 4 was being written
    again = store_at(tmp_path)
    assert current(again).version == 2 and not list(tmp_path.glob(".00*"))
    assert again.publish(learnt(3), None) == 4 and current(again).version == 4


def test_a_damaged_current_version_is_replaced_by_the_newest_whole_one_under_a_new_number(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    for seed in (1, 2, 3):
        store.publish(learnt(seed), None)
    for version in (3, 4):
        (version_folder(tmp_path, version) / TENSORS_FILE).write_bytes(b"damaged")
    again = store_at(tmp_path)
    policy = current(again)
    assert policy.version == 5 and policy.manifest.note == "version 4 is damaged, this is 2"
    with pytest.raises(PolicyRejected):
        again.rollback(3)


def test_a_damaged_current_json_is_an_error_and_a_cut_history_is_not(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    with (tmp_path / HISTORY_FILE).open("ab") as file:
        file.write(b'{"sequence": 3, "ver')  # CRASH
    assert store_at(tmp_path).published_ms() == store.published_ms()
    (tmp_path / CURRENT_FILE).write_text("{")
    with pytest.raises(PolicyRejected, match=CURRENT_FILE):
        store_at(tmp_path)


def test_a_folder_of_another_spec_is_refused(tmp_path: Path) -> None:
    store_at(tmp_path)
    with pytest.raises(PolicyRejected, match="another run"):
        PolicyStore(tmp_path, Config(spec=SpecConfig(user_features=("mood",))), clock_ms=Clock())


def test_an_empty_folder_has_no_snapshot_to_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match="no policy has been published"):
        read_snapshot(tmp_path)


def test_only_one_process_owns_a_folder(tmp_path: Path) -> None:
    with own(tmp_path / "p") as first, own(tmp_path / "p") as second, own(tmp_path / "other") as third:
        assert (first, second, third) == (True, False, True)
    with own(tmp_path / "p", address="127.0.0.1:6379") as again, own(tmp_path / "p", address="elsewhere") as other:
        assert again and not other and owner_address(tmp_path / "p") == "127.0.0.1:6379"


def test_waiting_for_news_returns_at_once_later_or_never(tmp_path: Path) -> None:
    async def scenario() -> None:
        actor = PolicyStoreActor(tmp_path, CONFIG, Clock())
        first = await actor.wait_newer(-1, 1.0)
        assert first is not None
        assert await actor.wait_newer(first.sequence, 0.05) is None
        waiting = [asyncio.create_task(actor.wait_newer(first.sequence, 10.0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await actor.publish(learnt(), None) == 2
        news = await asyncio.wait_for(asyncio.gather(*waiting), 1.0)
        assert [Policy.from_bytes(n.current).version for n in news if n] == [2, 2, 2]
        for change in (actor.start_round(round_1(2)), actor.pin("static"), actor.unpin(), actor.rollback(2)):
            have = (await actor.snapshot()).sequence
            waiting = [asyncio.create_task(actor.wait_newer(have, 10.0))]
            await asyncio.sleep(0)
            await change
            (found,) = await asyncio.wait_for(asyncio.gather(*waiting), 1.0)
            assert found is not None and found.sequence > have
        assert Policy.from_bytes(await actor.load_bytes(2)).version == 2
        assert [m.version for m in await actor.manifests()] == [1, 2, 3, 4]
        assert set(await actor.published_ms()) == {1, 2, 3, 4} and await actor.folder() == tmp_path

    asyncio.run(scenario())


def test_a_snapshot_survives_the_wire(tmp_path: Path) -> None:
    snapshot = store_at(tmp_path).snapshot()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=type(snapshot)) == snapshot


def test_a_deleted_anchor_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.publish(learnt(1), None)
    shutil.rmtree(version_folder(tmp_path, 1))
    with pytest.raises(PolicyRejected, match="00000001"):
        store_at(tmp_path)
