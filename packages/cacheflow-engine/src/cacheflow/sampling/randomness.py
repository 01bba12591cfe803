"""Random numbers as a pure function of (seed, sequence, position): the same alone, in any batch, and after a restart.

The generator is counter-based: it has no state to carry. It knows nothing of distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def uniform(seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) per triple, with 53 random bits.

    The mixer is SplitMix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), with the
    constants of Stafford's variant 13; each coordinate is absorbed by one step of it, so neighbours in any coordinate are
    unrelated.

    Args:
        seeds: Of the requests, 0 to 2**63 - 1.
        indices: Of the sequences within their requests.
        positions: Tokens generated before this one.
    """
    state = _mix(np.asarray(seeds, dtype=np.uint64))
    state = _mix(state ^ np.asarray(indices, dtype=np.uint64))
    state = _mix(state ^ np.asarray(positions, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64; arrays wrap around silently, as it wants."""
    value = value + _GAMMA
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))
