"""MTF-GAUC of docs/paper.md: the weighted AUC of each user (or user x block, or user x tab), averaged by the group's summed weight.

A sample is an exposure; its label is 1 when it was played more than 10 s or was a long view; its weight is its reward + 1. Groups with
one class have no AUC and are left out. Scores are not min-max normalised over the test set first: an AUC does not change by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esrl_ray.config import Config
from esrl_ray.errors import ConfigError
from esrl_ray.evaluation.report import Gauc, finite
from esrl_ray.expression import first_threshold
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import Steps
from esrl_ray.vocabulary import Floats, Ints

Doubles = npt.NDArray[np.float64]
NUM_RESAMPLES = 1_000


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """n exposures with what a policy sees of them and what their user did."""

    states: Floats  # (n, F)
    categorical: Ints  # (n, C)
    scores: Floats  # (n, k)
    labels: Floats  # (n,) 0 or 1
    weights: Floats  # (n,) reward + 1
    user: Ints  # (n,)
    groups: Mapping[str, npt.NDArray[np.int64]]  # name: (n,) the group of each exposure, e.g. user x tab


@dataclass(frozen=True, slots=True)
class GroupAuc:
    """The weighted AUC of each group that has both classes."""

    auc: Doubles  # (g,)
    weight: Doubles  # (g,) summed sample weight
    user: Ints  # (g,)

    @property
    def mean(self) -> float:
        """GAUC: the weighted mean; NaN without groups."""
        return float(np.average(self.auc, weights=self.weight)) if len(self.auc) else float("nan")


def group_auc(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike, groups: npt.ArrayLike, user: npt.ArrayLike) -> GroupAuc:
    """Weighted AUC of each group: `sum_{i pos, j neg} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_pos w_i sum_neg w_j)`.

    Args:
        scores: (n,) final scores.
        labels: (n,) 0 or 1.
        weights: (n,) sample weights, above 0.
        groups: (n,) group of each sample; all samples of a group have the same user.
        user: (n,).
    """
    s, y, w = np.asarray(scores, np.float64), np.asarray(labels, np.float64), np.asarray(weights, np.float64)
    g, u = np.asarray(groups, np.int64), np.asarray(user, np.int32)
    order = np.lexsort((s, g))
    s, y, w, g, u = s[order], y[order], w[order], g[order], u[order]
    first = np.append(True, g[1:] != g[:-1])[: len(g)]
    first_of_tie = first | np.append(True, s[1:] != s[:-1])[: len(s)]
    group, tie = np.cumsum(first) - 1, np.cumsum(first_of_tie) - 1
    positive, negative = w * y, w * (1 - y)
    before = np.cumsum(negative) - negative  # negatives of all groups up to here
    below = before[first_of_tie][tie] - before[first][group]  # of this group, with a smaller score
    wins = np.bincount(group, positive * (below + np.bincount(tie, negative)[tie] / 2))
    total_positive, total_negative = np.bincount(group, positive), np.bincount(group, negative)
    both = (total_positive > 0) & (total_negative > 0)
    auc = wins[both] / (total_positive[both] * total_negative[both])
    return GroupAuc(auc, np.bincount(group, w).astype(np.float64)[both], u[first][both])


def bootstrap(parts: Sequence[GroupAuc], *, num_users: int, seed: int, resamples: int = NUM_RESAMPLES) -> Doubles:
    """GAUC of each part on the same resamples of users: (len(parts), resamples). A user is drawn with all of its groups."""
    rng = np.random.default_rng(seed)
    numerator = np.stack([np.bincount(p.user, p.auc * p.weight, num_users) for p in parts])  # (P, U)
    denominator = np.stack([np.bincount(p.user, p.weight, num_users) for p in parts])
    present = np.flatnonzero(denominator.any(0))
    draws = np.empty((len(parts), resamples))
    for i in range(resamples):
        times = np.bincount(rng.integers(0, len(present), len(present)), minlength=len(present))
        draws[:, i] = (numerator[:, present] @ times) / (denominator[:, present] @ times)
    return draws


def policy_scores(policy: Policy, pairs: LabelledPairs) -> Floats:
    """Fused score of each exposure, without noise: (n,)."""
    return policy.fuse(pairs.states, pairs.categorical, pairs.scores)[1]


def label_of(config: Config, text: str | None) -> tuple[int, float]:
    """Behaviour (its column) and threshold of the label `behaviour > threshold`.

    Args:
        config: Behaviours and reward.
        text: `watch_s>10`; None takes the first threshold of the reward (the paper's is watched > 10 s), else the first behaviour > 0.

    Raises:
        ConfigError: not of this form, or an undeclared behaviour.
    """
    names = [b.name for b in config.reward.behaviours]
    if text is None:
        found = (first_threshold(config.reward.parsed(g)) for g in range(config.reward.num_groups))
        name, above = next((threshold for threshold in found if threshold is not None), (names[0], 0.0))
        return names.index(name), above
    name, sign, number = text.partition(">")
    try:
        return names.index(name.strip()), float(number if sign else "0")
    except ValueError as error:
        raise ConfigError(f"label {text!r} is not behaviour>threshold with a behaviour of {names}", "--label") from error


def shown_pairs(
    steps: Steps, config: Config, *, label: tuple[int, float], plus_one: bool = True, context: str | None = None
) -> LabelledPairs:
    """Shown pairs of steps as exposures, grouped by `user` and, with a context, by `user_context`.

    Args:
        steps: Lists with behaviours and rewards.
        config: Categorical features.
        label: Behaviour's column and threshold.
        plus_one: Weigh an exposure by its reward + 1 (the earlier version's) instead of its reward. Negative weights count as 0.
        context: Name of a categorical feature of the request.

    Raises:
        ConfigError: no such categorical feature.
    """
    columns = steps.columns
    seen = columns["shown"] > 0
    user = np.broadcast_to(steps.users[:, None], seen.shape)[seen]
    groups = {"user": user}
    if context is not None:
        names = [c.name for c in config.spec.categorical_features]
        if context not in names:
            raise ConfigError(f"no categorical feature {context!r}, there are {names}", "--context")
        code = columns["categorical"][..., names.index(context)][seen].astype(np.int64)
        groups[f"user_{context}"] = np.unique(np.stack([user, code]), axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)
    column, above = label
    return LabelledPairs(
        states=columns["states"][seen],
        categorical=columns["categorical"][seen],
        scores=columns["scores"][seen],
        labels=(columns["behaviours"][..., column][seen] > above).astype(np.float32),
        weights=np.maximum(columns["rewards"][seen].sum(-1) + float(plus_one), 0).astype(np.float32),
        user=user.astype(np.int32),
        groups=groups,
    )


def gauc_of_policies(
    policies: Sequence[Policy], pairs: LabelledPairs, *, seed: int, resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[Gauc, ...]]:
    """GAUC of frozen policies on exposures that none of them was trained on, with 95 % intervals over users.

    It is a regression test of plumbing and selection under a fixed log, and no claim about reinforcement learning (docs/paper.md).

    Args:
        policies: The first one is the control that the others are compared with.
        pairs: Exposures of the test block.
        seed: Of the bootstrap.
        resamples: Of users.

    Returns:
        For each grouping of `pairs`, e.g. `user_block` and `user_tab`, one `Gauc` per policy; and under `<grouping>_difference` the paired
        difference of each policy after the first from the first.
    """
    results: dict[str, tuple[Gauc, ...]] = {}
    scores = [policy_scores(p, pairs) for p in policies]
    names = [f"version {p.version}" + (f" ({p.manifest.note})" if p.manifest.note else "") for p in policies]
    for grouping, groups in pairs.groups.items():
        parts = [group_auc(s, pairs.labels, pairs.weights, groups, pairs.user) for s in scores]
        count = len(parts[0].auc)
        if not count:
            results[grouping] = tuple(Gauc(name, None, None, None, 0) for name in names)
            continue
        draws = bootstrap(parts, num_users=int(pairs.user.max()) + 1, seed=seed, resamples=resamples)
        means = np.array([p.mean for p in parts])
        results[grouping] = tuple(_gauc(n, m, d, count) for n, m, d in zip(names, means, draws, strict=True))
        results[f"{grouping}_difference"] = tuple(
            _gauc(n, m - means[0], d - draws[0], count) for n, m, d in zip(names[1:], means[1:], draws[1:], strict=True)
        )
    return results


def _gauc(name: str, mean: float, draws: Doubles, units: int) -> Gauc:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Gauc(name, finite(mean), finite(low), finite(high), units)
