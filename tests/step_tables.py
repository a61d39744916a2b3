"""Simulated steps as tables of the step log, for tests that read a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from esrl_ray.config import Config
from esrl_ray.methods.method import Exploration
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, LEFT, Steps
from esrl_ray.simulation.rounds import SimulatedTraffic
from esrl_ray.vocabulary import Ended, StepRow
from streaming.steplog import StepLog, WorkerState
from streaming.steptable import rows_to_table


def simulated_steps(config: Config, num_steps: int, *, seed: int = 0) -> Steps:
    """At least `num_steps` steps of the simulator; the arm explore draws within the bounds around the control policy."""
    traffic = SimulatedTraffic(config, seed=seed, capacity=num_steps)
    control, width = Policy.static(config.spec.build()), config.spec.build().num_actions
    low, high = (np.full(width, bound, np.float32) for bound in (config.exploration.low, config.exploration.high))
    exploration = Exploration(control, low, high, scope=config.exploration.scope)
    for _ in traffic.serve(exploration, control, until=num_steps, number=0):
        pass
    return traffic.steps


def session_positions(sessions: Sequence[int]) -> list[int]:
    """Position of each step in its session; steps in order of time."""
    so_far: Counter[int] = Counter()
    positions = []
    for session in sessions:
        positions.append(so_far[session])
        so_far[session] += 1
    return positions


def step_table(steps: Steps) -> pa.Table:
    """The same steps as rows of the log; those whose end is not known are open."""
    c, following, positions = steps.columns, steps.following, session_positions(steps.sessions.tolist())
    return rows_to_table(
        [
            StepRow(
                step_id=f"step-{i}",
                revision=0,
                session_id=f"session-{steps.sessions[i]}",
                user_id=f"u{steps.users[i]}",
                index=positions[i],
                partition=0,
                offset=i,
                event_time_ms=1_700_000_000_000 + i,
                closed_ms=1_700_000_060_000 + i,
                arm=ARMS[steps.arms[i]].value,
                policy_version=1,
                round=int(steps.rounds[i]),
                num_candidates=50,
                shown=c["shown"][i] > 0,
                behaviours=c["behaviours"][i],
                rewards=c["rewards"][i],
                next_id=f"step-{following[i]}" if following[i] >= 0 else None,
                ended=Ended.HAS_NEXT if following[i] >= 0 else Ended.TERMINATED if following[i] == LEFT else Ended.OPEN,
                item_ids=tuple(f"i{j}" for j in range(c["shown"].shape[1])),
                positions=np.where(c["shown"][i] > 0, np.arange(c["shown"].shape[1]), -1).astype(np.int32),
                states=c["states"][i],
                categorical=c["categorical"][i],
                scores=c["scores"][i],
                actions=c["actions"][i],
                anchor_actions=c["anchor_actions"][i],
                fused_scores=np.zeros(c["shown"].shape[1], np.float32),
                candidate_means=c["candidate_means"][i],
            )
            for i in range(len(steps))
        ]
    )


def write_log(root: Path, config: Config, *tables: pa.Table, worker: str = "ingest-0") -> Path:
    """One commit per table."""
    folder = root / config.spec.build().digest
    log = StepLog(folder, worker, "one", config.spec.build())
    for number, rows in enumerate(tables):
        log.commit(WorkerState(commit=number, incarnation="one", positions={}, joiners={}, committed_ms=number), rows)
    return folder
