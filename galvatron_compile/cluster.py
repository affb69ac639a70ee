"""Facts about the hardware, measured or preset: the noun that every price is computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from galvatron_compile.curves import CollectiveCurve, RateCurve, between_sizes
from galvatron_compile.errors import ProfileError
from galvatron_compile.facts import Device, Fact, Overlap

SCHEMA_VERSION = 1
CUDA_KERNEL_MS = 0.002
"""Least time of a kernel on a GPU, from start to end (assumption: an empty one takes about 2 us).
The fixed time of matrix products and attention is in their curves."""


@dataclass(frozen=True)
class ClusterProfile:
    """What the hardware can do. One rank drives one device; ranks fill node after node.

    matmul: rate by dtype, of products of square matrices (2 n^3 FLOPs), all ranks running at once.
    attention: rate by dtype, of a forward pass of 4 * batch * heads * queries * keys * head_dim
        FLOPs (the dense count).
    memory: bytes read plus bytes written per second, of one device.
    launch_overhead_ms: what calling one operator costs the host. On the CPU it is the least time of
        any operator. On CUDA the host runs ahead of the device, so it is no part of an operator's
        time: the operators of a layer take at least their number times it (passes.layer_estimate).
    collectives: curves by kind, tier and group size. Payload is, as in nccl-tests, the bytes of the
        whole tensor that a rank ends up with or starts from: the reduced tensor (all_reduce), the
        gathered one (all_gather), the one before scattering (reduce_scatter), all that a rank sends
        including its own part (all_to_all), the message (broadcast, p2p). Tier "node" is a group
        inside a node, "cluster" one that spans nodes, with ranks strided evenly over them as data
        parallel groups are. All disjoint groups of a size communicate at the same time.
    overlap: of collectives among all ranks. node_overlap: of those within a node, where there are
        several; None where they are not told apart. A slow link leaves computation alone, copies
        within a node do not.
    reserve_bytes: memory of each rank that the framework keeps (context, communicators, code).
    """

    name: str
    device: Device
    num_nodes: int
    ranks_per_node: int
    matmul: tuple[RateCurve, ...]
    attention: tuple[RateCurve, ...]
    memory: Fact
    launch_overhead_ms: Fact
    collectives: tuple[CollectiveCurve, ...]
    overlap: Overlap
    reserve_bytes: Fact
    node_overlap: Overlap | None = None

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ProfileError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.device.kind not in ("cpu", "cuda"):
            raise ProfileError(f"device.kind is {self.device.kind!r}; expected cpu or cuda")
        if self.device.memory_bytes <= 0:
            raise ProfileError(f"device.memory_bytes is {self.device.memory_bytes}; must be > 0")
        if not (math.isfinite(self.memory.value) and self.memory.value > 0):
            raise ProfileError(f"memory.value is {self.memory.value} bytes/s; it must be positive")
        for name in ("launch_overhead_ms", "reserve_bytes"):
            fact: Fact = getattr(self, name)
            if not (math.isfinite(fact.value) and fact.value >= 0):
                raise ProfileError(f"{name}.value is {fact.value}; it must not be negative")
        if not self.matmul:
            raise ProfileError("matmul has no rates; a profile needs at least one dtype")
        _unique("matmul", [curve.dtype for curve in self.matmul])
        _unique("attention", [curve.dtype for curve in self.attention])
        _unique(
            "collectives",
            [f"{c.kind} over {c.num_ranks} ranks ({c.tier})" for c in self.collectives],
        )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def memory_bytes(self) -> int:
        """Memory that a plan may use on one rank: the device's less the framework's reserve."""
        return max(0, self.device.memory_bytes - int(self.reserve_bytes.value))

    @property
    def overlap_slowdown(self) -> float:
        """:attr:`Overlap.joint`; the larger of two, since closed forms have one for all layers."""
        return max(self.overlap.joint, self.overlap_within(True).joint)

    def overlap_within(self, node: bool) -> Overlap:
        """Of communication within a node, or of what crosses nodes."""
        return self.node_overlap if node and self.node_overlap is not None else self.overlap

    @property
    def least_ms(self) -> float:
        """Least time of one operator on the device."""
        return CUDA_KERNEL_MS if self.device.kind == "cuda" else self.launch_overhead_ms.value

    def matmul_ms(self, flops: float, dtype: object, num_bytes: float = 0) -> float:
        """Time of a matrix product of ``flops`` that reads and writes ``num_bytes``.

        The slower of arithmetic and memory, so that thin matrices are not priced like square ones.
        ``dtype`` is a torch dtype or its name. ProfileError for a dtype without a rate.
        """
        return self._compute_ms("matmul", self.matmul, flops, dtype, num_bytes)

    def attention_ms(self, flops: float, dtype: object, num_bytes: float = 0) -> float:
        """As :meth:`matmul_ms`, for fused attention. Causal: give half the dense FLOPs."""
        return self._compute_ms("attention", self.attention, flops, dtype, num_bytes)

    def memory_ms(self, num_bytes: float) -> float:
        """Time of an operator that reads and writes ``num_bytes`` in total and computes little."""
        if num_bytes <= 0:
            return 0.0
        return max(self.least_ms, 1e3 * num_bytes / self.memory.value)

    def collective_ms(self, kind: str, payload_bytes: float, ranks: Sequence[int]) -> float:
        """Time of one collective of ``payload_bytes`` (see the class) among these global ranks.

        Nothing for fewer than two ranks or an empty payload. For p2p, the sender and the receiver.
        ProfileError if the profile has no such curve or not so many ranks.
        """
        if len(ranks) < 2 or payload_bytes <= 0:
            return 0.0
        num_nodes = 1 if self.tier(ranks) == "node" else len(self._nodes(ranks))
        return self._group_ms(kind, payload_bytes, len(ranks), num_nodes)

    def group_ms(self, kind: str, payload_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """As :meth:`collective_ms` among ``num_ranks`` ranks that lie ``stride`` apart."""
        if num_ranks < 2 or payload_bytes <= 0:
            return 0.0
        extent = (num_ranks - 1) * stride + 1
        if extent > self.world_size:
            self.tier((0, extent - 1))  # raises
        if extent <= self.ranks_per_node:
            num_nodes = 1
        else:
            num_nodes = min(num_ranks, -(-num_ranks * stride // self.ranks_per_node))
        return self._group_ms(kind, payload_bytes, num_ranks, num_nodes)

    def _group_ms(
        self, kind: str, payload_bytes: float, num_ranks: int, num_nodes: int
    ) -> float:
        """Among ranks spread evenly over ``num_nodes`` nodes.

        The curves "cluster" hold for ranks strided over the whole cluster. A group that has more
        of its ranks in each of fewer nodes shares their network with fewer other groups, so its
        bytes flow faster by that factor, but never faster than inside a node.
        """
        tier = "node" if num_nodes == 1 else "cluster"
        curves = self._curves(kind, tier)
        size = 2 if kind == "p2p" else num_ranks
        whole_ms = between_sizes(curves, size, payload_bytes)
        here, strided = num_ranks // num_nodes, max(1, num_ranks // self.num_nodes)
        if tier == "node" or here == strided or kind == "p2p":
            return whole_ms
        moving_ms = whole_ms - between_sizes(curves, num_ranks, 0)
        latency_ms = between_sizes(curves, num_nodes, 0)
        if kind == "all_to_all":  # a rank's way out of its node is as wide; fewer bytes take it
            moving_ms *= (num_ranks - here) / (num_ranks - strided)
        else:
            moving_ms *= strided / here
        if here > 1:
            inside = self._curves(kind, "node")
            inside_ms = between_sizes(inside, here, 0)
            latency_ms += inside_ms
            moving_ms = max(moving_ms, between_sizes(inside, here, payload_bytes) - inside_ms)
        return latency_ms + moving_ms

    @cached_property
    def _by_kind(self) -> dict[tuple[str, str], tuple[CollectiveCurve, ...]]:
        """Curves of a kind and tier by ascending group size."""
        ordered = sorted(self.collectives, key=lambda curve: curve.num_ranks)
        keys = {(c.kind, c.tier) for c in ordered}
        return {key: tuple(c for c in ordered if (c.kind, c.tier) == key) for key in keys}

    def _curves(self, kind: str, tier: str) -> tuple[CollectiveCurve, ...]:
        curves = self._by_kind.get((kind, tier), ())
        if not curves:
            known = sorted({c.kind for c in self.collectives if c.tier == tier})
            where = "inside a node" if tier == "node" else "across nodes"
            raise ProfileError(
                f"profile {self.name!r} has no time of {kind} {where} (it has: "
                f"{', '.join(known) or 'none'}); measure with galvatron-compile profile under "
                "torchrun on the ranks that will train, or take a preset"
            )
        return curves

    def _nodes(self, ranks: Sequence[int]) -> set[int]:
        return {rank // self.ranks_per_node for rank in ranks}

    def tier(self, ranks: Sequence[int]) -> str:
        """ "node" if these global ranks share a node, else "cluster"."""
        if min(ranks) < 0 or max(ranks) >= self.world_size:
            raise ProfileError(
                f"profile {self.name!r} describes {self.num_nodes} x {self.ranks_per_node} ranks, "
                f"but rank {max(ranks)} was asked for; profile the cluster that will train"
            )
        return "node" if len(self._nodes(ranks)) == 1 else "cluster"

    def sources(self) -> dict[str, str]:
        """Where each group of numbers is from."""
        found = {f"matmul {curve.dtype}": curve.source for curve in self.matmul}
        found |= {f"attention {curve.dtype}": curve.source for curve in self.attention}
        found["memory bandwidth"] = self.memory.source
        found["launch overhead"] = self.launch_overhead_ms.source
        for c in self.collectives:
            found[f"{c.kind} {c.tier} x{c.num_ranks}"] = c.source
        found["overlap"] = self.overlap.source
        if self.node_overlap is not None:
            found["overlap in a node"] = self.node_overlap.source
        found["reserve"] = self.reserve_bytes.source
        return found

    @property
    def is_measured(self) -> bool:
        """Whether every number was measured, none taken from a data sheet or assumed."""
        return all(source.startswith("measured") for source in self.sources().values())

    def save(self, path: str | Path) -> None:
        """Write versioned JSON that :meth:`load` reads."""
        from galvatron_compile.cluster_json import dumps

        Path(path).write_text(dumps(self) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> ClusterProfile:
        """Read what :meth:`save` wrote. ProfileError names the file and the field at fault."""
        from galvatron_compile.cluster_json import loads

        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(
                f"cannot read the cluster profile {path}: {error}; make one with "
                "galvatron-compile profile --out FILE, or use ClusterProfile.preset"
            ) from error
        try:
            return loads(text)
        except ProfileError as error:
            raise ProfileError(f"cluster profile {path}: {error}") from error

    @staticmethod
    def preset(name: str) -> ClusterProfile:
        """Defaults for a known GPU: ``"H100"``, ``"8xH100"`` or ``"128x8xH100"`` (nodes first).

        Data-sheet numbers and assumptions, each with its source; measure when you can.
        """
        from galvatron_compile.presets import preset

        return preset(name)

    @staticmethod
    def from_galvatron(directory: str | Path, gpu: str = "A100-80GB") -> ClusterProfile:
        """What a folder of Galvatron's profiles says of the machine; the rest is ``gpu``'s preset.

        ProfileError for a missing or malformed file. Galvatron's layer times are no facts about
        the machine: ``galvatron-compile plan --from-galvatron`` searches on those.
        """
        from galvatron_compile.galvatron.cluster import to_cluster
        from galvatron_compile.galvatron.profile import GalvatronProfile

        return to_cluster(GalvatronProfile.load(directory), gpu)

    @staticmethod
    def presets() -> tuple[str, ...]:
        """GPU names that :meth:`preset` knows."""
        from galvatron_compile.presets import GPUS

        return tuple(GPUS)

    def __str__(self) -> str:
        from galvatron_compile.cluster_text import describe

        return describe(self)

    def _compute_ms(
        self, what: str, curves: Sequence[RateCurve], flops: float, dtype: object, num_bytes: float
    ) -> float:
        if flops <= 0:
            return self.memory_ms(num_bytes)
        name = str(dtype).removeprefix("torch.")
        for curve in curves:
            if curve.dtype == name:
                return max(self.least_ms, curve.ms(flops), self.memory_ms(num_bytes))
        known = ", ".join(curve.dtype for curve in curves) or "none"
        raise ProfileError(f"profile {self.name!r} has no {what} rate for {name}; it has: {known}")


def _unique(what: str, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ProfileError(f"{what} lists {name} twice; keep one")
