"""A gradient step on the meta device, which has no values: reading one is an error there, where a GPU would only be slower by a wait.

Adding, joining or choosing among tensors of which some were left on the CPU is one too; matrix products, `gather` and indices from the CPU
pass, and copies to the device cannot be seen. What needs a GPU stands at the end.
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

from esrl_ray.algo.actor import Actor
from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.errors import ConfigError
from esrl_ray.learning.algorithm_config import EnhancedRLConfig
from esrl_ray.methods.batchrl import BatchRL
from esrl_ray.methods.request_level import RequestBatch, RequestRounds
from esrl_ray.methods.supervised import ListRounds, Supervised, SupervisedWeights
from esrl_ray.methods.td3 import TD3_BC, Td3
from tests.step_tables import simulated_steps
from tests.transitions import make_transitions, with_codes

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
SMALL = ["learner.hidden_sizes=[8]", "learner.soft_update_every=2"]
PRINTED = ["learner.critic=list_sum", "learner.actor_loss=printed"]
SETTINGS: list[list[str]] = [
    [],
    ["learner.critic=list_sum"],
    ["learner.critic=per_pair"],
    [*PRINTED, "learner.phi=true", "learner.actor=ple", "learner.continuous_penalty=true"],
    [*PRINTED, "learner.level=request"],
]


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
    return load_config(DEMO, [*SMALL, "learner.device=meta", *settings])


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta has all kernels; torch takes joint ones from a list of devices without it."""
    monkeypatch.setattr("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: True)
    optimiser = importlib.import_module("torch.optim.optimizer")  # torch deletes the names of its modules
    monkeypatch.setattr(optimiser, "_get_fused_kernels_supported_devices", lambda: ["meta", "cuda"])


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_gradient_step_reads_no_value(settings: list[str]) -> None:
    config = with_codes(meta_config(*settings))
    batch = on_meta(prepare(LearnState.create(config, device="cpu"), make_transitions(config, 16)))
    state = LearnState.create(config)
    for _ in range(4):  # targets follow, or f is solved for, in two of them
        result = update(state, batch)
    assert state.gradient_steps == 4 and {value.device.type for value in result} == {"meta"}


def request_batch(config: Config) -> RequestBatch:
    requests, _ = RequestRounds("any", config, seed=0).begin(simulated_steps(config, 60))
    return requests.batch(requests.samplable[:16])


MAKE = pytest.mark.parametrize("make", [Td3, partial(Td3, settings=TD3_BC), BatchRL])


@MAKE
def test_steps_of_peers_of_requests_read_none_either(make: Callable[..., Td3 | BatchRL]) -> None:
    config = meta_config()
    method, batch = make("any", config, seed=0), request_batch(config).on(torch.device("meta"))
    for _ in range(10):  # BatchRL's targets follow in the last one
        result = method.update(batch)
    assert {value.device.type for value in result if value is not None} == {"meta"}
    if isinstance(method, BatchRL):
        assert method.act(batch.numeric, batch.categorical).device.type == "meta"


def test_steps_of_supervised_peers_read_none_either() -> None:
    config = meta_config()
    rounds, steps = ListRounds("any", config, seed=0), simulated_steps(config, 60)
    batch = rounds.draw(steps, rounds.begin(steps)[0])
    assert {column.device.type for column in batch} == {"meta"}
    assert Supervised("any", config, seed=0).update(batch).device.type == "meta"
    method = SupervisedWeights("any", config, seed=0)
    for anchor in (None, Actor(config.spec.build(), (8,), 8).to("meta")):
        assert method.update(batch, anchor).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("settings", SETTINGS)
def test_on_a_gpu_a_gradient_step_does_not_wait(settings: list[str]) -> None:
    config = load_config(DEMO, [*SMALL, "learner.device=cuda", *settings])
    state = LearnState.create(config)
    batch = prepare(state, make_transitions(config, 16))
    update(state, batch)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@MAKE
def test_on_a_gpu_peers_learn(make: Callable[..., Td3 | BatchRL]) -> None:
    config = load_config(DEMO, [*SMALL, "learner.device=cuda", "learner.batch_size=16"])
    assert make("any", config, seed=0).fit(simulated_steps(config, 60)).manifest.gradient_steps > 0


def test_a_named_gpu_is_the_one_that_a_local_learner_takes() -> None:
    for device, expected in (("cpu", (0, 0)), ("cuda", (1, 0)), ("cuda:1", (1, 1))):
        config = EnhancedRLConfig().training(deployment=load_config(DEMO, [f"learner.device={device}"]))
        config.validate()
        assert (config.num_gpus_per_learner, config.local_gpu_idx) == expected
    with pytest.raises(ConfigError, match="cuda:1 names one GPU, and Ray deals GPUs to remote learners"):
        EnhancedRLConfig().training(deployment=load_config(DEMO, ["learner.device=cuda:1", "learner.num_learners=2"])).validate()
    with pytest.raises(ConfigError, match=r"learner\.device"):
        load_config(DEMO, ["learner.device=gpu"])
