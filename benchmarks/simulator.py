"""The simulator: list requests per second of processor time by the number of sessions served together. `python -m benchmarks.simulator`

A request is its candidates and what the user does with the list; ranking is not counted. One thread; the best of several turns counts,
because machines are shared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from esrl_ray.config import load_config
from esrl_ray.simulation.users import World


def best_us(call: Callable[[], object], turns: int) -> float:
    """Smallest processor time of a call [us]."""
    times = []
    for _ in range(turns):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1e6 * min(times)


def main() -> None:
    """Print one line per number of sessions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=30)
    turns = parser.parse_args().turns
    config = load_config("configs/demo.yaml")
    started = time.process_time()
    world = World(config, seed=1)
    print(f"a world of {world.num_users} users is made in {time.process_time() - started:.2f} s")
    for n in (1, 16, 250, 2000):
        sessions = world.start(np.arange(n), np.arange(n) % world.num_users)
        page = world.candidates(sessions)
        shown = page.items[:, : config.serve.list_size]
        ask = best_us(partial(world.candidates, sessions), turns) / n
        answer = best_us(partial(world.respond, sessions, shown), turns) / n
        print(f"{n:5} sessions: candidates {ask:7.1f} us, responses {answer:7.1f} us each: {1e6 / (ask + answer):9,.0f} requests/s")


if __name__ == "__main__":
    main()
