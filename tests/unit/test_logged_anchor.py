"""The anchor that a log was made around is found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import make_actor
from esrl_ray.config import Config, load_config
from esrl_ray.learning import logged_anchor as anchors
from esrl_ray.learning.logged_anchor import logged_anchor
from esrl_ray.methods.method import Exploration
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.replay.steps import Steps
from esrl_ray.simulation.rounds import SimulatedTraffic
from tests.step_tables import simulated_steps

SET = ["simulation.num_users=100", "simulation.num_items=500", "learner.hidden_sizes=[16, 16]", "exploration.explore_share=1"]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("configs/demo.yaml", [*SET, "exploration.exploit_share=0"])


def policy_of(config: Config, normaliser: Normaliser) -> Policy:
    """Weights that depend on the pair: about .4 from control."""
    spec, learner = config.spec.build(), config.learner
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        actor = make_actor(spec, learner.hidden_sizes, learner.embedding_size)
    parameters = {name: p.detach().numpy().copy() for name, p in actor.state_dict().items()}
    parameters["layers.2.weight"] *= 200
    manifest = Manifest(version=0, digest="", kind=PolicyKind.PAIR, spec=spec, hidden_sizes=learner.hidden_sizes, embedding_size=8)
    return Policy.of(manifest, parameters, normaliser)


def test_the_anchor_of_the_newest_round_is_found_from_its_actions(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "NUM_STEPS", 600)
    torch.set_num_threads(1)
    spec, control = config.spec.build(), Policy.static(config.spec.build())
    traffic, width = SimulatedTraffic(config, seed=0, capacity=3_000), np.full(spec.num_actions, 0.3, np.float32)
    for _ in traffic.serve(Exploration(control, -width, width), control, until=1_000, number=0):
        pass
    c = traffic.steps.columns
    served = policy_of(config, Normaliser.fit(c["states"], c["scores"], c["valid"] > 0))
    for _ in traffic.serve(Exploration(served, -width, width), served, until=2_800, number=1):
        pass
    for _ in traffic.serve(Exploration(control, -width, width), control, until=2_900, number=2):  # has only begun
        pass
    found = logged_anchor(traffic.steps, config)
    assert found is not None and found.manifest.round == 1
    c = {name: column[-400:] for name, column in traffic.steps.columns.items()}
    wanted, got = (policy.act(c["states"], c["categorical"], c["scores"]) for policy in (served, found))
    assert np.sqrt(np.square(wanted).mean()) > 0.2
    assert np.sqrt(np.square(wanted - got).mean()) < 0.06, found.manifest.note


def test_a_log_around_control_has_no_anchor_to_find(config: Config) -> None:
    steps: Steps = simulated_steps(config, 300)
    assert logged_anchor(steps, config) is None
