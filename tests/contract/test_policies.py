"""What every kind of policy does: act, be saved, loaded, sent, renumbered, and refuse what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor, PleActor
from esrl_ray.config import Config
from esrl_ray.errors import PolicyRejected
from esrl_ray.normaliser import Normaliser, numeric_input
from esrl_ray.policy.policy import TENSORS_FILE, Manifest, Policy, PolicyKind
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Floats, Ints


def static(spec: Spec) -> Policy:
    return Policy.static(spec, np.linspace(-0.5, 0.5, spec.num_actions, dtype=np.float32))


def pair(spec: Spec) -> Policy:
    parameters = {name: value.numpy() for name, value in Actor(spec, (8,), 4).state_dict().items()}
    manifest = Manifest(version=0, digest="", kind=PolicyKind.PAIR, spec=spec, hidden_sizes=(8,), embedding_size=4)
    return Policy.of(manifest, parameters, Normaliser.identity(spec))


def ple(spec: Spec) -> Policy:
    actor = PleActor(spec, (8,), 4)
    for parameter in actor.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    manifest = Manifest(version=0, digest="", kind=PolicyKind.PAIR, spec=spec, hidden_sizes=(8,), embedding_size=4, actor="ple")
    return Policy.of(manifest, {name: value.numpy() for name, value in actor.state_dict().items()}, Normaliser.identity(spec))


@pytest.fixture(params=[static, pair, ple])
def policy(request: pytest.FixtureRequest, config: Config) -> Policy:
    make: Callable[[Spec], Policy] = request.param
    return make(config.spec.build())


def pairs(spec: Spec, *shape: int) -> tuple[Floats, Ints, Floats]:
    rng = np.random.default_rng(1)
    states, scores = rng.standard_normal((*shape, spec.num_features)), rng.random((*shape, spec.num_scores))
    return states.astype(np.float32), np.zeros((*shape, spec.num_categorical), np.int32), scores.astype(np.float32)


def test_it_acts_on_any_leading_shape_within_the_range(policy: Policy) -> None:
    for shape in ((7,), (3, 7)):
        actions = policy.act(*pairs(policy.spec, *shape))
        assert actions.shape == (*shape, policy.spec.num_actions) and actions.dtype == np.float32
        assert (np.abs(actions) <= 1).all()


def test_a_ple_policy_acts_as_its_network(config: Config) -> None:
    policy, spec = ple(config.spec.build()), config.spec.build()
    actor = PleActor(spec, (8,), 4)
    actor.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in policy.parameters.items()})
    states, codes, scores = pairs(spec, 9)
    want = actor(torch.from_numpy(numeric_input(states, scores)), torch.from_numpy(codes).long()).detach().numpy()
    np.testing.assert_allclose(policy.act(states, codes, scores), want, atol=1e-6)
    assert np.ptp(want, axis=0).min() > 0.01


def test_it_comes_back_from_files_and_bytes_as_it_was(policy: Policy, tmp_path: Path) -> None:
    numbered = policy.numbered(7, parent=3)
    numbered.save(tmp_path / "v7")
    for again in (Policy.load(tmp_path / "v7"), Policy.from_bytes(numbered.to_bytes())):
        assert again.manifest == numbered.manifest and again.version == 7
        np.testing.assert_array_equal(again.act(*pairs(policy.spec, 5)), policy.act(*pairs(policy.spec, 5)))


def test_a_damaged_file_is_refused(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "v1")
    path = tmp_path / "v1" / TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PolicyRejected, match="sha256"):
        Policy.load(tmp_path / "v1")
    with pytest.raises(PolicyRejected, match="not a policy"):
        Policy.from_bytes(b"nonsense")
