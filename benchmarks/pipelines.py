"""Learning from one log through RLlib: EnhancedRL against RLlib's own SAC, whole training steps with drawing, in turns.

OMP_NUM_THREADS=1 python -m benchmarks.pipelines [--quick] [--stock] [--config configs/demo.yaml]

The two do not learn the same: SAC sees a request as one transition (the inputs of user and context, one action, one reward), EnhancedRL
each of its pairs and the lists that follow. So steps and lists per second are compared, and the pairs behind them are stated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.offline.offline_data import OfflineData

from benchmarks.timing import Table, in_turns
from esrl_ray.config import Config, load_config
from esrl_ray.learning.algorithm import CALLS_PER_ITERATION, EnhancedRL
from esrl_ray.learning.offline_input import LoggedRequests, to_records, write_records
from esrl_ray.learning.rllib_peers import SETTINGS, UPDATES_PER_CALL, build
from esrl_ray.methods.request_level import Requests
from esrl_ray.methods.static import Static
from esrl_ray.normaliser import Normaliser
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.simulation.rounds import SimulatedTraffic

STOCK_CPUS = 4
"""Logical: two mappers and a reader hold one each, and with fewer Ray Data waits for ever."""


def simulated_log(config: Config, num_steps: int) -> Steps:
    """Lists of simulated users, explored around the control policy."""
    traffic = SimulatedTraffic(config, seed=0, capacity=num_steps)
    exploration = Static("static", config).exploration()
    for _ in traffic.serve(exploration, Policy.static(config.spec.build()), until=num_steps, number=0):
        pass
    return traffic.steps


def sac(config: Config, steps: Steps, folder: str, source: type[OfflineData]) -> Algorithm:
    """RLlib's SAC on the log's requests, as many as fill whole batches: RLlib cannot stack the TD errors of a shorter one."""
    spec = config.spec.build()
    records = to_records(Requests.of(steps, spec, Normaliser.identity(spec)), steps.sessions, spec)
    write_records(records.slice(0, len(records) - len(records) % config.learner.batch_size), Path(folder))
    return build("sac", config, folder, seed=0, settings=SETTINGS["sac"], source=source)


def pipelines(config: Config, *, num_steps: int, rounds: int, stock: bool) -> Table:
    """Gradient steps and lists per second.

    Args:
        config: Of both: batch size, widths, discount.
        num_steps: Lists in the log.
        rounds: Training iterations of each.
        stock: Also with RLlib's own reading of the log; it starts Ray, and half a minute goes by before the first step.
    """
    steps, size = simulated_log(config, num_steps), config.learner.batch_size
    ours = EnhancedRL.of(config)
    ours.draw_from_steps(steps)
    what = {"EnhancedRL": (f"{config.max_pairs} pairs of a list, and how the session goes on", config.max_pairs)}
    calls: dict[str, tuple[Callable[[], object], int]] = {"EnhancedRL": (ours.train, CALLS_PER_ITERATION * config.learner.updates_per_call)}
    notes = [
        "Networks are the deployment's, the batch size is the same. SAC's step is at the level of requests: 1 state of user and context, 1 "
        "action, 1 reward; it has 2 critics with targets, a stochastic actor and a temperature, by RLlib's own learner and optimisers.",
    ]
    with TemporaryDirectory(prefix="esrl-speed-") as folder:
        name = "RLlib SAC, log in memory"
        calls[name] = (sac(config, steps, folder, LoggedRequests).train, UPDATES_PER_CALL)
        what[name] = ("1 request", 1)
        timings = in_turns({n: call for n, (call, _) in calls.items()}, rounds=rounds)
        beside = dict.fromkeys(timings, timings["EnhancedRL"])  # ours, in turns with each
        if stock:
            name = "RLlib SAC, RLlib's own reading"
            started = time.perf_counter()
            ray.init(address="local", num_cpus=STOCK_CPUS, include_dashboard=False, log_to_driver=False)
            try:
                stock_sac = sac(config, steps, folder, OfflineData)
                stock_sac.train()
                waited = time.perf_counter() - started
                notes.append(
                    f"{name}: {waited:.0f} s went by before the end of its first iteration; processes of Ray Data are not in the ms."
                )
                epoch = max(1, len(steps) // (size * UPDATES_PER_CALL))  # it reads the records anew after each
                calls[name] = (lambda: [stock_sac.train() for _ in range(epoch)], epoch * UPDATES_PER_CALL)
                again = in_turns({n: calls[n][0] for n in ("EnhancedRL", name)}, rounds=max(1, rounds // 4))
                beside[name] = again["EnhancedRL"]
                timings[name], what[name] = again[name], ("1 request, by Ray Data in processes of its own", 1)
            finally:
                ray.shutdown()
    rows = []
    for name, timing in timings.items():
        cpu, wall = (each / calls[name][1] for each in timing)
        base = beside[name].wall / calls["EnhancedRL"][1]
        transition, states = what[name]
        speeds = (f"{1 / wall:.1f}", f"{size / wall:,.0f}", f"{size * states / wall:,.0f}")
        rows.append((name, transition, f"{1e3 * cpu:.1f}", *speeds, f"{wall / base:.2f}"))
    return Table(
        f"Whole pipeline on one log of {len(steps):,} lists, B = {size}",
        "none is set; the ratio is of gradient steps per second, ours to theirs",
        ("", "a transition is", "ms of the processor per gradient step", "gradient steps/s", "transitions/s", "states/s", "ratio of ours"),
        rows,
        notes,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--stock", action="store_true", help="also RLlib's own reading of the log")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.config, arguments.overrides)
    print(pipelines(config, num_steps=5_000, rounds=8 if arguments.quick else 30, stock=arguments.stock).markdown())


if __name__ == "__main__":
    main()
