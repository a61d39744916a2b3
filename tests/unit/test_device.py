"""A gradient step on the meta device, which has no values: what waits for a value, or leaves the device, is an error there.

A GPU would only be slower by a wait, and a column on the wrong device is an error only where there are two: this finds both on a CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.methods.batchrl import BatchRL
from esrl_ray.methods.request_level import RequestRounds
from esrl_ray.methods.supervised import ListRounds, Supervised, SupervisedWeights
from esrl_ray.methods.td3 import TD3_BC, Td3
from tests.step_tables import simulated_steps
from tests.transitions import make_transitions, with_codes

PRINTED = ["learner.critic=list_sum", "learner.actor_loss=printed"]


def on_meta(part: Any) -> Any:
    """The same batch without its values."""
    if isinstance(part, torch.Tensor):
        return part.to("meta")
    if part is None:
        return None
    assert is_dataclass(part) and not isinstance(part, type)
    return type(part)(**{f.name: on_meta(getattr(part, f.name)) for f in fields(part)})


def meta_config(*settings: str) -> Config:
    """The demo's with small networks on the meta device."""
    path = Path(__file__).parents[2] / "configs" / "demo.yaml"
    return load_config(path, ["learner.hidden_sizes=[8]", "learner.soft_update_every=2", "learner.device=meta", *settings])


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta has all kernels; torch takes joint ones from a list of devices without it."""
    monkeypatch.setattr("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: True)
    optimiser = importlib.import_module("torch.optim.optimizer")  # torch deletes the names of its modules
    monkeypatch.setattr(optimiser, "_get_fused_kernels_supported_devices", lambda: ["meta"])


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["learner.critic=list_sum"],
        ["learner.critic=per_pair"],
        [*PRINTED, "learner.phi=true", "learner.actor=ple", "learner.continuous_penalty=true"],
        [*PRINTED, "learner.level=request"],
    ],
)
def test_a_gradient_step_waits_for_no_value_and_stays_on_its_device(settings: list[str]) -> None:
    config = with_codes(meta_config(*settings))
    batch = on_meta(prepare(LearnState.create(config, device="cpu"), make_transitions(config, 16)))
    state = LearnState.create(config)
    for _ in range(4):  # targets follow, or f is solved for, in two of them
        result = update(state, batch)
    assert state.gradient_steps == 4 and {value.device.type for value in result} == {"meta"}


@pytest.mark.parametrize("make", [Td3, partial(Td3, settings=TD3_BC), BatchRL])
def test_steps_of_peers_of_requests_do_so_too(make: Callable[..., Td3 | BatchRL]) -> None:
    config = meta_config()
    requests, _ = RequestRounds("any", config, seed=0).begin(simulated_steps(config, 60))
    method, batch = make("any", config, seed=0), requests.batch(requests.samplable[:16]).on(torch.device("meta"))
    for _ in range(10):  # BatchRL's targets follow in the last one
        result = method.update(batch)
    assert {value.device.type for value in result if value is not None} == {"meta"}


def test_steps_of_supervised_peers_do_so_too() -> None:
    config = meta_config()
    rounds, steps = ListRounds("any", config, seed=0), simulated_steps(config, 60)
    batch = rounds.draw(steps, rounds.begin(steps)[0])
    assert {column.device.type for column in batch} == {"meta"}
    assert Supervised("any", config, seed=0).update(batch).device.type == "meta"
    assert SupervisedWeights("any", config, seed=0).update(batch, torch.zeros((), device="meta")).device.type == "meta"
