"""Fusion weights that were served, from the step log: over policy versions, and by user and item segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from esrl_ray.evaluation.report import Segment, WeightsPoint
from esrl_ray.fusion import fusion_weights
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Arm, Floats

THIRDS = ("low", "middle", "high")


def weights_by_version(
    steps: pa.Table, spec: Spec, *, published_ms: Mapping[int, float], start_ms: float, arm: Arm = Arm.EXPLOIT
) -> tuple[WeightsPoint, ...]:
    """Mean power and bias of each score over the shown pairs of one arm, by the policy version that served them.

    Args:
        steps: Merged steps with columns arm, policy_version, shown, actions.
        spec: Widths and ranges.
        published_ms: {version: when it was published}; a version that is missing here is left out.
        start_ms: Time zero of the series.
        arm: Whose pairs; `exploit` acts without noise.
    """
    mine = steps.select(("policy_version", "shown", "actions")).filter(pc.equal(steps["arm"], arm.value))
    pair_version = np.repeat(mine["policy_version"].to_numpy(), _num_pairs(mine))[_shown(mine)]
    powers, biases = _weights(mine, spec)
    points = []
    for version in np.unique(pair_version):
        if version in published_ms:
            of = pair_version == version
            at_s = (published_ms[int(version)] - start_ms) / 1e3
            points.append(WeightsPoint(at_s, int(version), int(of.sum()), _means(powers[of]), _means(biases[of])))
    return tuple(points)


def weights_by_segment(
    steps: pa.Table,
    spec: Spec,
    *,
    features: Sequence[str] | None = None,
    num_features: int = 3,
    min_version: int = 0,
    arm: Arm = Arm.EXPLOIT,
) -> tuple[Segment, ...]:
    """Mean power and bias of each score over shown pairs, by thirds of user and item features.

    Args:
        steps: Merged steps with columns arm, policy_version, shown, states, actions.
        spec: Widths and ranges.
        features: Which user and item features; None takes, of each side, those along which the powers differ most.
        num_features: How many of each side when `features` is None.
        min_version: Pairs that an older policy served are left out.
        arm: Whose pairs; `exploit` acts without noise.

    Returns:
        Three segments per feature, low to high. A feature whose thirds coincide (constant, or a flag) is left out.
    """
    wanted = pc.and_(pc.equal(steps["arm"], arm.value), pc.greater_equal(steps["policy_version"], min_version))
    mine = steps.select(("shown", "states", "actions")).filter(wanted)
    states = _pairs(mine, "states", spec.num_features)
    powers, biases = _weights(mine, spec)
    names = (*spec.user_features, *spec.item_features)
    kept: dict[str, list[tuple[float, str, tuple[Segment, ...]]]] = {"user": [], "item": []}
    for column, name in enumerate(names):
        if features is not None and name not in features:
            continue
        third = _thirds(states[:, column])
        if third is None:
            continue
        side = "user" if column < len(spec.user_features) else "item"
        rows = [(third == i) for i in range(3)]
        segments = tuple(Segment(name, side, THIRDS[i], int(of.sum()), _means(powers[of]), _means(biases[of])) for i, of in enumerate(rows))
        spread = float(np.abs(np.subtract(segments[2].powers, segments[0].powers)).max())
        kept[side].append((spread, name, segments))
    chosen = []
    for found in kept.values():
        ordered = sorted(found, key=lambda entry: (-entry[0], entry[1]))
        chosen += ordered if features is not None else ordered[:num_features]
    return tuple(segment for _, _, segments in chosen for segment in segments)


def _thirds(values: Floats) -> npt.NDArray[np.int64] | None:
    """(n,) 0, 1 or 2; None where the values do not fall apart in three."""
    if not len(values):
        return None
    low, high = np.quantile(values, (1 / 3, 2 / 3))
    third = (values > low).astype(np.int64) + (values > high)
    return third if len(np.unique(third)) == 3 else None


def _num_pairs(steps: pa.Table) -> npt.NDArray[np.int64]:
    """(steps,) G of each step."""
    lengths: npt.NDArray[np.int64] = pc.list_value_length(steps["shown"]).to_numpy().astype(np.int64)
    return lengths


def _shown(steps: pa.Table) -> npt.NDArray[np.bool_]:
    """(all pairs of all steps,) shown mask."""
    mask: npt.NDArray[np.bool_] = steps["shown"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return mask


def _pairs(steps: pa.Table, name: str, width: int) -> Floats:
    """(shown pairs, width) of a row-major list column."""
    flat: Floats = steps[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(-1, width)[_shown(steps)]


def _weights(steps: pa.Table, spec: Spec) -> tuple[Floats, Floats]:
    """Powers and biases (shown pairs, k)."""
    powers, biases = fusion_weights(torch.from_numpy(_pairs(steps, "actions", spec.num_actions)), spec)
    return powers.numpy(), biases.numpy()


def _means(weights: Floats) -> tuple[float, ...]:
    return tuple(float(w) for w in weights.mean(0, dtype=np.float64))
