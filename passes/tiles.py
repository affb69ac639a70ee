"""How much of a GPU a matrix product keeps busy: whole tiles on whole processors.

A product's result is divided into tiles, one for each processor (SM) at a time; tiles at its edges
and processors in the last wave compute nothing of use. See NVIDIA, Matrix Multiplication Background
User's Guide, sections 3 and 4 (tile and wave quantization):
https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

PROCESSORS = {"A100-40GB": 108, "A100-80GB": 108, "H100": 132, "H200": 132, "B200": 148,
              "L4": 58, "L40S": 142, "A10": 72}  # fmt: skip
"""SMs by the end of a device's name, from NVIDIA's architecture whitepapers."""

_TILES = (
    (256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.92), (256, 64, 0.85), (64, 256, 0.85),
    (128, 64, 0.75), (64, 128, 0.75), (64, 64, 0.6),
)  # fmt: skip
"""Sizes that libraries offer, and their speed beside the largest (the guide's figure 4, rounded:
smaller tiles read their operands more often)."""
_SPLITS = (1, 2, 4, 8)
_LEAST_SPLIT = 512  # of the summed dimension, that is worth adding the parts for


def num_processors(device_name: str) -> int | None:
    """None for a device that is not known."""
    fitting = [name for name in PROCESSORS if device_name.upper().endswith(name)]
    return PROCESSORS[max(fitting, key=len)] if fitting else None


@lru_cache(maxsize=65536)
def busy_share(batch: int, m: int, n: int, k: int, processors: int) -> float:
    """Share of the device that ``batch`` products [m, k] x [k, n] use, at most 1.

    Of the fastest tile, the summed dimension divided over several processors where that helps.
    """
    best = 0.0
    for height, width, speed in _TILES:
        tiles = batch * ceil(m / height) * ceil(n / width)
        for split in _SPLITS:
            if split > 1 and k < _LEAST_SPLIT * split:
                break
            waves = ceil(tiles * split / processors)
            useful = batch * m * n / (waves * processors * height * width / split)
            best = max(best, speed * useful)
    return min(1.0, best)
