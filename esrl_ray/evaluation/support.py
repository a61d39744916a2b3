"""What a log can say about another policy: which pairs the policy would show, with which probability the log showed them, and limits.

The action variable of these estimates is *which pairs are shown*, not the A numbers of each pair: over N pairs x A dimensions the ratio
of densities is a product of hundreds of factors, while the user sees only the list, and a pair's chance to be in it follows from the known
uniform noise of exploration by drawing that again. Unshown pairs are a sample of K of the N - l, and stand for (N - l) / K each.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from esrl_ray.config import Config
from esrl_ray.fusion import fused_scores
from esrl_ray.policy.policy import Policy, PolicyKind
from esrl_ray.replay.steps import ARMS, Indices, Steps
from esrl_ray.vocabulary import Arm, Bools, Floats, Ints

Doubles = npt.NDArray[np.float64]

NUM_DRAWS = 32
"""Draws of the noise behind a propensity; its standard error is at most .09, and ratios are capped."""


class SupportLimits(msgspec.Struct, frozen=True):
    """Outside any of these an estimate is refused. The defaults are from benchmarks/results/estimators_tuned_worlds.md and support.md."""

    min_users: int = 100  # the bootstrap resamples users: below about 100 its intervals are too narrow
    min_sessions: int = 300  # reward per session varies by 1.1 of its mean: 300 give +-12 % at best
    min_overlap: float = 0.45  # share of the policy's list that was really shown
    min_ess: float = 1_000.0  # effective lists behind a value
    min_ess_share: float = 0.1  # and as a share of the lists: below, errors of a third were seen
    max_width: float = 2.5  # of a fitted 95 % interval, in root mean squares of what sessions earn: above, resamples disagree
    min_compared: float = 0.95  # share of lists that say what was not shown: where they do not, all policies look like the log's own


class Support(msgspec.Struct, frozen=True):
    """How much of what a policy would do the log has seen."""

    overlap: float  # share of the policy's list (of all N candidates) that was shown
    chosen_shown: float  # share of its top l among the logged pairs that was shown
    inside_bounds: float | None  # share of action dimensions in [anchor + low, anchor + high]; None for a policy without actions
    ess: float  # effective lists of the implied ratios, (sum w)^2 / sum w^2
    ess_share: float  # of all lists used
    users: int
    sessions: int
    lists: int
    compared: float = 1.0  # share of lists with logged candidates that were not shown, or without any that was not

    def faults(self, limits: SupportLimits) -> list[str]:
        """Why an estimate must not be believed; empty when it may be."""
        checks = {
            "users": (self.users, limits.min_users),
            "sessions": (self.sessions, limits.min_sessions),
            "overlap": (self.overlap, limits.min_overlap),
            "effective lists": (self.ess, limits.min_ess),
            "effective share of lists": (self.ess_share, limits.min_ess_share),
            "share of lists with logged unshown candidates (serve.num_unshown)": (self.compared, limits.min_compared),
        }
        return [f"{name} {found:.4g}, at least {least:g} needed" for name, (found, least) in checks.items() if not found >= least]


@dataclass(frozen=True, slots=True)
class Lists:
    """The logged lists as estimates see them: n steps with the candidates that each logged pair stands for."""

    steps: Steps
    config: Config
    masses: Doubles  # (n, G) 1 for shown pairs, (N - l) / K for unshown ones, 0 in padding
    compared: Bools  # (n,) lists of K > 0, or of N = l

    @classmethod
    def of(cls, steps: Steps, config: Config, num_candidates: npt.ArrayLike) -> Lists:
        """Lists of steps.

        Args:
            steps: Whole sessions.
            config: Bounds and scope of the exploration, widths.
            num_candidates: (n,) or one number N: candidates of each request; never taken as fewer than the logged pairs.
        """
        shown, valid = steps.columns["shown"], steps.columns["valid"]
        logged, seen = valid.sum(1, dtype=np.float64), shown.sum(1, dtype=np.float64)
        total = np.maximum(np.broadcast_to(np.asarray(num_candidates, np.float64), logged.shape), logged)
        each = (total - seen) / np.maximum(logged - seen, 1)
        return cls(steps, config, np.where(shown > 0, 1.0, each[:, None]) * (valid > 0), (logged > seen) | (total == seen))

    @property
    def list_sizes(self) -> Doubles:
        """(n,) l."""
        sizes: Doubles = self.steps.columns["shown"].sum(1, dtype=np.float64)
        return sizes

    @property
    def explored(self) -> Bools:
        """(n,) lists whose noise has a density: those of the arm `explore`."""
        explored: Bools = self.steps.arms == ARMS.index(Arm.EXPLORE)
        return explored

    def pairs(self, of: Indices | slice) -> tuple[Floats, Ints, Floats]:
        """States, categorical codes and scores of lists, as policies take them."""
        columns = self.steps.columns
        return columns["states"][of], columns["categorical"][of], columns["scores"][of]

    def chosen(self, policy: Policy) -> Doubles:
        """(n, G) share of what each pair stands for that the policy, without noise, would show of N candidates."""
        return inclusion(policy.fuse(*self.pairs(slice(None)))[1], self.masses, self.list_sizes)

    def propensities(self, policy: Policy | None, of: Indices, *, kernel: float, seed: int) -> Doubles:
        """Chance of each pair to be shown under uniform noise around a policy's actions.

        Args:
            policy: Whose chances; None = the anchor that was logged, hence the log's own propensities.
            of: (b,) lists.
            kernel: Width of the noise in bounds of the exploration: 1 for the log; for a deterministic policy this is the kernel that gives
                it a density. A policy equal to the anchor has with 1 exactly the log's propensities, since both draw the same numbers.
            seed: Of the draws.

        Returns:
            (b, G) in [0, 1]; `sum_j masses_j p_j = l`.
        """
        columns, bounds = self.steps.columns, self.config.exploration
        anchors, scores = columns["anchor_actions"][of], columns["scores"][of]
        spec, centre, moved = self.config.spec.build(), anchors, np.zeros(scores.shape[:2], np.float32)
        if policy is not None and policy.manifest.kind is PolicyKind.SCORE:  # no actions: its scores, moved as noise moves the anchor's
            moved = policy.fuse(*self.pairs(of))[1] - fused_scores(torch.from_numpy(scores), torch.from_numpy(anchors), spec).numpy()
        elif policy is not None:
            centre = policy.act(*self.pairs(of))
        rng, pairs = np.random.default_rng(seed), scores.shape[1] if bounds.scope == "pair" else 1
        raw, total = torch.from_numpy(scores), np.zeros(scores.shape[:2])
        for _ in range(NUM_DRAWS):
            noise = kernel * rng.uniform(bounds.low, bounds.high, (len(of), pairs, anchors.shape[2])).astype(np.float32)
            fused = fused_scores(raw, torch.from_numpy(np.clip(centre + noise, -1, 1)), spec).numpy()
            total += inclusion(fused + moved, self.masses[of], self.list_sizes[of])
        return total / NUM_DRAWS

    def support(self, policy: Policy, ratios: Doubles, of: Indices) -> Support:
        """Overlap and effective sizes.

        Args:
            policy: To be evaluated.
            ratios: (b,) implied ratio of each list used.
            of: (b,) lists used.
        """
        columns, bounds = self.steps.columns, self.config.exploration
        shown, sizes = columns["shown"][of], self.list_sizes[of]
        actions, fused = policy.fuse(*self.pairs(of))
        valid = columns["valid"][of] > 0
        inside: float | None = None
        if policy.manifest.kind is not PolicyKind.SCORE:
            change = (actions - columns["anchor_actions"][of])[valid]
            inside = float(((change >= bounds.low - 1e-6) & (change <= bounds.high + 1e-6)).mean())
        total = max(float(sizes.sum()), 1.0)
        ess = effective_size(ratios)
        return Support(
            overlap=float((inclusion(fused, self.masses[of], sizes) * shown).sum() / total),
            chosen_shown=float((inclusion(fused, valid.astype(np.float64), sizes) * shown).sum() / total),
            inside_bounds=inside,
            ess=ess,
            ess_share=ess / max(len(of), 1),
            users=len(np.unique(self.steps.users[of])),
            sessions=len(np.unique(self.steps.sessions[of])),
            lists=len(of),
            compared=float(self.compared[of].mean()) if len(of) else 0.0,
        )


def inclusion(scores: npt.NDArray[np.floating], masses: Doubles, list_sizes: Doubles) -> Doubles:
    """Share of what each pair stands for that is among the l best of all candidates: filled by falling score until l are in.

    Args:
        scores: (n, G) fused scores.
        masses: (n, G) candidates that each pair stands for; with ones this is the plain top l of the pairs.
        list_sizes: (n,) l.

    Returns:
        (n, G) in [0, 1]; `sum_j masses_j inclusion_j = l` where there are l candidates.
    """
    order = np.argsort(-np.where(masses > 0, scores, -np.inf), axis=1, kind="stable")
    ranked = np.take_along_axis(masses, order, axis=1)
    above = np.cumsum(ranked, axis=1) - ranked
    filled = np.clip((list_sizes[:, None] - above) / np.maximum(ranked, 1e-9), 0, 1) * (ranked > 0)
    result = np.zeros_like(filled)
    np.put_along_axis(result, order, filled, axis=1)
    return result


def effective_size(ratios: npt.ArrayLike) -> float:
    """Kish's effective sample size `(sum w)^2 / sum w^2`; 0 without any."""
    w = np.asarray(ratios, np.float64)
    return float(w.sum() ** 2 / max((w**2).sum(), 1e-300)) if w.size else 0.0
