"""The gate's first tier, with distances worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.config import Config, PolicyConfig, SpecConfig
from esrl_ray.evaluation.gate import distance, judge
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.vocabulary import Floats, Round, TransitionBatch

SPEC = Config(spec=SpecConfig(user_features=("act",), item_features=("age",))).spec.build()
TURN = Round(1, 1, 0, -0.15, 0.15, 0)
LIMITS = PolicyConfig()
CONTROL = Policy.static(SPEC).numbered(1)


def constant(action: float) -> Policy:
    """A network that gives every pair the same action in every dimension."""
    actor = Actor(SPEC, (8,), 4)
    parameters = {name: np.zeros_like(value.numpy()) for name, value in actor.state_dict().items()}
    parameters["layers.1.bias"] = np.full(SPEC.num_actions, np.arctanh(action), np.float32)
    manifest = Manifest(version=0, digest="", kind=PolicyKind.PAIR, spec=SPEC, hidden_sizes=(8,), embedding_size=4, gradient_steps=5)
    return Policy.of(manifest, parameters, Normaliser.identity(SPEC))


def probe(num_steps: int = 4, num_pairs: int = 3) -> TransitionBatch:
    """Lists whose last pair is padding."""
    rng = np.random.default_rng(0)
    shape = (num_steps, num_pairs)
    valid = np.ones(shape, np.float32)
    valid[:, -1] = 0
    zeros = np.zeros(shape, np.float32)
    states, scores = rng.normal(size=(*shape, 2)).astype(np.float32), rng.uniform(0.1, 0.9, (*shape, 2)).astype(np.float32)
    actions = np.zeros((*shape, 4), np.float32)
    categorical = np.zeros((*shape, 0), np.int32)
    per_step = np.zeros(num_steps, np.float32)
    return TransitionBatch(
        states=states, categorical=categorical, scores=scores, actions=actions, anchor_actions=actions, rewards=zeros[..., None],
        shown=valid, valid=valid, next_states=states, next_categorical=categorical, next_scores=scores, next_shown=zeros,
        has_next=per_step, terminated=per_step,
    )  # fmt: skip


def verdict(
    policy: Policy, batch: TransitionBatch | None = None, *, anchor: Policy = CONTROL, limits: PolicyConfig = LIMITS
) -> tuple[bool, str]:
    found = judge(policy, spec=SPEC, anchor=anchor, turn=TURN, probe=batch, config=limits)
    return found.passed, found.text


def test_distance_is_in_widths_of_the_bounds() -> None:
    anchor = np.zeros((2, 2), np.float32)
    actions = np.array([[0.3, 0.0], [0.1, -0.2]], np.float32)
    far = distance(actions, anchor, TURN)
    assert far.drift == pytest.approx((0.3 + 0.0 + 0.1 + 0.2) / 4 / 0.3)
    assert far.outside_share == 0.5


def test_a_policy_inside_the_bounds_passes_and_the_verdict_has_the_numbers() -> None:
    passed, text = verdict(constant(0.06), probe())
    assert passed and "drift 0.200 widths" in text and "0.0% of actions outside" in text and "8 pairs" in text


def test_a_policy_with_all_actions_outside_the_bounds_is_refused() -> None:
    passed, text = verdict(constant(0.3), probe())
    assert not passed and "100.0% of actions outside the bounds" in text


def test_drift_has_its_own_limit() -> None:
    assert verdict(constant(0.3), probe(), limits=PolicyConfig(max_outside_share=1.0))[0]
    passed, text = verdict(constant(0.9), probe(), limits=PolicyConfig(max_outside_share=1.0))
    assert not passed and "drift 3.000 widths" in text


def test_distance_is_measured_from_the_anchor_not_from_zero() -> None:
    assert verdict(constant(0.55), probe(), anchor=constant(0.5))[0]


def test_without_a_probe_only_wholeness_is_judged_and_the_verdict_says_so() -> None:
    passed, text = verdict(constant(0.9))
    assert passed and "no probe" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["layers.0.weight", "layers.1.bias"])
def test_a_parameter_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    policy = constant(0.0)
    parameters = {key: array.copy() for key, array in policy.parameters.items()}
    parameters[name].flat[1] = value
    passed, text = verdict(Policy.of(policy.manifest, parameters, policy.normaliser), probe())
    assert not passed and name in text and "1 values" in text


@pytest.mark.parametrize("std", [0.0, np.nan])
def test_a_broken_normaliser_is_refused(std: float) -> None:
    policy = constant(0.0)
    broken = Normaliser(policy.normaliser.mean, np.full_like(policy.normaliser.std, std))
    assert not verdict(Policy.of(policy.manifest, policy.parameters, broken), probe())[0]


def wrong_shapes() -> list[dict[str, Floats]]:
    whole = dict(constant(0.0).parameters)
    return [
        {**whole, "layers.1.bias": np.zeros(3, np.float32)},
        {name: value for name, value in whole.items() if name != "layers.0.bias"},
        {**whole, "extra": np.zeros(1, np.float32)},
    ]


@pytest.mark.parametrize("parameters", wrong_shapes())
def test_parameters_of_wrong_names_or_shapes_are_refused(parameters: dict[str, Floats]) -> None:
    policy = constant(0.0)
    passed, text = verdict(Policy.of(policy.manifest, parameters, policy.normaliser), probe())
    assert not passed and "do not fit" in text


def test_a_policy_of_another_spec_is_refused() -> None:
    other = Config(spec=SpecConfig(user_features=("mood",), item_features=("age",))).spec.build()
    passed, text = verdict(Policy.static(other))
    assert not passed and SPEC.digest in text


def test_control_and_static_policies_pass_whatever_the_anchor_is() -> None:
    assert verdict(CONTROL, probe(), anchor=constant(0.9))[0]
    assert verdict(Policy.static(SPEC, np.full(4, 0.5, np.float32)), probe())[0]


def test_a_static_action_out_of_range_is_refused() -> None:
    passed, text = verdict(Policy.static(SPEC, np.full(4, 1.5, np.float32)))
    assert not passed and "[-1, 1]" in text
    short = replace(Policy.static(SPEC), parameters={"action": np.zeros(3, np.float32)})
    assert not verdict(short)[0]


def test_a_network_that_overflows_is_refused() -> None:
    policy = constant(0.0)
    huge = {name: np.full_like(value, 1e38) for name, value in policy.parameters.items()}
    with torch.inference_mode():
        passed, text = verdict(Policy.of(policy.manifest, huge, policy.normaliser), probe())
    assert not passed, text
