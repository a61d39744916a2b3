"""What every method does: learn from a log, act, be saved and loaded, serve, and refuse what it cannot learn from.

A method joins by its name in the catalogue. The log is small and the budget of gradient steps is `replay.samples_per_insert` of it, so
that slow methods are here too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esrl_ray.algo.networks import Critics
from esrl_ray.config import Config, SpecConfig, load_config
from esrl_ray.errors import MethodError, PolicyRejected
from esrl_ray.exploration import arm_of
from esrl_ray.methods.batchrl import BatchRL
from esrl_ray.methods.catalogue import NAMES, RLLIB_PEERS, create_method
from esrl_ray.methods.enhancedrl import EnhancedRL
from esrl_ray.methods.method import Exploration
from esrl_ray.policy.policy import Policy
from esrl_ray.policy.store import PolicyStore
from esrl_ray.replay.steps import Steps
from esrl_ray.simulation.rounds import SimulatedTraffic
from esrl_ray.vocabulary import Arm, Floats, Ints
from serve.fuser import Served, decide
from serve.schemas import parse
from streaming.wire import MSGPACK, decode_decision, encode

NUM_STEPS, SEED = 400, 3
SETTINGS = [
    "simulation.num_users=60",
    "simulation.num_items=300",
    "simulation.num_candidates=20",
    "learner.device=cpu",
    "learner.hidden_sizes=[8]",
    "learner.batch_size=16",
    "learner.updates_per_call=2",
    "replay.samples_per_insert=0.8",
]
RAY = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own
each_name = pytest.mark.parametrize("name", [pytest.param(name, marks=RAY if name in RLLIB_PEERS else ()) for name in NAMES])


@pytest.fixture(scope="module")
def deployment() -> Config:
    return load_config(Path(__file__).parents[2] / "configs" / "demo.yaml", SETTINGS)


@pytest.fixture(scope="module")
def log(deployment: Config) -> Steps:
    """Explore, exploit and control users under the control policy."""
    control, width = Policy.static(deployment.spec.build()), deployment.spec.build().num_actions
    low, high = (np.full(width, bound, np.float32) for bound in (deployment.exploration.low, deployment.exploration.high))
    traffic = SimulatedTraffic(deployment, seed=1, capacity=NUM_STEPS)
    for _ in traffic.serve(Exploration(control, low, high), control, until=NUM_STEPS, number=0):
        pass
    return traffic.steps


@pytest.fixture(scope="module")
def learnt(deployment: Config, log: Steps) -> dict[str, Policy]:
    """Policies that tests share, by name, each fitted when it is first asked for."""
    return Fitted(deployment, log)


class Fitted(dict[str, Policy]):
    """Fits a method when its policy is first asked for."""

    def __init__(self, deployment: Config, log: Steps) -> None:
        super().__init__()
        self._deployment, self._log = deployment, log

    def __missing__(self, name: str) -> Policy:
        self[name] = create_method(name, self._deployment, seed=SEED).fit(self._log)
        return self[name]


def pairs_of(log: Steps) -> tuple[Floats, Ints, Floats]:
    states, categorical, scores = (log.columns[name][:50] for name in ("states", "categorical", "scores"))
    return states, categorical, scores


def how_far_apart(a: Policy, b: Policy, log: Steps) -> str:
    """What two policies that should be one differ by: rounding, or another course of learning."""
    (actions, fused), (other_actions, other_fused) = (policy.fuse(*pairs_of(log)) for policy in (a, b))
    parts = {name: float(abs(value - b.parameters[name]).max(initial=0)) for name, value in a.parameters.items()}
    return (
        f"fused scores differ by up to {abs(fused - other_fused).max():.3g} of {abs(fused).max():.3g}, actions by "
        f"{abs(actions - other_actions).max():.3g}, normalisers by {abs(a.normaliser.mean - b.normaliser.mean).max():.3g} and "
        f"{abs(a.normaliser.std - b.normaliser.std).max():.3g}, parameters by { {k: v for k, v in parts.items() if v} }"
    )


def request(config: Config, user_id: str) -> dict[str, Any]:
    rng, spec = np.random.default_rng(2), config.spec
    candidates = [
        {
            "item_id": f"i{n}",
            "features": rng.normal(size=len(spec.item_features)).tolist(),
            "scores": rng.uniform(0.2, 2, len(spec.scores)).tolist(),
        }
        for n in range(20)
    ]
    sides = {"user_features": [0.3] * len(spec.user_features), "context_features": [0.1] * len(spec.context_features)}
    return {"request_id": "r", "session_id": "s", "user_id": user_id, **sides, "candidates": candidates}


@each_name
def test_it_explores_in_range_before_it_has_learnt(name: str, deployment: Config, log: Steps) -> None:
    exploration, spec = create_method(name, deployment, seed=SEED).exploration(), deployment.spec.build()
    assert exploration.centre.spec == spec and exploration.low.shape == exploration.high.shape == (spec.num_actions,)
    assert (exploration.low <= exploration.high).all() and (exploration.std is None or (exploration.std > 0).all())
    actions = exploration.centre.act(*pairs_of(log))
    assert actions.shape[-1] == spec.num_actions and (np.abs(actions) <= 1).all()


@each_name
def test_it_learns_from_a_log_a_policy_that_acts_finite_and_in_range(name: str, learnt: dict[str, Policy], log: Steps) -> None:
    states, categorical, scores = pairs_of(log)
    actions, fused = learnt[name].fuse(states, categorical, scores)
    assert actions.shape == (*scores.shape[:-1], learnt[name].spec.num_actions) and fused.shape == scores.shape[:-1]
    assert np.isfinite(actions).all() and (np.abs(actions) <= 1).all()
    assert np.isfinite(fused).all() and (np.ptp(fused, axis=1) > 0).all()


@each_name
def test_its_policy_comes_back_from_files_and_bytes_with_the_same_scores(
    name: str, learnt: dict[str, Policy], log: Steps, tmp_path: Path
) -> None:
    policy = learnt[name]
    policy.save(tmp_path / "v0")
    for again in (Policy.load(tmp_path / "v0"), Policy.from_bytes(policy.to_bytes())):
        assert again.manifest == policy.manifest
        np.testing.assert_array_equal(again.fuse(*pairs_of(log))[1], policy.fuse(*pairs_of(log))[1])


@each_name
def test_its_policy_passes_the_gate_and_serves_its_own_ranking(
    name: str, learnt: dict[str, Policy], deployment: Config, log: Steps, tmp_path: Path
) -> None:
    store = PolicyStore(tmp_path, deployment, clock_ms=lambda: 1_000)
    version = store.publish(learnt[name].to_bytes(), log.transitions(np.arange(64)))
    served, spec = Served.decode(store.snapshot()), deployment.spec.build()
    assert served.current.version == version == 2 and served.current.manifest.digest == learnt[name].manifest.digest
    user_id = next(f"u{n}" for n in range(1000) if arm_of(f"u{n}", deployment.exploration) is Arm.EXPLOIT)
    parsed = parse(json.dumps(request(deployment, user_id)).encode(), spec, deployment)
    reply, event = decide(parsed, served, deployment, decision_id="d", now_ms=5)
    actions, fused = learnt[name].fuse(parsed.states, parsed.categorical, parsed.scores)
    order = np.argsort(-fused, kind="stable")
    assert reply.policy_version == version and reply.item_ids == [f"i{n}" for n in order]
    np.testing.assert_allclose(reply.fused_scores, fused[order], rtol=1e-6)
    decision = decode_decision(encode(event), spec, MSGPACK)
    np.testing.assert_allclose(decision.actions[: reply.list_size], actions[order[: reply.list_size]], atol=1e-6)


@each_name
def test_another_deployment_refuses_its_policy(name: str, learnt: dict[str, Policy], tmp_path: Path) -> None:
    store = PolicyStore(tmp_path, Config(spec=SpecConfig(user_features=("act",))), clock_ms=lambda: 1_000)
    with pytest.raises(PolicyRejected, match=r"spec .* differs"):
        store.publish(learnt[name].to_bytes(), None)
    assert store.snapshot().current == store.snapshot().anchor


@each_name
def test_it_refuses_steps_of_another_width_and_says_what_to_do(name: str, deployment: Config, log: Steps) -> None:
    other = deployment.model_copy(update={"spec": deployment.spec.model_copy(update={"user_features": ("act", "pat")})})
    with pytest.raises(MethodError, match="wide") as refused:
        create_method(name, other, seed=SEED).fit(log)
    assert refused.value.what and refused.value.where == name and refused.value.fix


@each_name
def test_it_refuses_to_learn_from_no_steps(name: str, deployment: Config) -> None:
    with pytest.raises(MethodError, match="no steps") as refused:
        create_method(name, deployment, seed=SEED).fit(Steps(deployment, 10))
    assert refused.value.where == name and refused.value.fix


@each_name
def test_the_same_seed_gives_the_same_policy(name: str, learnt: dict[str, Policy], deployment: Config, log: Steps) -> None:
    np.random.seed(11)  # a method that draws from the global state would differ
    again, first = create_method(name, deployment, seed=SEED).fit(log), learnt[name]
    assert again.manifest.digest == first.manifest.digest, how_far_apart(again, first, log)


def test_an_unknown_name_is_refused_with_the_known_ones(deployment: Config) -> None:
    with pytest.raises(MethodError, match=r"no method 'nonsense'.*enhancedrl.*cem"):
        create_method("nonsense", deployment, seed=0)


def test_names_stand_for_what_is_published_under_them(deployment: Config, log: Steps) -> None:
    unified = create_method("unifiedrl", deployment, seed=SEED)
    assert isinstance(unified, EnhancedRL) and isinstance(critics := unified.state.networks.critics, Critics)
    assert critics.shape == (2, 24) and unified.state.networks.level == "request"
    satisfied = create_method("batchrl-mtf-satisfaction", deployment, seed=SEED)
    satisfied.fit(log)
    assert isinstance(satisfied, BatchRL) and satisfied.satisfaction is not None


@RAY
def test_rllib_has_the_peers_that_the_catalogue_names() -> None:
    from esrl_ray.learning.rllib_peers import PEERS, SETTINGS

    assert set(PEERS) == set(SETTINGS) == set(RLLIB_PEERS)
