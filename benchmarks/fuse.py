"""Time of one decision in a replica, without HTTP: decode, check, act, rank, record, encode. `python -m benchmarks.fuse`"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np
import torch

from esrl_ray.algo.actor import Actor
from esrl_ray.config import Config, ServeConfig, SpecConfig
from esrl_ray.exploration import arm_of
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Manifest, Policy, PolicyKind
from esrl_ray.vocabulary import Arm, Round
from serve.fuser import Served, decide
from serve.schemas import parse
from streaming.wire import encode

REPEATS = 400


def deployment(num_scores: int) -> Config:
    """20 features and some scores."""
    names = tuple(f"score_{i}" for i in range(num_scores))
    spec = SpecConfig(
        user_features=tuple(f"u{i}" for i in range(10)),
        item_features=tuple(f"i{i}" for i in range(8)),
        context_features=("c0", "c1"),
        scores=names,
        power_base=(0.5,) * num_scores,
    )
    return Config(spec=spec, serve=ServeConfig(list_size=10))


def learnt(config: Config, version: int) -> Policy:
    """A policy with random parameters and two hidden layers of 64."""
    spec = config.spec.build()
    torch.manual_seed(version)
    actor = Actor(spec, (64, 64), 8)
    manifest = Manifest(version=version, digest="", kind=PolicyKind.PAIR, spec=spec, hidden_sizes=(64, 64), embedding_size=8)
    return Policy.of(manifest, {k: v.numpy() for k, v in actor.state_dict().items()}, Normaliser.identity(spec))


def body(config: Config, num_candidates: int, user_id: str) -> bytes:
    """A request with arrays in the spec's order."""
    rng = np.random.default_rng(0)
    candidates = [
        {
            "item_id": f"item-{i}",
            "features": rng.normal(size=len(config.spec.item_features)).tolist(),
            "scores": rng.uniform(0.01, 0.99, len(config.spec.scores)).tolist(),
        }
        for i in range(num_candidates)
    ]
    user, context = [0.5] * len(config.spec.user_features), [0.5] * len(config.spec.context_features)
    request = {"request_id": "r", "session_id": "s", "user_id": user_id, "user_features": user, "context_features": context}
    return msgspec.json.encode({**request, "candidates": candidates})


def quantiles(call: Callable[[], object]) -> str:
    """Median and 99th percentile of wall time, and mean CPU time, in ms."""
    for _ in range(20):
        call()
    walls, cpu = [], time.process_time()
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        walls.append((time.perf_counter() - start) * 1e3)
    cpu = (time.process_time() - cpu) / REPEATS * 1e3
    return f"p50 {np.quantile(walls, 0.5):6.2f}  p99 {np.quantile(walls, 0.99):6.2f}  cpu {cpu:6.2f} ms"


def main() -> None:
    """Print one line per size and arm."""
    torch.set_num_threads(1)
    for num_candidates, num_scores in ((50, 5), (200, 10), (500, 10)):
        config = deployment(num_scores)
        turn = Round(1, 2, 7, -0.15, 0.15, 0)
        current, anchor = learnt(config, 3), learnt(config, 2)
        served = Served(1, current, anchor, turn, pinned=False, published_ms=0, spec_digest=config.spec.build().digest)
        served.warm(num_candidates)
        for arm in (Arm.EXPLORE, Arm.EXPLOIT, Arm.CONTROL):
            user_id = next(u for u in map(str, range(1000)) if arm_of(u, config.exploration) is arm)
            payload = body(config, num_candidates, user_id)

            def whole(payload: bytes = payload, config: Config = config, served: Served = served) -> None:
                reply, decision = decide(parse(payload, served.spec, config), served, config, decision_id="d", now_ms=0)
                msgspec.json.encode(reply)
                encode(decision)

            def parsing(payload: bytes = payload, config: Config = config, served: Served = served) -> None:
                parse(payload, served.spec, config)

            print(f"{num_candidates:4d} x {num_scores:2d} {arm:8} {len(payload) / 1e3:6.1f} KB  whole     {quantiles(whole)}")
            print(f"{'':33}of it decode and check  {quantiles(parsing)}")


if __name__ == "__main__":
    main()
