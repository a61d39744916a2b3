"""Counter-based random numbers: the same key gives the same number, in whatever order and process it is asked for.

So two policies on the same sessions meet the same candidates and, for the same item on the same page, the same mood of the user:
common random numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from esrl_ray.exploration import splitmix64, uniform01

Doubles = npt.NDArray[np.float64]


def key(*parts: Any) -> npt.NDArray[np.uint64]:
    """Mix integer arrays that broadcast against each other into one array of counters."""
    mixed = np.zeros((), np.uint64)
    for part in parts:
        mixed = splitmix64(mixed ^ np.asarray(part).astype(np.uint64))
    return mixed


def uniform(*parts: Any) -> Doubles:
    """U(0, 1), one for each key."""
    return uniform01(key(*parts))


def normal(*parts: Any) -> Doubles:
    """N(0, 1), one for each key."""
    return normal_from(uniform(*parts))


def normal_from(uniforms: Doubles) -> Doubles:
    """N(0, 1) from U(0, 1) by the inverse of its distribution function."""
    drawn: Doubles = ndtri(np.clip(uniforms, 1e-12, 1 - 1e-12))
    return drawn
