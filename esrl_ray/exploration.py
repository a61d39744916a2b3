"""Bounded exploration, Eq. (3) of UnifiedRL (v6): `mu_ep(s) = mu_bp(s) + eps, eps ~ U(low, high)`, and arms.

Noise is a counter-based hash of (decision_id, item_id, salt, dimension), so that the log can be audited by recomputing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from esrl_ray.config import ExplorationConfig
from esrl_ray.vocabulary import Arm, Floats, Round

HELD_OUT_SALT = "second-tier"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(text: str) -> int:
    """First 64 bits of blake2b of a text: stable across processes and machines."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def splitmix64(x: np.ndarray) -> np.ndarray:
    """One round of SplitMix64 (Steele et al. 2014) on uint64 counters: equidistributed bits from any distinct counters."""
    with np.errstate(over="ignore"):
        z = x + _GOLDEN
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return z


def uniform01(counters: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) from uint64 counters, 53 bits each."""
    return (splitmix64(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def exploration_noise(decision_id: str, item_ids: Sequence[str], num_actions: int, turn: Round, *, scope: str) -> Floats:
    """Noise of one decision.

    Args:
        decision_id: Of the decision.
        item_ids: N candidates.
        num_actions: A.
        turn: Salt and bounds.
        scope: `pair` draws for each item, `request` draws once for all.

    Returns:
        (N, A) float32 in [low, high).
    """
    base = np.uint64(hash64(f"{turn.salt}/{decision_id}"))
    items = np.array([hash64(i) for i in item_ids], np.uint64) if scope == "pair" else np.zeros(len(item_ids), np.uint64)
    dims = np.arange(1, num_actions + 1, dtype=np.uint64)
    u = uniform01(splitmix64(splitmix64(items ^ base))[:, None] ^ splitmix64(dims)[None, :])
    return (turn.low + (turn.high - turn.low) * u).astype(np.float32)


def arm_of(user_id: str, config: ExplorationConfig) -> Arm:
    """Arm of a user by a salted stable hash; the same for as long as `arm_salt` stays."""
    u = hash64(f"{config.arm_salt}/{user_id}") * 2.0**-64
    if u < config.explore_share:
        return Arm.EXPLORE
    return Arm.EXPLOIT if u < config.explore_share + config.exploit_share else Arm.CONTROL


def is_held_out(user_id: str, arm: str, *, share: float, salt: str = HELD_OUT_SALT) -> bool:
    """Whether learning leaves a user out, so that the second tier of the gate judges by users whom nobody learnt from.

    The replay and the gate both ask here, by user id, so that they cannot disagree. Only explore users are held out.

    Args:
        user_id: Of the user.
        arm: Of the step.
        share: Of explore users; 1 = all.
        salt: Not that of the arms, or the users held out would be those at one end of them.
    """
    return arm == Arm.EXPLORE and (share >= 1 or hash64(f"{salt}/{user_id}") * 2.0**-64 < share)
