"""What Galvatron measured of a machine as a :class:`ClusterProfile`.

The format holds times of collectives, p2p bandwidths and a slowdown under overlap; from its layer
times follows one rate of matrix products. It holds neither the GPU nor its memory, memory
bandwidth, launch overhead and attention rate, nor broadcast: those come from a preset, and every
source says which is which.
"""

from __future__ import annotations

from dataclasses import replace

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.curves import CollectiveCurve, Points, RateCurve, bus_factor, rising
from galvatron_compile.facts import Overlap
from galvatron_compile.galvatron.formulas import MB
from galvatron_compile.galvatron.profile import Exchange, GalvatronProfile
from galvatron_compile.presets import preset

DEFAULT_GPU = "A100-80GB"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_SIZES_MB = (1.0, 1024.0)  # two points make a line of one bandwidth


def to_cluster(profile: GalvatronProfile, gpu: str = DEFAULT_GPU) -> ClusterProfile:
    """The machine of ``profile``; what it does not hold is that of the preset ``gpu``.

    Groups of a size are consecutive ranks in the times and strided ones in the bandwidths, which
    alone tell how groups that span nodes fare.
    """
    base = preset(f"{profile.num_nodes}x{profile.gpus_per_node}x{gpu}")
    measured = [*_exchanges(profile), *_strided(profile), *_p2p(profile)]
    known = {(curve.kind, curve.tier, curve.num_ranks) for curve in measured}
    # A preset curve between measured sizes would mix sources within one interpolation.
    kinds = {(kind, tier) for kind, tier, _ in known}
    kept = [curve for curve in base.collectives if (curve.kind, curve.tier) not in kinds]
    return replace(
        base,
        name=f"{profile.num_nodes}x{profile.gpus_per_node} GPUs measured by Galvatron",
        device=replace(base.device, name=f"GPU of unknown kind, taken for {base.device.name}"),
        matmul=_matmul(profile, base),
        collectives=tuple([*measured, *kept]),
        overlap=Overlap(
            profile.overlap, profile.overlap, profile.overlap, _source(profile, "overlap")
        ),
    )


def _source(profile: GalvatronProfile, part: str, note: str = "") -> str:
    return f"measured by Galvatron, {profile.files[part]}" + (f" ({note})" if note else "")


def _tier(profile: GalvatronProfile, num_ranks: int) -> str:
    return "node" if num_ranks <= profile.gpus_per_node else "cluster"


def _exchanges(profile: GalvatronProfile) -> list[CollectiveCurve]:
    source = _source(profile, "times")
    half = _source(profile, "times", "half the time of an all-reduce, Galvatron's convention")
    found = []
    for size, times in sorted(profile.all_reduce.items()):
        tier = _tier(profile, size)
        found.append(CollectiveCurve("all_reduce", tier, size, _points(times), source))
        for kind in ("all_gather", "reduce_scatter"):
            points = tuple((payload, ms / 2) for payload, ms in _points(times))
            found.append(CollectiveCurve(kind, tier, size, points, half))
    for size, times in sorted(profile.all_to_all.items()):
        tier = _tier(profile, size)
        found.append(CollectiveCurve("all_to_all", tier, size, _points(times), source))
    return found


def _points(times: Exchange) -> Points:
    return rising([(mb * MB, ms) for mb, ms in sorted(times.ms_by_mb.items())])


def _strided(profile: GalvatronProfile) -> list[CollectiveCurve]:
    """Groups over nodes of a size that also fits a node: strided ranks, as data parallelism has."""
    if profile.num_nodes == 1:
        return []
    source = _source(profile, "bandwidth", "one bandwidth for all sizes")
    found = []
    for (size, consecutive), mb_per_ms in sorted(profile.bandwidth.items()):
        if consecutive or size > profile.gpus_per_node:
            continue
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            factor = bus_factor(kind, size)
            points = tuple((mb * MB, factor * mb / mb_per_ms) for mb in _SIZES_MB)
            found.append(CollectiveCurve(kind, "cluster", size, points, source))
    return found


def _p2p(profile: GalvatronProfile) -> list[CollectiveCurve]:
    """One node: stages of two are half a node apart. Several: two stages lie on different nodes."""
    if 2 not in profile.p2p:
        return []
    tier = "node" if profile.num_nodes == 1 else "cluster"
    points = tuple((mb * MB, mb / profile.p2p[2]) for mb in _SIZES_MB)
    source = _source(profile, "p2p", "one bandwidth for all sizes")
    return [CollectiveCurve("p2p", tier, 2, points, source)]


def _matmul(profile: GalvatronProfile, base: ClusterProfile) -> tuple[RateCurve, ...]:
    """The preset's rates, and that of whole layers in the profile's precision.

    Forward FLOPs of a layer: 2 a parameter and token (4 bytes a parameter in parameter_mb);
    attention's are left out, so the rate is a low one.
    """
    length, model = min(profile.models.items())
    flops = 2 * (model.parameter_mb * MB / 4) * length
    rate = 1e3 * flops / model.layer_ms.slope
    source = _source(profile, "computation", "2 FLOPs a parameter and token over layer time")
    dtype = _DTYPES[profile.precision]
    others = tuple(curve for curve in base.matmul if curve.dtype != dtype)
    return (RateCurve(dtype, ((flops, rate),), source), *others)
