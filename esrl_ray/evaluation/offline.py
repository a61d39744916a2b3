"""What another policy would have earned per session, from a log alone: FQE, doubly robust, Conservative-OPE, NCIS, with intervals.

Fitted in two folds of users: a fold's features are learnt on the other one, and so are the critic and the ratios of the doubly robust
estimate; whatever is fitted on features is refitted on every resample of users. Arms without noise tell these as much as explore traffic
does; NCIS reads lists of the arm `explore`, whose density is known.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.evaluation.estimators import CAP, CONSERVATIVE, Draws, FixedPoint, Paths, doubly_robust, ncis
from esrl_ray.evaluation.list_features import ListFeatures, list_features
from esrl_ray.evaluation.support import NUM_DRAWS, Doubles, Lists, Support, SupportLimits, effective_size
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import CUT, LEFT, Indices, Steps
from esrl_ray.vocabulary import Bools

ESTIMATORS = ("fqe", "dr", "conservative", "ncis", "ncis_list")
"""All but the last are reward per session; `ncis_list` is reward per list, on the lists that the log's users asked for."""


class Settings(msgspec.Struct, frozen=True):
    """How estimates are made."""

    gamma: float = 1.0  # discount of rewards within a session; 1 = reward per session
    num_updates: int = 600  # gradient steps of each fold's features; 0 = the inputs as they are
    resamples: int = 300  # of users
    num_groups: int = 400  # users are put in so many groups, which are resampled whole
    kernel: float = 0.5  # noise that gives a deterministic policy its density, in bounds of the exploration
    min_effective_sessions: float = 50.0  # NCIS is refused below
    limits: SupportLimits = SupportLimits()


class Estimate(msgspec.Struct, frozen=True):
    """A number with its 95 % interval over users."""

    mean: float
    ci_low: float
    ci_high: float

    @classmethod
    def of(cls, draws: Draws) -> Estimate:
        """Of an estimate and its resamples."""
        return cls(draws.mean, draws.bound(0.025), draws.bound(0.975))

    def fault(self, *, earned: float, limits: SupportLimits) -> str | None:
        """Why it must not be believed: half of the users may not determine the fixed point, and only its resamples show that.

        Args:
            earned: Root mean square of what the log's sessions earn.
            limits: The widest interval.
        """
        if self.ci_high - self.ci_low <= limits.max_width * earned:
            return None
        interval = f"interval [{self.ci_low:.4g}, {self.ci_high:.4g}]"
        return f"{interval} wider than {limits.max_width:g} x {earned:.4g}, what sessions earn (root mean square): more lists are needed"


@dataclass(frozen=True, slots=True)
class Value:
    """What the log says about one policy.

    Attributes:
        support: Diagnostics.
        estimates: By name; those that were refused are missing.
        refused: {name: reason}.
        effective_sessions: Behind NCIS.
    """

    support: Support
    estimates: dict[str, Draws]
    refused: dict[str, str]
    effective_sessions: float


class OffPolicy:
    """A log, ready to be asked about policies.

    Args:
        steps: Whole sessions, in order of time.
        config: Deployment: widths, exploration, rewards.
        num_candidates: (n,) or one number N, candidates of each request.
        seed: Of folds, features, noise and resamples.
        settings: How estimates are made.
        users: (n,) bool: lists of the users that estimates may use; None = all.

    Attributes:
        earned: Root mean square of what the sessions earn.

    Raises:
        MethodError: no list can be used.
    """

    def __init__(
        self,
        steps: Steps,
        config: Config,
        *,
        num_candidates: npt.ArrayLike,
        seed: int,
        settings: Settings | None = None,
        users: Bools | None = None,
    ) -> None:
        self.lists, self.settings, self._seed = Lists.of(steps, config, num_candidates), settings or Settings(), seed
        n, following = len(steps), steps.following
        allowed = np.ones(n, np.bool_) if users is None else users
        self._known: Bools = allowed & ((following >= 0) | (following == LEFT) | (self.settings.gamma == 0))
        if not self._known.any():
            raise MethodError(f"none of {n} lists has a known next list or end", "evaluation", "give whole sessions")
        if self.settings.gamma == 1 and not (allowed & (following == LEFT)).any():
            raise MethodError("no session ends, so that reward per session is not defined", "evaluation", "use a gamma below 1")
        self._first = allowed.copy()
        self._first[following[following >= 0]] = False
        rng = np.random.default_rng(seed)
        used, codes = np.unique(steps.users[allowed], return_inverse=True)
        groups = min(self.settings.num_groups, len(used))
        self._groups: Indices = np.zeros(n, np.int64)
        self._groups[allowed] = (rng.permutation(len(used)) % groups)[codes]
        self._folds: Indices = self._groups % 2
        if not all((self._known & (self._folds == fold)).any() for fold in (0, 1)):
            raise MethodError(f"the lists of {len(used)} users do not make two folds", "evaluation", "give a log of more users")
        self._counts = np.concatenate([np.ones((1, groups)), rng.multinomial(groups, np.full(groups, 1 / groups), self.settings.resamples)])
        self._rewards = steps.list_rewards.sum(1).astype(np.float64)
        self.earned = float(np.sqrt((steps.returns(self.settings.gamma)[self._first] ** 2).mean()))

    @cached_property
    def _features(self) -> tuple[ListFeatures, ListFeatures]:
        """Of the lists of fold 0 and 1, learnt on the other one."""
        updates = self.settings.num_updates
        learn = [np.flatnonzero(self._known & (self._folds == 1 - fold)) for fold in (0, 1)]
        first, second = (list_features(self.lists, train_on=on, num_updates=updates, seed=self._seed + i) for i, on in enumerate(learn))
        return first, second

    @cached_property
    def _taken(self) -> tuple[Doubles, Doubles]:
        """Features of the lists that were shown, for fold 0 and 1."""
        first, second = (features.of(self.lists.steps.columns["shown"]) for features in self._features)
        return first, second

    @cached_property
    def _explored(self) -> tuple[Indices, Doubles]:
        """Numbers of the usable explore lists and the log's propensities of their pairs."""
        of = np.flatnonzero(self.lists.explored & (self._known | self._first))
        return of, self.lists.propensities(None, of, kernel=1.0, seed=self._seed)

    @cached_property
    def _paths(self) -> Paths:
        """Explore sessions up to the last start before which 95 % have ended: those that go on would be missed, and they are long.

        Sessions that were cut off have no end: they are left out, wherever they stand.
        """
        steps = self.lists.steps
        starts = np.flatnonzero(self._first & self.lists.explored)
        starts = starts[~np.isin(steps.sessions[starts], steps.sessions[steps.following == CUT])]
        ended = np.isin(steps.sessions[starts], steps.sessions[steps.following == LEFT])
        share = np.cumsum(ended) / np.arange(1, len(starts) + 1)
        enough = np.flatnonzero(share >= 0.95)
        return Paths.of(starts[: enough[-1] + 1] if len(enough) else starts[:0], steps.following, self._groups)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of what the estimates read of the lists."""
        steps, columns = self.lists.steps, self.lists.steps.columns
        names = ("states", "categorical", "scores", "actions", "anchor_actions", "rewards", "shown", "valid")
        keys = (steps.following, steps.sessions, steps.users, steps.arms)
        parts = [*(columns[name] for name in names), self.lists.masses, *keys, self._known, self._first]
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]

    def value(self, policy: Policy, *, by_density: bool = True) -> Value:
        """Estimates of one policy's reward; values of one log are resampled alike, so that they can be subtracted.

        Args:
            policy: Without noise.
            by_density: Also NCIS, which draws the noise again.
        """
        chosen_masses = self.lists.chosen(policy) * self.lists.masses
        following, settings = self.lists.steps.following, self.settings
        sums = {name: np.zeros(len(self._counts)) for name in ("fqe", "conservative", "dr")}
        num_sessions, ratios = np.zeros(len(self._counts)), np.zeros(len(following))
        for fold in (0, 1):
            taken, chosen = self._taken[fold], self._features[fold].of(chosen_masses)
            point = FixedPoint.of(
                taken, chosen, self._rewards, following, first=self._first, known=self._known, groups=self._groups, gamma=settings.gamma
            )
            inside = np.arange(self._counts.shape[1]) % 2 == fold
            here, elsewhere = point.drawn(self._counts * inside), point.drawn(self._counts * ~inside)
            num_sessions += here.sessions
            sums["fqe"] += here.values()
            sums["conservative"] += here.values(conservative=CONSERVATIVE)
            sums["dr"] += doubly_robust(here, elsewhere)
            mine = self._folds == fold
            ratios[mine] = taken[mine] @ here.ratios()[0]
        support = self.lists.support(policy, ratios[self._known], np.flatnonzero(self._known))
        fitted = {name: _draws(total / np.maximum(num_sessions, 1e-9)) for name, total in sums.items()}
        found = {name: Estimate.of(draws).fault(earned=self.earned, limits=settings.limits) for name, draws in fitted.items()}
        refused = {name: fault for name, fault in found.items() if fault is not None}
        estimates = {name: draws for name, draws in fitted.items() if name not in refused}
        effective = self._by_density(policy, estimates, refused) if by_density else 0.0
        if faults := support.faults(settings.limits):
            refused |= dict.fromkeys([*fitted, *estimates], "; ".join(faults))
            estimates = {}
        return Value(support, estimates, refused, effective)

    def _by_density(self, policy: Policy, estimates: dict[str, Draws], refused: dict[str, str]) -> float:
        """NCIS of sessions and of lists, from explore traffic; effective sessions."""
        of, logged = self._explored
        paths, settings, columns = self._paths, self.settings, self.lists.steps.columns
        if not len(of) or not len(paths.groups):
            refused |= dict.fromkeys(("ncis", "ncis_list"), "no explore sessions that ended")
            return 0.0
        wanted = self.lists.propensities(policy, of, kernel=settings.kernel, seed=self._seed)
        shown = columns["shown"][of]
        pair_ratios = np.minimum(wanted / np.maximum(logged, 1 / (2 * NUM_DRAWS)), CAP) * shown
        rewards = (columns["rewards"][of].sum(2) * pair_ratios).sum(1).astype(np.float64)
        weights = np.maximum(self._grouped(pair_ratios.sum(1), of), 1e-9)
        estimates["ncis_list"] = _draws(self.lists.list_sizes[of].mean() * self._grouped(rewards, of) / weights)
        ratios = np.ones(len(self._rewards))
        ratios[of] = pair_ratios.sum(1) / np.maximum(shown.sum(1), 1)
        effective = effective_size(paths.cumulative(ratios)[:, -1])
        if effective < settings.min_effective_sessions:
            least = f"at least {settings.min_effective_sessions:g} needed"
            cut = int((self.lists.steps.following[self.lists.explored] == CUT).sum())
            refused["ncis"] = f"effective sessions {effective:.3g} of {len(paths.groups)} ({cut} were cut off and are left out), {least}"
        else:
            estimates["ncis"] = _draws(ncis(paths, ratios, self._rewards, self._counts, gamma=settings.gamma))
        return effective

    def _grouped(self, values: Doubles, of: Indices) -> Doubles:
        """(R + 1,) sums over lists, as often as their group of users was drawn."""
        sums: Doubles = self._counts @ np.bincount(self._groups[of], values, self._counts.shape[1])
        return sums


def _draws(values: Doubles) -> Draws:
    """The first is the estimate itself."""
    return Draws(float(values[0]), values[1:])
