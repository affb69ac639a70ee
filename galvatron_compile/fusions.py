"""What fusing did to a program: what was replaced, what was declined, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fusion:
    """A pattern that was found in a layer's graph.

    covers: names of the nodes that it would replace. why_not: empty if it was replaced.
    saves_ms: what the cost model expects of it in one forward pass; None if there is no cluster.
    """

    name: str
    covers: tuple[str, ...]
    why_not: str = ""
    saves_ms: float | None = None

    @property
    def taken(self) -> bool:
        return not self.why_not

    def __str__(self) -> str:
        first, last = self.covers[0], self.covers[-1]
        span = first if first == last else f"{first} … {last}"
        saved = "" if self.saves_ms is None else f", saves {self.saves_ms:.3f} ms"
        verdict = f"replaced{saved}" if self.taken else f"declined: {self.why_not}"
        return f"{self.name:34} {span:44} {verdict}"


@dataclass(frozen=True)
class Fusions:
    """By layer graph: the layers that share it, and what was found there, in order."""

    by_graph: tuple[tuple[tuple[str, ...], tuple[Fusion, ...]], ...] = ()

    def __iter__(self) -> Iterator[Fusion]:
        return (fusion for _, found in self.by_graph for fusion in found)

    @property
    def num_taken(self) -> int:
        """Replaced, counting every layer that shares a graph."""
        return sum(
            len(layers) * sum(fusion.taken for fusion in found) for layers, found in self.by_graph
        )

    def __str__(self) -> str:
        lines = []
        for layers, found in self.by_graph:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            lines.append(f"// {layers[0]}{more}")
            lines += [f"   {fusion}" for fusion in found] or ["   nothing to fuse"]
        return "\n".join(lines)
