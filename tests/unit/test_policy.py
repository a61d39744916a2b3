"""An immutable policy: what it computes, its bytes, its files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.config import CategoricalConfig, Config, SpecConfig
from esrl_ray.errors import PolicyRejected
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import MANIFEST_FILE, TENSORS_FILE, Manifest, Policy, PolicyKind

SPEC = Config(
    spec=SpecConfig(
        user_features=("act",), item_features=("age",), categorical_features=(CategoricalConfig(name="tab", cardinality=3, side="item"),)
    )
).spec.build()


def learnt(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    actor = Actor(SPEC, (8, 8), 4)
    normaliser = Normaliser(np.array([1, 2, -1, -2], np.float32), np.array([2, 1, 0.5, 4], np.float32))
    manifest = Manifest(
        version=3, digest="", kind=PolicyKind.PAIR, spec=SPEC, hidden_sizes=(8, 8), embedding_size=4, lineage={"ingest-0": 5, "ingest-1": 7}
    )
    return Policy.of(manifest, {name: value.detach().numpy() for name, value in actor.state_dict().items()}, normaliser)


def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(2, 5, 2)).astype(np.float32),
        rng.integers(0, 3, (2, 5, 1)).astype(np.int32),
        rng.uniform(0, 1, (2, 5, 2)).astype(np.float32),
    )


def test_a_pair_policy_is_its_network_on_normalised_state_and_log_scores() -> None:
    policy = learnt()
    states, categorical, scores = pairs()
    expected = np.empty((2, 5, 4), np.float32)
    p = policy.parameters
    for i, j in np.ndindex(2, 5):
        raw = np.concatenate([states[i, j], np.log(np.maximum(scores[i, j], 1e-6))])
        x = np.concatenate([(raw - policy.normaliser.mean) / policy.normaliser.std, p["embeddings.0.weight"][categorical[i, j, 0]]])
        for layer in (0, 1):
            x = np.maximum(p[f"layers.{layer}.weight"] @ x + p[f"layers.{layer}.bias"], 0)
        expected[i, j] = np.tanh(p["layers.2.weight"] @ x + p["layers.2.bias"])
    np.testing.assert_allclose(policy.act(states, categorical, scores), expected, atol=1e-6)


def test_control_gives_every_pair_a_equal_0() -> None:
    actions = Policy.static(SPEC).act(*pairs())
    assert actions.shape == (2, 5, 4) and actions.dtype == np.float32 and not actions.any()


def test_bytes_and_files_give_the_same_policy_back(tmp_path: Path) -> None:
    policy = learnt()
    policy.save(tmp_path / "00000003")
    for again in (Policy.from_bytes(policy.to_bytes()), Policy.load(tmp_path / "00000003")):
        assert again.manifest == policy.manifest
        np.testing.assert_array_equal(again.act(*pairs()), policy.act(*pairs()))
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"], "nothing temporary is left"


def test_the_same_parameters_have_the_same_digest_and_others_another() -> None:
    assert learnt(0).manifest.digest == learnt(0).numbered(99).manifest.digest
    assert learnt(0).manifest.digest != learnt(1).manifest.digest


@pytest.mark.parametrize("name", [TENSORS_FILE, MANIFEST_FILE])
def test_a_file_with_one_wrong_byte_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "00000003"
    learnt().save(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / name).write_bytes(content)
    with pytest.raises(PolicyRejected):
        Policy.load(folder)


@pytest.mark.parametrize("name", [TENSORS_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("size", [None, 0, 50])
def test_a_missing_or_cut_file_is_refused(tmp_path: Path, name: str, size: int | None) -> None:
    folder = tmp_path / "00000003"
    learnt().save(folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if size is not None:
        (folder / name).write_bytes(content[:size])
    with pytest.raises(PolicyRejected):
        Policy.load(folder)


@pytest.mark.parametrize(
    "blob", [b"", b"nonsense", msgspec.msgpack.encode((b"{}", b"")), msgspec.msgpack.encode((b"{}",)), learnt().to_bytes()[:-1]]
)
def test_bytes_that_are_not_a_policy_are_refused(blob: bytes) -> None:
    with pytest.raises(PolicyRejected):
        Policy.from_bytes(blob)
