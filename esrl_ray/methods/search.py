"""One vector of fusion weights for all users, searched: the industry's default, and what per-pair actions must beat.

Online, by rounds: every explore session keeps one vector, drawn around the centre that was the newest when it began, and its reward is
what the vector earned, told in the round of its end. (Without those that outlast a round the long ones would be missing, and with them most
of what a vector does to how long users stay.)
Session rewards vary by more than their mean, so that the search leans on all sessions: by default a quadratic response surface is fitted
to them and the searcher maximises that (Box and Wilson 1951); `sessions` tells the searcher the sessions themselves, a round at a time.
Offline, on a log that explores otherwise: the searcher maximises how well the vector orders the shown pairs of a list by their reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch

from esrl_ray.config import Config
from esrl_ray.errors import MethodError
from esrl_ray.fusion import fused_scores
from esrl_ray.methods.method import Exploration, require
from esrl_ray.methods.searchers import Doubles, MakeSearcher, Searcher, maximise
from esrl_ray.policy.policy import Policy
from esrl_ray.replay.steps import ARMS, LEFT, Indices, Steps
from esrl_ray.spec import Spec
from esrl_ray.vocabulary import Arm, Floats

SAME = 1e-6
"""Actions that differ by less are one action."""
SLOPE_PRIOR, CURVATURE_PRIOR, CURVATURE = 20.0, 600.0, 0.3
"""Prior of the response surface, as numbers of sessions with a unit of the feature: slopes near 0, the square of each dimension near
-CURVATURE standard deviations of a session's reward, products near 0. Half or twice of them changes little at 600 sessions a round."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How a searcher is used; `population * generations` values are asked of an objective."""

    online: Literal["surface", "sessions"] = "surface"
    spread: float = 0.5  # standard deviation of the explored vectors in every dimension
    min_spread: float = 0.4  # of a searcher that sets it by itself: on noise it would close too early
    min_sessions: int = 20  # a round with fewer ended sessions teaches nothing
    population: int = 50
    generations: int = 30
    max_lists: int = 5_000  # of a log


@dataclass(frozen=True, slots=True)
class ExploredSessions:
    """Explore sessions that kept one vector to their end."""

    vectors: Doubles  # (n, A)
    rewards: Doubles  # (n,) of the session, groups summed with their weights
    rounds: Indices  # (n,) of the last list

    @classmethod
    def of(cls, steps: Steps, group_weights: Floats) -> Self | None:
        """Those of steps; None where explore sessions do not keep one vector within a round.

        Args:
            steps: Of any exploration.
            group_weights: (q,).
        """
        c = steps.columns
        _, first, session, count = np.unique(steps.sessions, return_index=True, return_inverse=True, return_counts=True)
        vectors = c["actions"][first, c["valid"][first].argmax(1)]  # (S, A)
        differs = (np.abs(c["actions"] - vectors[session][:, None]).max(-1) * c["valid"]).max(1) > SAME  # (n,)
        moved = steps.rounds != steps.rounds[first][session]
        kept, whole, ended = np.ones(len(first), bool), np.ones(len(first), bool), np.zeros(len(first), bool)
        kept[session[differs]], whole[session[moved]], ended[session[steps.following == LEFT]] = False, False, True
        explored = steps.arms[first] == ARMS.index(Arm.EXPLORE)
        tell_tale = explored & whole & (count > 1)
        if not (kept & tell_tale).any() or kept[tell_tale].mean() < 0.5 or np.ptp(vectors[kept & explored], axis=0).max() <= SAME:
            return None
        rewards = np.bincount(session, weights=steps.list_rewards @ group_weights, minlength=len(first))
        chosen = explored & kept & ended
        last = len(steps) - 1 - np.unique(steps.sessions[::-1], return_index=True)[1]
        return cls(vectors[chosen].astype(np.float64), rewards[chosen], steps.rounds[last][chosen])


class ResponseSurface:
    """Ridge regression of standardised session rewards on a quadratic of the vector: `y = c + sum_i b_i a_i + sum_{i<=j} c_ij a_i a_j`.

    Args:
        vectors: (n, A).
        rewards: (n,).
    """

    def __init__(self, vectors: Doubles, rewards: Doubles) -> None:
        self._upper = np.triu_indices(vectors.shape[1])
        x, y = self._features(vectors), (rewards - rewards.mean()) / max(rewards.std(), 1e-9)
        squares = np.concatenate([np.zeros(1 + vectors.shape[1]), self._upper[0] == self._upper[1]])
        prior = -CURVATURE * squares
        precision = np.full(x.shape[1], CURVATURE_PRIOR)
        precision[0], precision[1 : 1 + vectors.shape[1]] = 1e-6, SLOPE_PRIOR
        self._coefficients = prior + np.linalg.solve(x.T @ x + np.diag(precision), x.T @ (y - x @ prior))

    def __call__(self, vectors: Doubles) -> Doubles:
        """Predicted rewards (n,) of vectors (n, A), in standard deviations from the mean."""
        predicted: Doubles = self._features(vectors) @ self._coefficients
        return predicted

    def _features(self, vectors: Doubles) -> Doubles:
        i, j = self._upper
        return np.concatenate([np.ones((len(vectors), 1)), vectors, vectors[:, i] * vectors[:, j]], axis=1)


class RankingQuality:
    """How well one vector orders the shown pairs of lists: weighted pairwise accuracy, from -1 to 1.

    `sum_lists sum_{i<j shown} (r_i - r_j) sign(f_i - f_j) / sum_lists sum_{i<j shown} |r_i - r_j|`

    Args:
        scores: (n, G, k) raw.
        rewards: (n, G).
        shown: (n, G).
        spec: Ranges.
    """

    def __init__(self, scores: Floats, rewards: Floats, shown: Floats, spec: Spec) -> None:
        number = np.cumsum(shown.ravel() > 0).reshape(shown.shape) - 1  # of a shown pair
        i, j = np.triu_indices(shown.shape[1], 1)
        lists, pairs = np.nonzero((shown[:, i] * shown[:, j] > 0) & (rewards[:, i] != rewards[:, j]))
        left, right = (lists, i[pairs]), (lists, j[pairs])
        self._scores, self._spec = torch.from_numpy(scores[shown > 0]), spec  # (all shown pairs, k)
        self._left, self._right = number[left], number[right]
        self._weights = (rewards[left] - rewards[right]).astype(np.float64)

    @property
    def num_comparisons(self) -> int:
        """Pairs of shown pairs whose rewards differ."""
        return len(self._weights)

    def __call__(self, vectors: Doubles) -> Doubles:
        """Quality (n,) of vectors (n, A)."""
        total = np.abs(self._weights).sum()
        values = []
        for vector in vectors.astype(np.float32):
            fused = fused_scores(self._scores, torch.from_numpy(vector), self._spec).numpy()
            values.append(float(self._weights @ np.sign(fused[self._left] - fused[self._right]) / total))
        return np.array(values)


class VectorSearch:
    """A search of one vector, online by rounds or on a log.

    Args:
        name: As in the catalogue.
        config: Deployment.
        seed: Of the searcher and of the choice of lists.
        make_searcher: The searcher.
        settings: How it is used.
    """

    def __init__(
        self, name: str, config: Config, *, seed: int, make_searcher: MakeSearcher, settings: SearchSettings | None = None
    ) -> None:
        self.name, self.settings, self._spec, self._seed = name, settings or SearchSettings(), config.spec.build(), seed
        self._exploration, self._make = config.exploration, make_searcher
        self._group_weights = np.array(config.learner.group_weights or [1.0] * config.reward.num_groups, np.float32)
        self._centre, self._spread = np.zeros(self._spec.num_actions), np.full(self._spec.num_actions, self.settings.spread)
        self._searcher: Searcher | None = None
        self._round, self._told = 0, -1

    def exploration(self) -> Exploration:
        """Gaussian around the newest vector, one draw per session."""
        low, high = (np.full(self._spec.num_actions, bound, np.float32) for bound in (self._exploration.low, self._exploration.high))
        return Exploration(self._policy(), low, high, std=self._spread.astype(np.float32), scope="session")

    def fit(self, steps: Steps) -> Policy:
        """The best vector as far as the steps tell.

        Raises:
            MethodError: no steps, steps of another width, or a log in which no two shown pairs of a list differ in reward.
        """
        require(steps, self._spec, self.name)
        if (sessions := ExploredSessions.of(steps, self._group_weights)) is None:
            self._centre = maximise(self._ranking(steps), self._fresh(np.zeros_like(self._centre)), **self._effort)
        elif self.settings.online == "surface":
            if len(sessions.rewards) >= self.settings.min_sessions:
                surface = ResponseSurface(sessions.vectors, sessions.rewards)
                self._centre = maximise(surface, self._fresh(self._centre), **self._effort)
        else:
            self._tell(sessions)
        self._round += 1
        return self._policy()

    @property
    def _effort(self) -> dict[str, int]:
        return {"population": self.settings.population, "generations": self.settings.generations}

    def _fresh(self, centre: Doubles) -> Searcher:
        return self._make(centre, self.settings.spread, self._seed)

    def _policy(self) -> Policy:
        return Policy.static(self._spec, self._centre.astype(np.float32), note=self.name).numbered(0, round=self._round)

    def _tell(self, sessions: ExploredSessions) -> None:
        """Tell the searcher the rounds that it has not heard of."""
        self._searcher = searcher = self._searcher or self._fresh(self._centre)
        for number in np.unique(sessions.rounds[sessions.rounds > self._told]):
            self._told, chosen = int(number), sessions.rounds == number
            if chosen.sum() >= self.settings.min_sessions:
                searcher.tell(sessions.vectors[chosen], sessions.rewards[chosen])
        self._centre, self._spread = searcher.centre, np.maximum(searcher.spread, self.settings.min_spread)

    def _ranking(self, steps: Steps) -> RankingQuality:
        lists = np.flatnonzero(steps.columns["shown"].any(1))
        if len(lists) > self.settings.max_lists:
            lists = np.random.default_rng(self._seed).choice(lists, self.settings.max_lists, replace=False)
        scores, rewards, shown = (steps.columns[name][lists] for name in ("scores", "rewards", "shown"))
        quality = RankingQuality(scores, rewards @ self._group_weights, shown, self._spec)
        if not quality.num_comparisons:
            text = f"no two shown pairs of a list differ in reward in {len(steps)} steps"
            raise MethodError(text, self.name, "give more steps, or steps with feedback")
        return quality
