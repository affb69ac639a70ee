"""Measure this machine, or the machines of the current torchrun job, as a ClusterProfile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.cluster_json import dumps, loads
from galvatron_compile.curves import CollectiveCurve, RateCurve, rising
from galvatron_compile.facts import Device, Fact, Overlap
from galvatron_compile.job import join
from galvatron_compile.profiling_collectives import (
    group_among,
    groups_of,
    measure_group,
    measure_overlap,
    measure_p2p,
)
from galvatron_compile.profiling_machine import (
    describe_source,
    device_memory,
    device_name,
    job_layout,
    resident_bytes,
)
from galvatron_compile.stopwatch import Stopwatch

Progress = Callable[[int, int, str], None]
"""progress(steps done, steps in all, what comes next); called on every rank."""

KIB = 1024
MIB = 1024**2
# What is summed or gathered beside computation are layers. Small messages are slowed down more: on
# a CPU, computation makes one of 256 KiB take five times as long, one of 4 MiB hardly longer.
_OVERLAP_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """What is measured: matrix sides, sequence lengths, bytes copied and communicated.

    point_s: about how long one measurement may take; larger sizes are left out where one call
    alone would take longer.
    """

    sides: tuple[int, ...]
    sequences: tuple[int, ...]
    heads: int
    copy_bytes: int
    payloads_bytes: tuple[int, ...]
    point_s: float
    limit_s: float = 40.0

    def overlap_bytes(self, device: torch.device) -> int:
        """The largest payload up to a layer's size, which is what is sent beside computation."""
        most = _OVERLAP_BYTES[device.type]
        return max((b for b in self.payloads_bytes if b <= most), default=self.payloads_bytes[0])


_CPU = Sizes(
    (64, 128, 256, 512, 1024), (64, 256, 1024), 4, 64 * MIB,
    (4 * KIB, 64 * KIB, 512 * KIB, 4 * MIB, 32 * MIB), 0.15,
)  # fmt: skip
_CPU_QUICK = Sizes(
    (64, 256, 512), (64, 256), 4, 32 * MIB, (4 * KIB, 256 * KIB, 4 * MIB), 0.05, 8.0
)  # fmt: skip
_CUDA = Sizes(
    (256, 512, 1024, 2048, 4096, 8192), (256, 512, 1024, 2048, 4096, 8192), 16, 1024 * MIB,
    (4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB), 0.1,
)  # fmt: skip
_CUDA_QUICK = Sizes(
    (512, 2048, 8192), (512, 2048), 16, 512 * MIB, (64 * KIB, MIB, 16 * MIB, 256 * MIB), 0.05
)  # fmt: skip


def measure(
    progress: Progress | None = None, quick: bool = False, sizes: Sizes | None = None
) -> ClusterProfile:
    """Measure with all ranks of the job working at once; every rank returns the same profile.

    Collective: every rank of the default process group calls it. Under torchrun without a group
    one is made (NCCL where every rank has a GPU, else gloo), which :func:`compile` then uses. A
    lone process measures computation only.

    quick: fewer and smaller sizes, some 10 s instead of a minute on CPU; ``sizes`` overrides both.

    Raises:
        ProfileError: nodes with different numbers of ranks.
    """
    device = join()
    if sizes is None:
        cpu = device.type == "cpu"
        sizes = (_CPU_QUICK if quick else _CPU) if cpu else (_CUDA_QUICK if quick else _CUDA)
    with torch.no_grad():
        return _Measurement(device, sizes, progress).run()


class _Measurement:
    """The steps of one :func:`measure`, and what they found so far."""

    def __init__(self, device: torch.device, sizes: Sizes, progress: Progress | None) -> None:
        self.device, self.sizes, self.progress = device, sizes, progress
        self.watch = Stopwatch(device, sizes.point_s, sizes.limit_s)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_nodes, self.per_node = job_layout()
        self.source = describe_source(device, self.num_nodes, self.per_node)
        self.matmul: list[RateCurve] = []
        self.attention: list[RateCurve] = []
        self.collectives: list[CollectiveCurve] = []
        self.overlap = Overlap(1, 1, 1, f"{self.source}; one rank, nothing to overlap")
        self.node_overlap: Overlap | None = None
        self.memory = self.launch = 0.0
        self.reserve_bytes = resident_bytes()

    def run(self) -> ClusterProfile:
        steps = self.steps()
        for done, (what, step) in enumerate(steps):
            if self.progress:
                self.progress(done, len(steps), what)
            step()
        if self.progress:
            self.progress(len(steps), len(steps), "done")
        return self.same_everywhere(self.profile())

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        found: list[tuple[str, Callable[[], None]]] = [
            ("operator overhead", self.measure_launch),
            ("memory bandwidth", self.measure_memory),
        ]
        for dtype in _DTYPES:
            found.append((f"matmul {_name(dtype)}", partial(self.measure_matmul, dtype)))
        for dtype in _DTYPES:
            found.append((f"attention {_name(dtype)}", partial(self.measure_attention, dtype)))
        for tier, ranks in groups_of(self.rank, self.num_nodes, self.per_node):
            what = f"collectives, {len(ranks)} ranks, {tier}"
            found.append((what, partial(self.measure_collectives, tier, ranks)))
        tiers = ["node"] * (self.per_node > 1) + ["cluster"] * (self.num_nodes > 1)
        found += [(f"p2p, {t}", partial(self.measure_p2p, t)) for t in tiers]
        if tiers:
            found.append(("overlap", self.measure_overlap))
        return found

    def measure_launch(self) -> None:
        tensor = torch.zeros(1, device=self.device)
        self.launch = self.watch.ms(lambda: tensor.add_(1))

    def measure_memory(self) -> None:
        source = torch.zeros(self.sizes.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        milliseconds = self.watch.ms(lambda: target.copy_(source))
        self.memory = 2e3 * self.sizes.copy_bytes / milliseconds  # read and written

    def measure_matmul(self, dtype: torch.dtype) -> None:
        def make(side: int) -> tuple[float, Callable[[], object]]:
            a = torch.randn(side, side, device=self.device).to(dtype)
            b = torch.randn(side, side, device=self.device).to(dtype)
            out = torch.empty_like(a)
            return 2.0 * side**3, lambda: torch.mm(a, b, out=out)

        self.matmul.append(self.rate(dtype, self.sizes.sides, make))

    def measure_attention(self, dtype: torch.dtype) -> None:
        heads, head_dim = self.sizes.heads, 64

        def make(length: int) -> tuple[float, Callable[[], object]]:
            shape = (1, heads, length, head_dim)
            q, k, v = (torch.randn(shape, device=self.device).to(dtype) for _ in range(3))
            flops = 4.0 * heads * length**2 * head_dim
            return flops, lambda: F.scaled_dot_product_attention(q, k, v)

        self.attention.append(self.rate(dtype, self.sizes.sequences, make))

    def rate(
        self,
        dtype: torch.dtype,
        sizes: Sequence[int],
        make: Callable[[int], tuple[float, Callable[[], object]]],
    ) -> RateCurve:
        """Ascending sizes, until one call would take longer than a measurement may."""
        times: list[tuple[float, float]] = []
        for size in sizes:
            flops, call = make(size)
            if self.watch.predicts_over(times, flops):
                break
            times.append((flops, self.watch.ms(call)))
        points = tuple((flops, 1e3 * flops / ms) for flops, ms in rising(times))
        return RateCurve(_name(dtype), points, self.source)

    def measure_collectives(self, tier: str, ranks: tuple[int, ...]) -> None:
        payloads_bytes = self.sizes.payloads_bytes
        with group_among(ranks) as group:
            self.collectives += measure_group(
                self.watch, tier, ranks, group, payloads_bytes, self.source
            )
            if tier == "node" and len(ranks) == self.per_node and self.num_nodes > 1:
                self.node_overlap = self.overlap_among(group)

    def measure_p2p(self, tier: str) -> None:
        payloads_bytes = self.sizes.payloads_bytes
        curve = measure_p2p(self.watch, tier, self.per_node, payloads_bytes, self.source)
        self.collectives.append(curve)

    def measure_overlap(self) -> None:
        self.overlap = self.overlap_among(None)

    def overlap_among(self, group: dist.ProcessGroup | None) -> Overlap:
        """Of the largest product measured, beside sums over this rank's ``group``; None: all."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        curve = next(curve for curve in self.matmul if curve.dtype == _name(dtype))
        flops = curve.points[-1][0]
        side = round((flops / 2) ** (1 / 3))
        a = torch.randn(side, side, device=self.device).to(dtype)
        out = torch.empty_like(a)
        payload_bytes = self.sizes.overlap_bytes(self.device)
        factors = measure_overlap(
            self.watch, lambda: torch.mm(a, a, out=out), curve.ms(flops), payload_bytes, group
        )
        return Overlap(*factors, self.source)

    def profile(self) -> ClusterProfile:
        reserve_bytes, memory_bytes = device_memory(self.device, self.reserve_bytes, self.per_node)
        reserve_bytes = int(self.watch.agree([reserve_bytes])[0])
        memory_bytes = -int(self.watch.agree([-memory_bytes])[0])  # the smallest
        name = device_name(self.device)
        return ClusterProfile(
            name=f"{self.num_nodes}x{self.per_node}x{name}",
            device=Device(name, self.device.type, memory_bytes),
            num_nodes=self.num_nodes,
            ranks_per_node=self.per_node,
            matmul=tuple(self.matmul),
            attention=tuple(self.attention),
            memory=Fact(self.memory, self.source),
            launch_overhead_ms=Fact(self.launch, self.source),
            collectives=tuple(self.collectives),
            overlap=self.overlap,
            reserve_bytes=Fact(reserve_bytes, self.source),
            node_overlap=self.node_overlap,
        )

    def same_everywhere(self, profile: ClusterProfile) -> ClusterProfile:
        """Rank 0's: times agree already, but dates and host names need not."""
        if self.watch.alone:
            return profile
        text = [dumps(profile)]
        dist.broadcast_object_list(text, 0)
        return loads(text[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
