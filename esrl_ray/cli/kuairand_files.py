"""A KuaiRand log as files for `esrl log import`: what its users were really shown, in the order in which they were shown it.

A list is a request of the replay (`simulation/kuairand_replay.py`): the first 8 exposures of a user in a block of two days, of which the
first half counts as shown. Which policy chose them is not known: actions are those of the control policy. All feedback is dated at the
list, since the block's exposures may lie hours apart and the log says how they went, not when.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from esrl_ray.config import Config
from esrl_ray.policy.policy import Policy
from esrl_ray.simulation.kuairand_replay import KuaiRandInput
from esrl_ray.vocabulary import Floats
from streaming.wire import SCHEMA_VERSION, SHOWN, Array, Decision, Feedback

RESPONSE_MS = 1_000  # from a list to its feedback


def write_files(config: Config, data: Path, out: Path, *, say: Callable[[str], None], cache: Path | None = None) -> tuple[int, int]:
    """Write `decisions.jsonl` and `feedback.jsonl`.

    Args:
        config: Deployment, as configs/kuairand.yaml.
        data: Folder of the KuaiRand files.
        out: Folder, made when it is not there.
        say: Told what takes long.
        cache: Folder of the upstream models' scores; default the user's cache.

    Returns:
        Numbers of decisions and of feedback events.

    Raises:
        InputDataError: the files do not fit.
        ConfigError: the deployment names what this input does not have.
    """
    log, encoder, num_feedback = KuaiRandInput(config, data, cache=cache, say=say), msgspec.json.Encoder(), 0
    out.mkdir(parents=True, exist_ok=True)
    with (out / "decisions.jsonl").open("wb") as decisions, (out / "feedback.jsonl").open("wb") as feedback:
        for i in range(len(log.lists)):
            decision = _decision(log, i)
            decisions.write(encoder.encode(decision) + b"\n")
            events = _feedback(log, i, decision)
            feedback.write(b"".join(encoder.encode(event) + b"\n" for event in events))
            num_feedback += len(events)
    return len(log.lists), num_feedback


def _decision(log: KuaiRandInput, i: int) -> Decision:
    request, spec = log.request(i), log.spec
    candidates, shown = request["candidates"], request["list_size"]
    g, shared = len(candidates), request["user_features"]
    rows = [[*shared, *c["features"], *request["context_features"]] for c in candidates]
    states, scores = (np.asarray(x, np.float32).reshape(g, -1) for x in (rows, [c["scores"] for c in candidates]))
    codes = np.asarray([c["categorical"] for c in candidates], np.int32).reshape(g, spec.num_categorical)
    actions, fused = Policy.static(spec).fuse(states, codes, scores)
    return Decision(
        schema_version=SCHEMA_VERSION,
        decision_id=request["request_id"],
        request_id=request["request_id"],
        session_id=request["session_id"],
        user_id=request["user_id"],
        event_time_ms=log.time_ms(i),
        policy_version=0,
        round=0,
        arm="control",
        spec_digest=spec.digest,
        num_candidates=g,
        item_ids=[c["item_id"] for c in candidates],
        positions=[j if j < shown else -1 for j in range(g)],
        states=_flat(states),
        categorical=[*codes.ravel().tolist()],
        scores=_flat(scores),
        actions=_flat(actions),
        anchor_actions=_flat(actions),
        fused_scores=_flat(fused),
    )


def _flat(array: Floats) -> Array:
    return [*array.ravel().tolist()]


def _feedback(log: KuaiRandInput, i: int, decision: Decision) -> list[Feedback]:
    shown = [item for item, position in zip(decision.item_ids, decision.positions, strict=True) if position >= 0]
    values = [(None, SHOWN, 1.0), *log.behaviours(i, shown)]
    return [
        Feedback(
            schema_version=SCHEMA_VERSION,
            event_id=f"{decision.decision_id}-{item}-{behaviour}",
            decision_id=decision.decision_id,
            session_id=decision.session_id,
            behaviour=behaviour,
            event_time_ms=decision.event_time_ms + RESPONSE_MS,
            item_id=item,
            value=value,
        )
        for item, behaviour, value in values
    ]
