"""The simulator's upstream model: five scores per candidate, biased and noisy in ways that depend on user and item.

A fusion that only trusts one vector of weights cannot undo this; one that sees the pair can.
"""

from __future__ import annotations

import numpy as np

from esrl_ray.simulation.draws import Doubles
from esrl_ray.vocabulary import Floats

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
        y = self.means(true, items, users) + self.deviations(items, users) * noise
        self._scale = self.scores(y.astype(np.float32)).mean((0, 1), dtype=np.float64)

    def means(self, true: Doubles, items: Doubles, users: Doubles) -> Doubles:
        """(n, K, 5) where scores of pairs lie on the logit scale before noise; arguments as in `calibrate`.

        `.75 (t - mean t) + mean t + [d, age, pop, q, b]' A_h [1, act, pat, nov]`: their slope in t is `SHRINK`.
        """
        bias = items @ np.einsum("hij,nj->nih", self._distortion, users[:, 0], optimize=True)  # (n, K, 5)
        y: Doubles = SHRINK * (true - self._centre) + self._centre + bias
        return y

    def deviations(self, items: Doubles, users: Doubles) -> Doubles:
        """(n, K, 5) what noise is multiplied by: less for active users and fresh items."""
        sigma: Doubles = self._noise * (1 + 0.3 * np.tanh(-users[..., _ACT : _ACT + 1]) + 0.3 * np.tanh(items[..., _AGE : _AGE + 1]))
        return sigma

    def scores(self, y: Floats) -> Floats:
        """Scores of pairs, positive, mean about 1, from their values on the logit scale with noise.

        Args:
            y: (n, K, 5); written over.
        """
        e = np.negative(np.maximum(y, np.float32(-80.0), out=y), out=y)
        np.exp(e, out=e)  # of -y, finite
        longest = np.maximum(e[..., 2], np.float32(1 / 240.0))  # watch is in seconds: exp(min(y, log 240))
        e += np.float32(1.0)
        e[..., 2] = longest
        e *= np.tile(self._scale.astype(np.float32), (y.shape[1], 1))
        return np.reciprocal(e, out=e)
