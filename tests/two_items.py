"""A world of two items whose values are known in closed form: each request offers A and B, one is shown, it earns, the user may leave.

Always showing one of them is worth its reward over its chance to leave. Control's powers are 0, so that only noise decides under it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from esrl_ray.config import Config
from esrl_ray.fusion import fused_scores
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, LEFT, Steps
from esrl_ray.vocabulary import Arm, Ended, StepRow
from streaming.steptable import rows_to_table
from tests.step_tables import session_positions

ALWAYS_A, ALWAYS_B = 1.0, -1.0
"""Powers that rank A, whose score is higher, above B, and the other way round."""
REWARDS, LEAVES = (1.0, 0.2), (0.5, 0.05)
"""Of showing A and B, and chances to leave after them: always A is worth 1 / .5 = 2, always B .2 / .05 = 4."""
_SCORES = (1.5, 0.5)


def two_items() -> Config:
    """One item feature (1 for A, -1 for B), one score, lists of one."""
    return Config.model_validate(
        {
            "spec": {"item_features": ["kind"], "scores": ["click"], "power_base": [0.0], "bias_span": 0.0},
            "serve": {"list_size": 1, "num_unshown": 1},
            "reward": {"behaviours": [{"name": "click"}], "groups": [{"name": "all", "expression": "click"}]},
            "exploration": {"low": -0.15, "high": 0.15},
        }
    )


def vector(config: Config, power: float) -> Policy:
    """The static policy of one power."""
    return Policy.static(config.spec.build(), np.array([power, 0.0], np.float32))


def log_of(
    config: Config,
    rewards: tuple[float, float],
    leaves: tuple[float, float],
    *,
    sessions: int,
    seed: int,
    anchor: float = 0.0,
    spread: float = 0.0,
) -> Steps:
    """Explore traffic of that world, one session per user.

    Args:
        config: `two_items`.
        rewards: Of showing A and B.
        leaves: Chance to leave after A and B.
        sessions: How many.
        seed: Of everything.
        anchor: Its power.
        spread: Standard deviation of noise in the reward.
    """
    rng, bounds = np.random.default_rng(seed), config.exploration
    following: list[int] = []
    users: list[int] = []
    shown_first: list[np.ndarray] = []
    noise: list[np.ndarray] = []
    scores = np.array(_SCORES, np.float32)[:, None]
    block = rng.uniform(bounds.low, bounds.high, (200 * sessions, 2, 2)).astype(np.float32)
    actions = np.clip(np.array([anchor, 0.0], np.float32) + block, -1, 1)
    fused = fused_scores(
        torch.from_numpy(np.broadcast_to(scores, (len(block), 2, 1)).copy()), torch.from_numpy(actions), config.spec.build()
    )
    best = np.argmax(fused.numpy(), axis=1)
    chance = rng.random(len(block))
    at = 0
    for user in range(sessions):
        while True:
            users.append(user)
            shown_first.append(np.array([best[at], 1 - best[at]]))
            noise.append(actions[at])
            left = chance[at] < leaves[best[at]]
            at += 1
            following.append(LEFT if left else at)
            if left:
                break
    order, acts = np.array(shown_first), np.array(noise)
    n = len(order)
    shown = np.tile(np.array([1.0, 0.0], np.float32), (n, 1))
    earned = (np.array(rewards)[order] + spread * rng.standard_normal((n, 2))).astype(np.float32) * shown
    steps = Steps(config, n)
    anchors = np.broadcast_to(np.array([anchor, 0.0], np.float32), (n, 2, 2))
    steps.add(
        {"sessions": users, "users": users, "rounds": 0, "arms": ARMS.index(Arm.EXPLORE)},
        {
            "states": np.where(order == 0, 1.0, -1.0)[..., None].astype(np.float32),
            "categorical": np.zeros((n, 2, 0), np.int32),
            "scores": scores[order],
            "actions": np.take_along_axis(acts, order[..., None], axis=1),
            "anchor_actions": anchors,
            "rewards": earned[..., None],
            "behaviours": earned[..., None],
            "shown": shown,
            "valid": np.ones((n, 2), np.float32),
        },
    )
    steps.follow(np.arange(n), np.array(following))
    return steps


def table_of(steps: Steps) -> pa.Table:
    """The same steps as a table of the step log's schema."""
    c, rows, positions = steps.columns, [], session_positions(steps.sessions.tolist())
    for i in range(len(steps)):
        after = int(steps.following[i])
        rows.append(
            StepRow(
                step_id=f"{i:08x}",
                revision=0,
                session_id=f"s{steps.sessions[i]}",
                user_id=f"u{steps.users[i]}",
                index=positions[i],
                partition=0,
                offset=i,
                event_time_ms=i,
                closed_ms=i,
                arm=ARMS[steps.arms[i]].value,
                policy_version=1,
                round=0,
                num_candidates=2,
                shown=c["shown"][i] > 0,
                behaviours=c["behaviours"][i],
                rewards=c["rewards"][i],
                next_id=f"{after:08x}" if after >= 0 else None,
                ended=Ended.HAS_NEXT if after >= 0 else Ended.TERMINATED,
                item_ids=("a", "b"),
                positions=np.array([0, -1], np.int32),
                states=c["states"][i],
                categorical=c["categorical"][i],
                scores=c["scores"][i],
                actions=c["actions"][i],
                anchor_actions=c["anchor_actions"][i],
                fused_scores=np.zeros(2, np.float32),
            )
        )
    return rows_to_table(rows)
