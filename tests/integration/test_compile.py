"""`learner.compile`: the compiled step is the eager one, and without a compiler it is refused with a reason."""

from __future__ import annotations

import shutil

import pytest
import torch

from esrl_ray.algo.device import missing_for_compile
from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import load_config
from esrl_ray.errors import ConfigError
from tests.transitions import make_transitions

SET = ["learner.batch_size=16", "learner.hidden_sizes=[16, 16]", "learner.soft_update_every=5"]
STEPS = 12

missing = missing_for_compile()


@pytest.mark.skipif(missing is not None, reason=f"torch.compile needs {missing}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")  # torch's own
def test_a_compiled_step_equals_an_eager_one() -> None:
    states = []
    for compile_losses in ("false", "true"):
        config = load_config("configs/demo.yaml", [*SET, f"learner.compile={compile_losses}"])
        state = LearnState.create(config, device="cpu")
        for number in range(STEPS):  # lists of other lengths each time
            update(state, prepare(state, make_transitions(config, 16, seed=number)))
        states.append(state)
    eager, compiled = states
    for (name, a), b in zip(eager.networks.named_parameters(), compiled.networks.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"{name}: off by {float((a - b).abs().max())}"


def test_without_a_compiler_it_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("configs/demo.yaml", [*SET, "learner.compile=true"])
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-here")
    assert shutil.which("a-compiler-that-is-not-here") is None
    with pytest.raises(ConfigError, match=r"a C\+\+ compiler \(a-compiler-that-is-not-here.*learner.compile.*set false"):
        LearnState.create(config, device="cpu")
