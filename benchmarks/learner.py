"""Milliseconds per gradient step: the bare torch loop against RLlib's local and remote learner, same math, interleaved rounds.

OMP_NUM_THREADS=1 python benchmarks/learner.py [--config configs/demo.yaml] [--set learner.batch_size=256] [--remote]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import ray
import torch

from esrl_ray.algo.update import LearnState, prepare, update
from esrl_ray.config import Config, load_config
from esrl_ray.learning.algorithm import EnhancedRL
from esrl_ray.learning.feed import to_multi_agent_batch
from esrl_ray.vocabulary import TransitionBatch


def made_up(config: Config, num_steps: int) -> TransitionBatch:
    """Full lists of random numbers."""
    spec, rng, g = config.spec.build(), np.random.default_rng(0), config.max_pairs

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(num_steps, g, *shape)).astype(np.float32)

    shown = np.zeros((num_steps, g), np.float32)
    shown[:, : config.serve.list_size] = 1
    codes, ones = np.zeros((num_steps, g, spec.num_categorical), np.int32), np.ones(num_steps, np.float32)
    anchors = np.tanh(0.1 * normal(spec.num_actions))
    return TransitionBatch(
        states=normal(spec.num_features),
        categorical=codes,
        scores=np.exp(normal(spec.num_scores)),
        actions=anchors + rng.uniform(-0.15, 0.15, anchors.shape).astype(np.float32),
        anchor_actions=anchors,
        rewards=normal(config.reward.num_groups),
        shown=shown,
        valid=np.ones_like(shown),
        next_states=normal(spec.num_features),
        next_categorical=codes,
        next_scores=np.exp(normal(spec.num_scores)),
        next_shown=shown,
        has_next=ones,
        terminated=0 * ones,
    )


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--remote", action="store_true", help="also a remote learner")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    config = load_config(arguments.config, [*arguments.overrides, "learner.num_learners=0"])
    per_call = config.learner.updates_per_call
    transitions = made_up(config, config.learner.batch_size * per_call)
    ref = ray.put(to_multi_agent_batch(transitions))
    state, local = LearnState.create(config), EnhancedRL.of(config)

    def bare() -> None:
        for part in prepare(state, transitions).split(per_call):
            result = update(state, part)
        float(result.critic_loss)

    calls: dict[str, Callable[[], None]] = {"bare torch loop": bare, "RLlib, local learner": lambda: local.learn({}, [ref])}
    if arguments.remote:
        remote = EnhancedRL.of(load_config(arguments.config, [*arguments.overrides, "learner.num_learners=1"]))
        calls["RLlib, one remote learner"] = lambda: remote.learn({}, [ref])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(arguments.rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start) / per_call)
    base = statistics.median(times["bare torch loop"])
    for name, each in times.items():
        print(f"{name:<28} {statistics.median(each):7.2f} ms per gradient step  x {statistics.median(each) / base:.2f}")


if __name__ == "__main__":
    main()
