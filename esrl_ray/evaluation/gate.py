"""First tier of the gate: is a policy whole, and does it stay near the anchor? It says nothing about reward: the second tier does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esrl_ray.config import PolicyConfig
from esrl_ray.errors import PolicyRejected
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Floats, Ints, Round, TransitionBatch


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says; `text` goes into the manifest or into the refusal."""

    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a policy's actions are from its anchor's, over all pairs and action dimensions of a probe."""

    drift: float  # mean |a - anchor| in widths of the bounds
    outside_share: float  # share of the A x pairs numbers outside [anchor + low, anchor + high]


def distance(actions: Floats, anchor_actions: Floats, turn: Round) -> Distance:
    """Distance of actions (n, A) from the anchor's (n, A)."""
    change = actions.astype(np.float64) - anchor_actions
    return Distance(
        drift=float(np.abs(change).mean() / (turn.high - turn.low)),
        outside_share=float(((change < turn.low) | (change > turn.high)).mean()),
    )


def judge(policy: Policy, *, spec: Spec, anchor: Policy, turn: Round, probe: TransitionBatch | None, config: PolicyConfig) -> Verdict:
    """Judge one policy before it may serve.

    A static policy (control, or one vector) is judged on its own numbers only: it is what people fall back to, whatever the anchor is.

    Args:
        policy: To be judged.
        spec: Of the deployment.
        anchor: Centre of the bounds.
        turn: Bounds.
        probe: Recent lists to act on; None = only wholeness can be judged, and the verdict says so.
        config: Largest drift and share outside.

    Returns:
        The verdict; never raises for a bad policy.
    """
    if policy.spec != spec:
        return Verdict(passed=False, text=f"spec {policy.spec.digest} differs from this deployment's {spec.digest}")
    if fault := _fault(policy):
        return Verdict(passed=False, text=fault)
    if policy.manifest.kind is PolicyKind.STATIC:
        return Verdict(passed=True, text="first tier: static, finite, in range")
    states, categorical, scores = _pairs(spec, probe)
    actions, fused = policy.fuse(states, categorical, scores)
    for what, numbers in (("actions", actions), ("fused scores", fused)):
        if not np.isfinite(numbers).all():
            text = f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} {what} on the probe are not finite"
            return Verdict(passed=False, text=text)
    if policy.manifest.kind is PolicyKind.SCORE or probe is None or len(states) == 0:
        why = "it scores pairs by itself" if policy.manifest.kind is PolicyKind.SCORE else "no probe"
        return Verdict(passed=True, text=f"first tier: finite, shapes fit; {why}, distance from the anchor not judged")
    far = distance(actions, anchor.act(states, categorical, scores), turn)
    text = (
        f"drift {far.drift:.3f} widths of the bounds (at most {config.max_drift:g}), {far.outside_share:.1%} of actions outside the bounds "
        f"(at most {config.max_outside_share:.0%}), {len(states)} pairs, anchor {anchor.version}"
    )
    passed = far.drift <= config.max_drift and far.outside_share <= config.max_outside_share
    return Verdict(passed=passed, text=f"first tier: {text}" if passed else f"too far from the anchor: {text}")


def _fault(policy: Policy) -> str | None:
    """What is wrong with the numbers themselves."""
    spec, normaliser = policy.spec, policy.normaliser
    for name, tensor in {**policy.parameters, "normaliser.mean": normaliser.mean, "normaliser.std": normaliser.std}.items():
        if not np.isfinite(tensor).all():
            return f"{name} holds {int((~np.isfinite(tensor)).sum())} values that are not finite"
    width = (spec.num_features + spec.num_scores,)
    if normaliser.mean.shape != width or normaliser.std.shape != width or (normaliser.std <= 0).any():
        return f"normaliser has shapes {normaliser.mean.shape} and {normaliser.std.shape}, expected {width} and a positive std"
    if policy.manifest.kind is PolicyKind.STATIC:
        return _static_fault(policy)
    try:
        _ = policy.network
    except PolicyRejected as error:
        return error.what
    return None


def _static_fault(policy: Policy) -> str | None:
    action, width = policy.parameters.get("action"), (policy.spec.num_actions,)
    if action is None or action.shape != width:
        return f"a static policy needs one tensor action of shape {width}, it has {[(n, p.shape) for n, p in policy.parameters.items()]}"
    if (np.abs(action) > 1).any():
        return f"action holds {float(np.abs(action).max()):g}, expected values in [-1, 1]"
    return None


def _pairs(spec: Spec, probe: TransitionBatch | None) -> tuple[Floats, Ints, Floats]:
    """The probe's real pairs (n, F), (n, C), (n, k); without a probe one pair at the middle of nothing, to see the network run."""
    if probe is None:
        return (
            np.zeros((1, spec.num_features), np.float32),
            np.zeros((1, spec.num_categorical), np.int32),
            np.ones((1, spec.num_scores), np.float32),
        )
    valid = probe["valid"] > 0
    return probe["states"][valid], probe["categorical"][valid], probe["scores"][valid]
