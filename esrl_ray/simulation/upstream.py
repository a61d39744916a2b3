"""The simulator's upstream model: five scores per candidate, biased and noisy in ways that depend on user and item.

A fusion that only trusts one vector of weights cannot undo this; one that sees the pair can.
"""

from __future__ import annotations

import numpy as np

from esrl_ray.simulation.draws import Doubles

SCORES = ("click", "valid", "watch", "like", "comment")
_DUR, _AGE, _POP = 0, 1, 2
_ONE, _ACT, _PAT = 0, 1, 2
SHRINK = 0.75  # slope of the score in the true value


class Upstream:
    """Distorts true values into scores.

    Args:
        rng: Of the world.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        a = 0.22 * rng.standard_normal((len(SCORES), 5, 4))  # [score, item feature, 1 | act | pat | nov]
        a[1, _DUR, _ONE] += 0.5
        a[2, _DUR, _ONE] += 0.7
        a[2, _DUR, _ACT] -= 0.5
        a[0, 4, _ONE] += 0.3  # bait
        a[3, _POP, _ONE] += 0.7
        a[4, _AGE, _ONE] += 0.5
        a[:2, _AGE, _PAT] += 0.5
        self._distortion = a
        self._noise = np.array([0.35, 0.35, 0.28, 0.56, 0.49])
        self._centre = np.zeros(len(SCORES))
        self._scale = np.ones(len(SCORES))

    def calibrate(self, true: Doubles, items: Doubles, users: Doubles, noise: Doubles) -> None:
        """Fix the means that scores are centred on and divided by, on a sample of pairs.

        Args:
            true: (n, K, 5) true values on the logit scale (log seconds for watch).
            items: (n, K, 5) item features d, age, pop, q, b.
            users: (n, 1, 4) 1, act, pat, nov.
            noise: (n, K, 5) standard normal.
        """
        self._centre = true.mean((0, 1))
        self._scale = np.ones(len(SCORES))
        self._scale = self.scores(true, items, users, noise).mean((0, 1))

    def scores(self, true: Doubles, items: Doubles, users: Doubles, noise: Doubles) -> Doubles:
        """Scores of pairs: positive, mean about 1.

        Args:
            true, items, users, noise: As in `calibrate`.
        """
        bias = items @ np.einsum("hij,nj->nih", self._distortion, users[:, 0], optimize=True)  # (n, K, 5)
        sigma = self._noise * (1 + 0.3 * np.tanh(-users[..., _ACT : _ACT + 1]) + 0.3 * np.tanh(items[..., _AGE : _AGE + 1]))
        y = SHRINK * (true - self._centre) + self._centre + bias + sigma * noise
        probability: Doubles = 1 / (1 + np.exp(-y))
        probability[..., 2] = np.exp(np.minimum(y[..., 2], np.log(240.0)))  # watch is in seconds
        scores: Doubles = probability / self._scale
        return scores
