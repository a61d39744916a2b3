"""Searchers of one vector in [-1, 1]^A: cross-entropy, CMA-ES, Optuna's TPE. They are asked for vectors and told what those are worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

Objective = Callable[[Doubles], Doubles]
"""Values (n,) of vectors (n, A); larger is better."""


class Searcher(Protocol):
    """Where the search stands. Vectors that are told need not have been asked for."""

    @property
    def centre(self) -> Doubles:
        """(A,) the vector in the middle of the search."""

    @property
    def spread(self) -> Doubles:
        """(A,) standard deviations of the search."""

    def ask(self, count: int) -> Doubles:
        """(count, A) vectors to try, in [-1, 1]."""

    def tell(self, vectors: Doubles, values: Doubles) -> None:
        """What vectors (n, A) are worth (n,)."""


MakeSearcher = Callable[[Doubles, float, int], Searcher]
"""A searcher from a centre (A,), a standard deviation and a seed."""


class Cem:
    """The cross-entropy method (Rubinstein 1999): a Gaussian with independent dimensions moves to its elite.

    Args:
        centre: (A,).
        spread: Standard deviation in every dimension, at the start.
        seed: Of the vectors.
        elite_share: Share of the vectors that are the elite; small, because one session says little: the mean moves by
            `log(1 / share)` times the slope.
        floor: Smallest standard deviation.
    """

    def __init__(self, centre: Doubles, spread: float, seed: int, *, elite_share: float = 0.1, floor: float = 0.02) -> None:
        self.centre, self.spread = centre.copy(), np.full(len(centre), spread)
        self._rng, self._elite_share, self._floor = np.random.default_rng(seed), elite_share, floor

    def ask(self, count: int) -> Doubles:
        """Draws of the Gaussian, cut to the box."""
        return np.clip(self.centre + self.spread * self._rng.standard_normal((count, len(self.centre))), -1, 1)

    def tell(self, vectors: Doubles, values: Doubles) -> None:
        """Mean and standard deviation become the elite's."""
        elite = vectors[np.argsort(-values, kind="stable")[: max(2, round(self._elite_share * len(values)))]]
        self.centre, self.spread = elite.mean(0), np.maximum(elite.std(0), self._floor)


class CmaEs:
    """CMA-ES as the package `cma` ships it, with a diagonal covariance, which is what exploration can draw from.

    Args:
        centre: (A,).
        spread: Standard deviation in every dimension, at the start.
        seed: Of the vectors.
    """

    def __init__(self, centre: Doubles, spread: float, seed: int) -> None:
        import cma  # takes 2 s, which no other method should pay

        rng = np.random.default_rng(seed)
        options = {
            "CMA_diagonal": True,
            "verbose": -9,
            "seed": float("nan"),  # leaves NumPy's global state alone
            "randn": lambda *shape: rng.standard_normal(shape),
        }
        self._strategy = cma.CMAEvolutionStrategy(centre, spread, options)

    @property
    def centre(self) -> Doubles:
        """(A,) the mean, cut to the box."""
        mean: Doubles = np.clip(self._strategy.mean, -1, 1)
        return mean

    @property
    def spread(self) -> Doubles:
        """(A,) sigma times the root of the diagonal."""
        return np.asarray(self._strategy.stds, np.float64)

    def ask(self, count: int) -> Doubles:
        """Draws of the strategy, cut to the box."""
        vectors: Doubles = np.clip(np.array(self._strategy.ask(count)), -1, 1)
        return vectors

    def tell(self, vectors: Doubles, values: Doubles) -> None:
        """One generation of these vectors: weights and rates are those of a population of their number."""
        strategy = self._strategy
        strategy.sp.set(strategy.opts, popsize=len(values))
        strategy.ask(1)  # the package wants to be asked before it is told
        strategy.tell(list(vectors), list(-values))


class OptunaTpe:
    """Optuna's tree-structured Parzen estimator.

    It keeps the best 25 of what it was told as "good": made for values without much noise, and for hundreds of them.

    Args:
        centre: (A,); the first vector that it suggests.
        spread: Standard deviation that `spread` reports; the search is that of the whole box.
        seed: Of the vectors.
    """

    def __init__(self, centre: Doubles, spread: float, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._names = optuna, [f"a{i}" for i in range(len(centre))]
        self._space = {name: optuna.distributions.FloatDistribution(-1, 1) for name in self._names}
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
        self._study.enqueue_trial(dict(zip(self._names, centre.tolist(), strict=True)))
        self._start, self.spread = centre.copy(), np.full(len(centre), spread)
        self._asked: dict[bytes, int] = {}

    @property
    def centre(self) -> Doubles:
        """(A,) the best vector so far."""
        told = self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState.COMPLETE])
        return np.array([self._study.best_params[name] for name in self._names]) if told else self._start

    def ask(self, count: int) -> Doubles:
        """Suggestions; each waits for its value."""
        trials = [self._study.ask(self._space) for _ in range(count)]
        vectors = np.array([[trial.params[name] for name in self._names] for trial in trials])
        self._asked.update({vector.tobytes(): trial.number for vector, trial in zip(vectors, trials, strict=True)})
        return vectors

    def tell(self, vectors: Doubles, values: Doubles) -> None:
        """Ends the trials that were asked for; other vectors become trials of their own."""
        for vector, value in zip(vectors, values, strict=True):
            if (number := self._asked.pop(vector.tobytes(), None)) is not None:
                self._study.tell(number, float(value))
                continue
            params = dict(zip(self._names, vector.tolist(), strict=True))
            self._study.add_trial(self._optuna.trial.create_trial(params=params, distributions=self._space, value=float(value)))


def maximise(objective: Objective, searcher: Searcher, *, population: int, generations: int) -> Doubles:
    """The best vector that a searcher finds.

    Args:
        objective: Without noise.
        searcher: Fresh.
        population: Vectors asked for at once.
        generations: Times that it is asked.

    Returns:
        (A,) the best of all that were tried, the searcher's first centre included.
    """
    best = searcher.centre
    value = objective(best[None])[0]
    for _ in range(generations):
        vectors = searcher.ask(population)
        values = objective(vectors)
        searcher.tell(vectors, values)
        if values.max() > value:
            best, value = vectors[values.argmax()], values.max()
    return best
