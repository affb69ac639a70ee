"""How one value lies on the ranks of one mesh axis.

Four placements type the value *and* its gradient, which is what makes backward correct
by typing (``Replicate``, ``Shard`` and ``Partial`` alone do not tell R from V):

====  ==================  ====================
type  value               gradient
====  ==================  ====================
R     same on all ranks   same on all ranks
V     same on all ranks   partial sum per rank
P     partial sum         same on all ranks
S     sharded             sharded
====  ==================  ====================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["R", "V", "P", "S"]


@dataclass(frozen=True, slots=True)
class Placement:
    """One of ``R``, ``V``, ``P`` or ``S(dim, outer)`` on one mesh axis of n ranks.

    ``S(dim, outer)`` sees ``dim`` (size d) as ``(outer, n, d / outer / n)`` and gives rank r the
    r-th block of every outer piece: ``outer`` is 3 for a fused query/key/value weight, 2 for a
    chunked gated MLP, and the size of what is merged in front of a sharded dim after a view.
    ``outer`` is an int, or a hashable symbolic expression where it depends on the batch.
    """

    kind: Kind
    dim: int = -1
    outer: object = 1

    def __post_init__(self) -> None:
        if self.kind == "S" and self.dim < 0:
            raise ValueError(f"a sharded placement needs a dim >= 0, got {self.dim}")
        if self.kind != "S" and (self.dim != -1 or self.outer != 1):
            raise ValueError(f"placement {self.kind} takes neither dim nor outer")

    @property
    def is_shard(self) -> bool:
        return self.kind == "S"

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim},{self.outer})"

    @staticmethod
    def parse(text: str) -> Placement:
        """Inverse of ``str`` for numeric outers. Raises ValueError on anything else."""
        if text in ("R", "V", "P"):
            return Placement(text)  # type: ignore[arg-type]
        found = re.fullmatch(r"S\((\d+)(?:,(\d+))?\)", text)
        if not found:
            raise ValueError(f"not a placement: {text!r}; expected R, V, P, S(dim) or S(dim,outer)")
        return Placement("S", int(found[1]), int(found[2] or 1))


R = Placement("R")
V = Placement("V")
P = Placement("P")


def S(dim: int, outer: object = 1) -> Placement:
    """Sharded on ``dim``; see :class:`Placement` for ``outer``."""
    return Placement("S", dim, outer)
