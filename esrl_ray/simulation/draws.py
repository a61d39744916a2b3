"""Counter-based random numbers: the same key gives the same number, in whatever order and process it is asked for.

So two policies on the same sessions meet the same candidates and, for the same item on the same page, the same mood of the user:
common random numbers.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from esrl_ray.exploration import splitmix64
from esrl_ray.vocabulary import Floats

Doubles = npt.NDArray[np.float64]
Counters = npt.NDArray[np.uint64]
_SALTS = splitmix64(np.arange(1, 17, dtype=np.uint64))
"""One for each place in a key, so that (1, 2) and (2, 1) differ."""
_NORMALS: Floats = ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)
"""65,536 equally likely values of N(0, 1)."""


def key(*parts: Any) -> Counters:
    """Mix integer arrays that broadcast against each other into one array of counters.

    Each part is mixed at its own size and small ones are joined first, so that only the last of the rounds has the full size. The order of
    joining changes nothing: `key = mix(xor_i mix(part_i ^ salt_i))`.
    """
    mixed = [splitmix64(np.asarray(part).astype(np.uint64) ^ salt) for part, salt in zip(parts, _SALTS, strict=False)]
    joined: Counters = reduce(np.bitwise_xor, sorted(mixed, key=lambda part: part.size))
    return splitmix64(joined)


def uniform(*parts: Any) -> Doubles:
    """U(0, 1), one for each key, 53 bits each."""
    return (key(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(*parts: Any) -> Doubles:
    """N(0, 1), one for each key."""
    return normal_from(uniform(*parts))


def normal_from(uniforms: Doubles) -> Doubles:
    """N(0, 1) from U(0, 1) by the inverse of its distribution function."""
    drawn: Doubles = ndtri(np.clip(uniforms, 1e-12, 1 - 1e-12))
    return drawn


def coarse_normals(counters: Counters, count: int) -> Floats:
    """`count` numbers of N(0, 1) for each counter, (..., count) float32: one of 65,536 equally likely values each, by 16 bits."""
    words = [counters]
    while 4 * len(words) < count:
        words.append(splitmix64(words[-1]))
    pieces = np.stack(words, -1).astype("<u8", copy=False).view("<u2")[..., :count]  # four of a word, the lowest first
    drawn: Floats = _NORMALS.take(pieces)
    return drawn
