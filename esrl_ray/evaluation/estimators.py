"""Off-policy estimates as functions of arrays: the fixed point of fitted Q evaluation, capped importance sampling, doubly robust.

Everything is kept per group of users, so that a bootstrap over users is a product with counts and refits what was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from esrl_ray.replay.steps import Indices
from esrl_ray.vocabulary import Bools

Doubles = npt.NDArray[np.float64]

RIDGE = 1e-4
"""Added to the diagonal of the fixed point's matrix, as a share of the features' mean squares."""
CAP = 10.0
"""Largest importance ratio of a pair (docs/paper.md, NCIS)."""
CONSERVATIVE = 0.5e-3
"""Weight of the CQL regulariser in Conservative-OPE [BatchRL-MTF]."""


@dataclass(frozen=True, slots=True)
class Draws:
    """An estimate and the same estimate on resamples of users."""

    mean: float
    draws: Doubles  # (R,)

    def minus(self, other: Draws) -> Draws:
        """Paired difference: both were resampled alike."""
        return Draws(self.mean - other.mean, self.draws - other.draws)

    def bound(self, level: float) -> float:
        """Quantile of the estimate's distribution: `mean + z` with z the draws' spread around their median, which removes their bias."""
        return float(self.mean + np.quantile(self.draws, level) - np.median(self.draws))


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Sums, one entry per group of users or per resample of them, whose ratio is the value of a policy: `v = phi0' A^-1 b`.

    Fitted Q evaluation repeats `w <- argmin sum (phi_t w - r_t - gamma phi'_t w)^2` with phi'_t the features of the list that the policy
    would show next (0 after the end). For values linear in phi it converges to `A w = b`, `A = sum phi (phi - gamma phi')'`,
    `b = sum phi r`: this is that limit, without iterations. Conservative-OPE adds `alpha sum (phi_pi - phi) w` to each fit's loss, which
    changes b to `b - alpha / 2 sum (phi_pi - phi)`.
    """

    a: Doubles  # (U, d, d)
    b: Doubles  # (U, d)
    starts: Doubles  # (U, d) sums of the policy's features over first lists
    sessions: Doubles  # (U,) first lists
    gap: Doubles  # (U, d) sums of phi_pi - phi
    squares: Doubles  # (U, d) sums of phi^2

    @classmethod
    def of(
        cls,
        taken: Doubles,
        chosen: Doubles,
        rewards: Doubles,
        following: Indices,
        *,
        first: Bools,
        known: Bools,
        groups: Indices,
        gamma: float,
    ) -> Self:
        """Sums over lists.

        Args:
            taken: (n, d) features of the lists that were shown.
            chosen: (n, d) of those that the policy would show.
            rewards: (n,) of the shown lists.
            following: (n,) next list of the session, below 0 where there is none.
            first: (n,) starts a session that counts.
            known: (n,) enters the fit: what follows is known.
            groups: (n,) group of users 0..U-1.
            gamma: Discount.
        """
        count = int(groups.max()) + 1
        after = np.where((following >= 0)[:, None], chosen[np.maximum(following, 0)], 0.0)
        moved = taken - gamma * after
        width = taken.shape[1]
        a = np.zeros((count, width, width))
        b, starts, gap, squares = np.zeros((4, count, width))
        enters = np.flatnonzero(known)
        enters = enters[np.argsort(groups[enters], kind="stable")]
        ends = np.searchsorted(groups[enters], np.arange(count + 1))
        for group in range(count):
            mine = enters[ends[group] : ends[group + 1]]
            a[group] = taken[mine].T @ moved[mine]
            b[group] = rewards[mine] @ taken[mine]
            gap[group] = (chosen[mine] - taken[mine]).sum(0)
            squares[group] = (taken[mine] ** 2).sum(0)
        np.add.at(starts, groups[first], chosen[first])
        sessions = np.bincount(groups[first], minlength=count).astype(np.float64)
        return cls(a, b, starts, sessions, gap, squares)

    def drawn(self, counts: Doubles) -> Self:
        """The sums of each resample of groups: R entries instead of U.

        Args:
            counts: (R, U) how often each group was drawn.
        """
        num, width = self.b.shape
        a = (counts @ self.a.reshape(num, -1)).reshape(-1, width, width)
        rest = (counts @ sums for sums in (self.b, self.starts, self.sessions, self.gap, self.squares))
        return type(self)(a, *rest)

    def weights(self, *, conservative: float = 0.0) -> Doubles:
        """(U, d) w, each of its own sums; `conservative` is alpha."""
        return _solved(self._ridged(), self.b - conservative / 2 * self.gap)

    def ratios(self) -> Doubles:
        """(U, d) z, so that `phi_t z` is the ratio of the policy's visits to the log's that linear values imply.

        It is the weight of a list's reward in the value, `z = A^-T phi0` (Uehara et al. 2020).
        """
        return _solved(self._ridged().transpose(0, 2, 1), self.starts)

    def values(self, *, conservative: float = 0.0) -> Doubles:
        """(U,) sums of values over first lists; `conservative` is alpha."""
        values: Doubles = (self.starts * self.weights(conservative=conservative)).sum(1)
        return values

    def _ridged(self) -> Doubles:
        ridged, diagonal = self.a.copy(), np.arange(self.a.shape[1])
        ridged[:, diagonal, diagonal] += RIDGE * self.squares + 1e-9
        return ridged


def doubly_robust(here: FixedPoint, elsewhere: FixedPoint) -> Doubles:
    """`sum V(s_0) + sum_t omega_t (r_t + gamma V(s_{t+1}) - Q(s_t, list_t))`, with values and ratios fitted on other users.

    Per decision, with the ratio omega of visits instead of a product of ratios over the session (double reinforcement learning, Kallus and
    Uehara 2022): right when either values or ratios are, and its spread does not grow with the session. With both linear in phi it is
    `phi0' w + z' (b - A w)`.

    Args:
        here: Sums of the users that the value is of, one entry per resample.
        elsewhere: Sums of the users that values and ratios are fitted on, in the same resamples.

    Returns:
        (R,) sums over first lists.
    """
    w, z = elsewhere.weights(), elsewhere.ratios()
    total: Doubles = (here.starts * w).sum(1) + (z * (here.b - np.einsum("rij,rj->ri", here.a, w))).sum(1)
    return total


def _solved(a: Doubles, b: Doubles) -> Doubles:
    """(R, d) x with `a x = b`."""
    return np.asarray(np.linalg.solve(a, b[..., None])[..., 0], np.float64)


@dataclass(frozen=True, slots=True)
class Paths:
    """Sessions side by side: their lists by position, and each list's ratio of the policy to the log.

    Attributes:
        lists: (S, T) number of the list at each position; -1 after the end.
        groups: (S,) group of users.
    """

    lists: Indices
    groups: Indices

    @classmethod
    def of(cls, starts: Indices, following: Indices, groups: Indices) -> Self:
        """Follow sessions from their first lists."""
        columns, now = [], starts.copy()
        while (now >= 0).any():
            columns.append(now)
            now = np.where(now >= 0, following[np.maximum(now, 0)], -1)
            now = np.maximum(now, -1)
        return cls(np.stack(columns, axis=1) if columns else np.zeros((len(starts), 0), np.int64), groups[starts])

    def cumulative(self, ratios: Doubles, *, cap: float = CAP) -> Doubles:
        """(S, T) `min(cap, prod_{t' <= t} ratio)`; after the end it stays what it was."""
        at = np.where(self.lists >= 0, ratios[np.maximum(self.lists, 0)], 1.0)
        return np.minimum(np.cumprod(at, axis=1), cap)

    def at(self, values: Doubles) -> Doubles:
        """(S, T) of values (n,); 0 after the end."""
        return np.where(self.lists >= 0, values[np.maximum(self.lists, 0)], 0.0)


def ncis(paths: Paths, ratios: Doubles, rewards: Doubles, counts: Doubles, *, gamma: float, cap: float = CAP) -> Doubles:
    """Normalised capped importance sampling of cumulative reward: `sum_t gamma^t sum_i w_{i,t} r_{i,t}`,
    `w_{i,t} = rho_{i,0:t} / sum_i rho_{i,0:t}` with rho cut at the cap.

    The sums are over all sessions: one that has ended counts with reward 0 and the ratio it ended with. The cap makes it biased: over long
    sessions most products are near 0 and few reach the cap.

    Args:
        paths: S sessions.
        ratios: (n,) of each list.
        rewards: (n,).
        counts: (R, U) how often each group of users was drawn.
        gamma: Discount.
        cap: Largest cumulative ratio.

    Returns:
        (R,).
    """
    rho = paths.cumulative(ratios, cap=cap)
    weighted, weights = (_by_group(values, paths.groups, counts) for values in (rho * paths.at(rewards), rho))
    total = (weighted / np.maximum(weights, 1e-12)) @ (gamma ** np.arange(rho.shape[1], dtype=np.float64))
    return np.asarray(total, np.float64)


def _by_group(values: Doubles, groups: Indices, counts: Doubles) -> Doubles:
    """(R, T) sums of (S, T) over sessions, as often as their group was drawn."""
    sums = np.zeros((counts.shape[1], values.shape[1]))
    np.add.at(sums, groups, values)
    return counts @ sums
