"""Layer ranges that look alike: the search solves one stage for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from galvatron_compile.passes.pipeline.problem import Ints


@dataclass(frozen=True)
class Ranges:
    """Every range of layers, by what it holds.

    alike: [layers + 1, layers + 1], ``alike[last, n]`` is the number of the signature of layers
        ``last - n .. last - 1``, or ``num`` where there is no such range.
    first, length: [num], where one range with this signature starts, and its length.
    """

    alike: Ints
    first: Ints
    length: Ints

    @property
    def num(self) -> int:
        return len(self.first)

    @property
    def last(self) -> Ints:
        return np.asarray(self.first + self.length)


@lru_cache(maxsize=8)
def ranges(kinds: tuple[int, ...]) -> Ranges:
    """Signatures of all ranges of a sequence: equal kinds in equal order have equal numbers."""
    sequence = np.asarray(kinds, dtype=np.int64)
    num_layers, base = len(kinds), max(kinds) + 1
    alike = np.full((num_layers + 1, num_layers + 1), -1, dtype=np.int64)
    first: list[Ints] = []
    num = 0
    longer: Ints = np.zeros(num_layers, dtype=np.int64)
    for n in range(1, num_layers + 1):
        starts = np.arange(num_layers - n + 1)
        key = longer[starts] * base + sequence[starts + n - 1]
        _, where, longer = np.unique(key, return_index=True, return_inverse=True)
        alike[starts + n, n] = num + longer
        first.append(where.astype(np.int64))
        num += len(where)
    alike[alike < 0] = num
    length = np.repeat(np.arange(1, num_layers + 1), [len(where) for where in first])
    return Ranges(alike, np.concatenate(first), length)


def class_counts(found: Ranges, classes: Ints, num_classes: int) -> Ints:
    """[signatures, classes]: how many layers of every class a range has."""
    one_hot = classes[:, None] == np.arange(num_classes)
    before = np.concatenate([np.zeros((1, num_classes), dtype=np.int64), one_hot.cumsum(axis=0)])
    return np.asarray(before[found.last] - before[found.first])


def runs(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Lengths of equal neighbours: (where a run starts, its length)."""
    result: list[tuple[int, int]] = []
    for i, kind in enumerate(kinds):
        if result and kinds[result[-1][0]] == kind:
            result[-1] = result[-1][0], result[-1][1] + 1
        else:
            result.append((i, 1))
    return result
