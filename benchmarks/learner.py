"""Speed of learning, each against the plain way of doing the same, interleaved in one run: only the ratios mean anything.

- A gradient step through RLlib, local and remote, against the bare torch loop with the same math.
- A critic step of the batched ensemble (q = 2 groups x m critics) against as many separate modules.

OMP_NUM_THREADS=1 python -m benchmarks.learner [--quick] [--remote] [--config configs/demo.yaml] [--set learner.batch_size=256]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import ray
import torch
from torch import nn

from benchmarks.timing import Table, in_turns
from esrl_ray.algo.losses import list_sum_td
from esrl_ray.algo.networks import Critics
from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.feed import to_multi_agent_batch
from esrl_ray.vocabulary import TransitionBatch

NUM_GROUPS = 2
CRITICS = (1, 2, 10, 24)  # m
BATCHES = (64, 128, 256)  # B


def made_up(config: Config, num_steps: int) -> TransitionBatch:
    """Full lists of random numbers."""
    spec, rng, g, h = config.spec.build(), np.random.default_rng(0), config.max_pairs, config.learner.num_future

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(num_steps, *shape)).astype(np.float32)

    shown = np.zeros((num_steps, g), np.float32)
    shown[:, : config.serve.list_size] = 1
    codes, ones = np.zeros((num_steps, g, spec.num_categorical), np.int32), np.ones(num_steps, np.float32)
    anchors = np.tanh(0.1 * normal(g, spec.num_actions))
    batch = TransitionBatch(
        states=normal(g, spec.num_features),
        categorical=codes,
        scores=np.exp(normal(g, spec.num_scores)),
        actions=anchors + rng.uniform(-0.15, 0.15, anchors.shape).astype(np.float32),
        anchor_actions=anchors,
        rewards=normal(g, config.reward.num_groups),
        shown=shown,
        valid=np.ones_like(shown),
        next_states=normal(g, spec.num_features),
        next_categorical=codes,
        next_scores=np.exp(normal(g, spec.num_scores)),
        next_shown=shown,
        has_next=ones,
        terminated=0 * ones,
    )
    if h:
        batch["future_known"] = np.ones((num_steps, h), np.float32)
        batch["future_terminated"] = np.zeros((num_steps, h), np.float32)
        batch["future_change"] = normal(spec.num_features + spec.num_scores)
        batch["future_change_known"] = ones
        batch["candidate_means"] = normal(spec.num_features + spec.num_scores)
        batch["cohort"] = rng.integers(0, 3, num_steps).astype(np.int32)
    return batch


def through_rllib(config: Config, *, remote: Config | None = None, compiled: Config | None = None, rounds: int) -> Table:
    """A gradient step: bare torch, local learner, and, with a configuration of theirs, a remote and a compiled one."""
    per_call = config.learner.updates_per_call
    transitions = made_up(config, config.learner.batch_size * per_call)
    batch = to_multi_agent_batch(transitions)
    state, local = LearnState.create(config), EnhancedRL.of(config)

    def bare() -> None:
        for part in prepare(state, transitions).split(per_call):
            result = update(state, part)
        float(result.critic_loss)

    base = "bare torch loop"
    calls: dict[str, Callable[[], None]] = {base: bare, "RLlib, local learner": lambda: local.learn({}, [batch])}
    if remote is not None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        away, ref = EnhancedRL.of(remote), ray.put(batch)
        calls["RLlib, one remote learner"] = lambda: away.learn({}, [ref])
    if compiled is not None:
        with_compile = EnhancedRL.of(compiled)
        calls["RLlib, local learner, learner.compile"] = lambda: with_compile.learn({}, [batch])
    found = in_turns(calls, rounds=rounds)
    rows = [
        (name, *(f"{1e3 * value / per_call:.2f}" for value in each), *(f"{a / b:.2f}" for a, b in zip(each, found[base], strict=True)))
        for name, each in found.items()
    ]
    return Table(
        f"Gradient step: critic {config.learner.critic}, B = {config.learner.batch_size}, {per_call} steps per call",
        "at most 1.1 times the bare torch loop",
        ("", "ms of the processor", "ms of wall time", "ratio (processor)", "ratio (wall)"),
        rows,
    )


class SeparateCritics(nn.Module):
    """The same critics as modules of their own, one forward pass each."""

    def __init__(self, num_inputs: int, num_critics: int, hidden_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (NUM_GROUPS, num_critics)
        self.critics = nn.ModuleList(self._mlp([num_inputs, *hidden_sizes, 1]) for _ in range(NUM_GROUPS * num_critics))

    @staticmethod
    def _mlp(widths: list[int]) -> nn.Sequential:
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
        """(q, m, N), as `Critics`."""
        x = torch.cat([numeric, relative], -1)
        return torch.stack([critic(x)[:, 0] for critic in self.critics]).view(*self.shape, -1)


def critic_step(critics: nn.Module, targets: nn.Module, config: Config, batch: int) -> Callable[[], None]:
    """One list-sum TD step of all critics on `batch` lists of random numbers."""
    spec, generator, size = config.spec.build(), torch.Generator().manual_seed(0), config.serve.list_size
    pairs = batch * size

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    numeric, next_numeric = drawn(pairs, spec.num_features + spec.num_scores), drawn(pairs, spec.num_features + spec.num_scores)
    relative, next_relative = drawn(pairs, spec.num_actions), drawn(pairs, spec.num_actions)
    codes, rewards = torch.zeros(pairs, 0, dtype=torch.int64), drawn(batch, size, NUM_GROUPS)
    shown, ones = torch.ones(batch, size), torch.ones(batch)
    parameters = list(critics.parameters())
    optimiser = torch.optim.Adam(parameters, lr=1e-3, foreach=True)

    def step() -> None:
        with torch.no_grad():
            following = targets(next_numeric, codes, next_relative).unflatten(-1, (batch, size))
        values = critics(numeric, codes, relative).unflatten(-1, (batch, size))
        loss = list_sum_td(values, shown, rewards, next_values=following, next_shown=shown, bootstrap=ones, gamma=0.9)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()

    return step


def products_alone(config: Config, num_critics: int, batch: int) -> Callable[[], None]:
    """The matrix products of such a step and nothing else, into places that exist, a few critics at a time: these stay in the cache."""
    spec, pairs, count = config.spec.build(), batch * config.serve.list_size, NUM_GROUPS * num_critics
    widths = [spec.num_features + spec.num_scores + spec.num_actions, *config.learner.hidden_sizes, 1]
    part = next(size for size in (4, 2, 1) if count % size == 0)
    weights = [torch.randn(count, b, a) for a, b in pairwise(widths)]
    gradients = [torch.empty_like(weight) for weight in weights]
    here, following = torch.randn(part, widths[0], pairs), torch.randn(part, widths[0], pairs)
    forward, backward = ([torch.randn(part, width, pairs) for width in widths[1:]] for _ in range(2))

    def step() -> None:
        for start in range(0, count, part):
            mine, wanted = ([tensor[start : start + part] for tensor in tensors] for tensors in (weights, gradients))
            for x in (following, here):
                torch.mm(mine[0].flatten(0, 1), x[0], out=forward[0].view(-1, pairs))
                for layer in range(1, len(mine)):
                    torch.bmm(mine[layer], forward[layer - 1], out=forward[layer])
            for layer in range(len(mine) - 1, -1, -1):
                below = forward[layer - 1] if layer else here
                torch.bmm(backward[layer], below.transpose(1, 2), out=wanted[layer])
                if layer:
                    torch.bmm(mine[layer].transpose(1, 2), backward[layer], out=backward[layer - 1])

    return step


def ensemble(config: Config, *, rounds: int, critics: Sequence[int] = CRITICS, batches: Sequence[int] = BATCHES) -> Table:
    """A critic step of the ensemble and of separate modules for each m and B."""
    spec, sizes = config.spec.build(), config.learner.hidden_sizes
    num_inputs = spec.num_features + spec.num_scores + spec.num_actions
    rows = []

    def together(num_critics: int) -> Critics:
        return Critics(spec, NUM_GROUPS, num_critics, hidden_sizes=sizes, embedding_size=config.learner.embedding_size)

    for num_critics in critics:
        for batch in batches:
            calls = {
                "together": critic_step(together(num_critics), together(num_critics), config, batch),
                "separate": critic_step(
                    SeparateCritics(num_inputs, num_critics, sizes), SeparateCritics(num_inputs, num_critics, sizes), config, batch
                ),
                "products": products_alone(config, num_critics, batch),
            }
            found = in_turns(calls, rounds=rounds)
            one, many, least = (found[name].cpu for name in calls)
            times = (f"{1e3 * one:.2f}", f"{1e3 * many:.2f}", f"{1e3 * least:.2f}")
            target = "2" if num_critics == 10 else "1"
            rows.append((str(num_critics), str(batch), *times, f"{many / one:.2f}", target, f"{many / least:.2f}"))
    return Table(
        f"Critic step of {NUM_GROUPS} groups x m critics, layers {', '.join(map(str, sizes))}: one ensemble against separate modules",
        "ratio at least 1 at every m and B, at least 2 at m = 10",
        ("m", "B", "ensemble, ms", "separate, ms", "products alone, ms", "ratio", "target", "ratio of products alone"),
        rows,
        [
            "Processor time of one thread: list-sum TD with targets, gradients and Adam. B is lists; each has 5 pairs. Products alone: the "
            "step's matrix products in float32, without loss, relu, bias or Adam: no ensemble of such products can have a larger one."
        ],
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under two minutes")
    parser.add_argument("--remote", action="store_true", help="also a remote learner")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 7 if arguments.quick else 40
    config, remote = (load_config(arguments.config, [*arguments.overrides, f"learner.num_learners={n}"]) for n in (0, 1))
    print(through_rllib(config, remote=remote if arguments.remote else None, rounds=rounds).markdown(), "\n")
    print(ensemble(config, rounds=rounds).markdown())


if __name__ == "__main__":
    main()
