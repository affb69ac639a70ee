"""The cluster of a measured run: our preset of its GPU, with what the row says of the part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.curves import CollectiveCurve, Points, RateCurve, rising
from galvatron_compile.errors import PlanError
from galvatron_compile.facts import Fact
from galvatron_compile.presets import GPUS
from galvatron_compile.validation.run import Run

GB = 1e9
MIB = 1024**2
TDP_W = {"A100-40GB": 400, "A100-80GB": 400, "H100": 700, "H200": 700, "B200": 1000,
         "L4": 72, "L40S": 350, "A10": 150}  # fmt: skip
"""Thermal design power of the presets' parts, from the data sheets that presets.py cites."""

HBM2E_BYTES_PER_S = {"H100": 2400 * GB}
"""torchtitan's docs/performance.md: H100 with 96 GB of HBM2e, 2.4 TB/s peak, limited to 500 W."""

TABLE_DIR = "allreduce_a100_one_node"
_SHOWN_MIB = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Hardware:
    """Clusters by run. all_reduce: times in one node of A100s by number of ranks, if known."""

    all_reduce: Mapping[int, Points]

    @staticmethod
    def beside(table: Path | None) -> Hardware:
        """With the published all-reduce times, if their folder lies beside the table of runs."""
        folder = None if table is None else table.parent / TABLE_DIR
        if folder is None or not folder.is_dir():
            return Hardware({})
        return Hardware({ranks: _points(file) for ranks, file in _files(folder).items()})

    def cluster(self, run: Run, profile: Path | None = None) -> ClusterProfile:
        """``profile``: a measured one, used as it is. PlanError if it has too few ranks."""
        if profile is not None:
            measured = ClusterProfile.load(profile)
            if measured.world_size < run.num_gpus:
                run.fail(
                    f"the profile {profile} describes {measured.world_size} ranks, fewer than the "
                    f"{run.num_gpus} GPUs of the run; profile as many, or leave it out"
                )
            return measured
        cluster = _part(ClusterProfile.preset(run.cluster), run)
        if run.preset.startswith("A100") and self.all_reduce:
            cluster = self._with_measured_all_reduce(cluster)
        return cluster

    def _with_measured_all_reduce(self, cluster: ClusterProfile) -> ClusterProfile:
        source = f"default: published nccl-tests in one node of 8 A100s ({TABLE_DIR})"
        curves = tuple(
            CollectiveCurve("all_reduce", "node", ranks, points, source)
            for ranks, points in self.all_reduce.items()
            if ranks <= cluster.ranks_per_node
        )
        others = tuple(
            curve
            for curve in cluster.collectives
            if (curve.kind, curve.tier) != ("all_reduce", "node") or curve.num_ranks > 8
        )
        return replace(cluster, collectives=(*others, *curves))


def _part(cluster: ClusterProfile, run: Run) -> ClusterProfile:
    """Memory and power limit as the GPU's name tells them, the preset's where it does not.

    Products and attention at full rate are limited by power already (795 of 989 TFLOP/s reached at
    700 W, see presets), so with less power their rate falls in proportion: near its least voltage a
    chip saves power by its clock alone. An H100 held at 600 of 700 W loses 10 to 15 % of a training
    step (factryze.ai/scale-atlas/power/power-capping), which says the same. An assumption still,
    and made when errors of rows with such a part had been seen (bench/LOG.md).
    """
    name = run.gpu.upper()
    watts = re.search(r"(\d+)W\b", name)
    gigabytes = re.search(r"(\d+)GB", name)
    if "HBM2E" in name and run.preset in HBM2E_BYTES_PER_S:
        share = HBM2E_BYTES_PER_S[run.preset] / GPUS[run.preset].memory_bytes_per_s
        source = f"{cluster.memory.source}; HBM2e: {HBM2E_BYTES_PER_S[run.preset] / GB:.0f} GB/s"
        cluster = replace(cluster, memory=Fact(cluster.memory.value * share, source))
    if gigabytes is not None:
        device = replace(cluster.device, memory_bytes=int(gigabytes[1]) * 1024**3)
        cluster = replace(cluster, device=device)
    if watts is not None and int(watts[1]) < TDP_W[run.preset]:
        clock = int(watts[1]) / TDP_W[run.preset]
        cluster = replace(
            cluster,
            matmul=tuple(_slower(curve, clock) for curve in cluster.matmul),
            attention=tuple(_slower(curve, clock) for curve in cluster.attention),
        )
    return cluster


def _slower(curve: RateCurve, clock: float) -> RateCurve:
    points = tuple((flops, rate * clock) for flops, rate in curve.points)
    return RateCurve(curve.dtype, points, f"{curve.source}; x {clock:.3f} at the power limit")


def _files(folder: Path) -> dict[int, Path]:
    found = {}
    for file in sorted(folder.iterdir()):
        named = re.fullmatch(r"AR_GPU(\d+)_.*", file.name)
        if named is not None:
            found[int(named[1])] = file
    return found


def _points(file: Path) -> Points:
    """Bytes and ms of nccl-tests' out-of-place runs, thinned; PlanError for another format."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    try:
        cells = [line.split(",") for line in lines if line]
        times = {int(cell[0]): float(cell[3]) / 1e6 for cell in cells}
    except (ValueError, IndexError) as error:
        raise PlanError(
            f"{file}: {error}; lines must read bytes,count,type,ns,GB/s,ns,GB/s"
        ) from error
    points = [(float(mib * MIB), times[mib * MIB]) for mib in _SHOWN_MIB if mib * MIB in times]
    return rising(points)
