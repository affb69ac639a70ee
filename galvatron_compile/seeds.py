"""Seeds of random operators: pure functions of where and when an operator runs.

Nothing is drawn from a stream that ranks would have to advance together; recompute repeats its
masks because it computes the same seed again.
"""

from __future__ import annotations

_MASK = (1 << 63) - 1


def mix(*numbers: int) -> int:
    """A 63-bit hash of integers (splitmix64's finaliser, Steele et al. 2014, folded over them)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


def layer_seed(seed: int, layer: int, data_index: int) -> int:
    """The seed of one layer on the ranks that hold one shard of the batch."""
    return mix(seed, layer, data_index)
