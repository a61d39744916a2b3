"""One decision as a pure function of (policies, round, request): which action each pair gets, the ranking, and the record of it.

| arm | action of a pair | while pinned |
|---|---|---|
| explore | anchor + uniform noise within the bounds, cut to [-1, 1] | the pinned policy, no noise |
| exploit | current policy | the pinned policy |
| control | the hand-made policy, a = 0 | the same |

While the current policy is the control policy it also is the centre of exploration, whatever the round's anchor: after a rollback to
control nothing learnt serves anyone.

`policy_version` of a reply and of its `Decision` is the version that the replica serves when it decides, in every arm: it never goes
down at a replica. What produced an action is told by arm, round and the logged anchor actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from esrl_ray.config import Config
from esrl_ray.exploration import arm_of, exploration_noise, hash64, splitmix64
from esrl_ray.fusion import fused_scores
from esrl_ray.normaliser import numeric_input
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.policy.store import PolicySnapshot
from esrl_ray.secret import pseudonym
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Arm, Floats, Round
from serve.schemas import FuseReply, Parsed
from streaming.wire import SCHEMA_VERSION, Decision

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Served:
    """A snapshot of the policy store, decoded once for many requests."""

    sequence: int
    current: Policy
    anchor: Policy  # centre of exploration
    round: Round
    pinned: bool
    published_ms: int
    spec_digest: str

    @classmethod
    def decode(cls, snapshot: PolicySnapshot) -> Self:
        """Decode both policies.

        Raises:
            PolicyRejected: one is damaged.
        """
        current = Policy.from_bytes(snapshot.current)
        return cls(
            sequence=snapshot.sequence,
            current=current,
            anchor=current if is_control(current) else Policy.from_bytes(snapshot.anchor),
            round=snapshot.round,
            pinned=snapshot.pinned,
            published_ms=snapshot.published_ms,
            spec_digest=current.spec.digest,
        )

    @property
    def spec(self) -> Spec:
        """Of the deployment."""
        return self.current.spec

    def warm(self, num_pairs: int) -> None:
        """Build both networks and run them once, so that the first request does not pay for it.

        Raises:
            PolicyRejected: parameters do not fit the network.
        """
        states, scores = np.zeros((num_pairs, self.spec.num_features), np.float32), np.ones((num_pairs, self.spec.num_scores), np.float32)
        for policy in (self.current, self.anchor):
            policy.act(states, np.zeros((num_pairs, self.spec.num_categorical), np.int32), scores)


def is_control(policy: Policy) -> bool:
    """Is this the hand-made policy, a = 0 for every pair?"""
    return policy.manifest.kind is PolicyKind.STATIC and not policy.parameters["action"].any()


def decide(parsed: Parsed, served: Served, config: Config, *, decision_id: str, now_ms: int) -> tuple[FuseReply, Decision]:
    """Rank the candidates of one request and record the decision.

    Args:
        parsed: The checked request with its N pairs.
        served: What this replica serves.
        config: Arms, scope of noise, K.
        decision_id: Minted for this request; all randomness is a hash of it.
        now_ms: Event time of the decision.

    Returns:
        The reply with all N ranked, and the record with the l shown and K unshown pairs.
    """
    request = parsed.request
    item_ids = [candidate.item_id for candidate in request.candidates]
    user_id = pseudonym(request.user_id, config.serve.user_key)
    arm = arm_of(user_id, config.exploration)  # of the id in the log: who reads it must find the same arm
    actions, fused, anchor_actions = _ranked(parsed, served, config, arm=arm, decision_id=decision_id, item_ids=item_ids)
    order = np.argsort(-fused, kind="stable")
    logged = np.concatenate(
        [order[: parsed.list_size], _unshown(order[parsed.list_size :], config, list_size=parsed.list_size, decision_id=decision_id)]
    )  # (G,)
    pairs = parsed.states[logged], parsed.categorical[logged], parsed.scores[logged]
    anchored = served.anchor.act(*pairs) if anchor_actions is None else anchor_actions[logged]
    reply = FuseReply(
        decision_id=decision_id,
        request_id=request.request_id,
        item_ids=[item_ids[i] for i in order],
        fused_scores=fused[order].tolist(),
        list_size=parsed.list_size,
        policy_version=served.current.version,
        arm=arm.value,
        round=served.round.number,
    )
    decision = Decision(
        schema_version=SCHEMA_VERSION,
        decision_id=decision_id,
        request_id=request.request_id,
        session_id=request.session_id,
        user_id=user_id,
        event_time_ms=now_ms,
        policy_version=served.current.version,
        round=served.round.number,
        arm=arm.value,
        spec_digest=served.spec_digest,
        num_candidates=len(item_ids),
        item_ids=[item_ids[i] for i in logged],
        positions=[*range(parsed.list_size), *[-1] * (len(logged) - parsed.list_size)],
        states=_bytes(pairs[0]),
        categorical=pairs[1].astype("<i4").tobytes(),
        scores=_bytes(pairs[2]),
        actions=_bytes(actions[logged]),
        anchor_actions=_bytes(anchored),
        fused_scores=_bytes(fused[logged]),
        candidate_means=_bytes(numeric_input(parsed.states, parsed.scores).mean(0, dtype=np.float64)),
    )
    return reply, decision


def _ranked(
    parsed: Parsed, served: Served, config: Config, *, arm: Arm, decision_id: str, item_ids: list[str]
) -> tuple[Floats, Floats, Floats | None]:
    """Actions (N, A) and fused scores (N,) of all pairs, and the anchor's actions when they were needed for it."""
    pairs = parsed.states, parsed.categorical, parsed.scores
    if arm is not Arm.CONTROL and (arm is Arm.EXPLOIT or served.pinned):
        return *served.current.fuse(*pairs), None
    if arm is Arm.CONTROL:
        anchor_actions, actions = None, np.zeros((len(item_ids), served.spec.num_actions), np.float32)
    else:
        anchor_actions = served.anchor.act(*pairs)
        noise = exploration_noise(decision_id, item_ids, served.spec.num_actions, served.round, scope=config.exploration.scope)
        actions = np.clip(anchor_actions + noise, -1.0, 1.0)
    return actions, fused_scores(torch.from_numpy(parsed.scores), torch.from_numpy(actions), served.spec).numpy(), anchor_actions


def _unshown(rest: Indices, config: Config, *, list_size: int, decision_id: str) -> Indices:
    """K of the candidates that are not shown, each subset equally likely; fewer when the list is long, so that G stays in the limit."""
    num_unshown = min(config.serve.num_unshown, config.max_pairs - list_size, len(rest))
    keys = splitmix64(splitmix64(rest.astype(np.uint64)) ^ np.uint64(hash64(f"unshown/{decision_id}")))
    return rest[np.argsort(keys, kind="stable")[:num_unshown]]


def _bytes(values: Floats) -> bytes:
    return values.astype("<f4").tobytes()
