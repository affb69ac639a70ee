"""ClusterProfile for people: as rows (for any table writer) and as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.curves import KINDS, RateCurve, bus_factor
from galvatron_compile.facts import Overlap

MIB = 1024**2
GIB = 1024**3
_SHOWN_PAYLOADS = (64 * 1024, MIB, 16 * MIB, 256 * MIB)


@dataclass(frozen=True)
class Section:
    """One table: a title, column heads and rows of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


WARNING = (
    "NOT MEASURED: these are defaults from data sheets and assumptions. "
    "Run galvatron-compile profile on the machines that will train."
)


def warning(profile: ClusterProfile) -> str:
    """What to say above the numbers; empty where every one was measured."""
    defaults = [n for n, source in profile.sources().items() if not source.startswith("measured")]
    if not defaults:
        return ""
    if len(defaults) == len(profile.sources()):
        return WARNING
    return f"PARTLY NOT MEASURED ({', '.join(defaults)} are defaults). {WARNING[14:]}"


def headline(profile: ClusterProfile) -> str:
    device, within = profile.device, profile.node_overlap
    return (
        f"{profile.name}: {profile.num_nodes} node(s) x {profile.ranks_per_node} rank(s), each "
        f"{device.name} with {device.memory_bytes / GIB:.1f} GiB "
        f"({profile.reserve_bytes.value / GIB:.2f} reserved); memory "
        f"{profile.memory.value / 1e9:,.1f} GB/s; {1e3 * profile.launch_overhead_ms.value:.1f} us "
        f"an operator; overlap costs {_overlap(profile.overlap)}"
        + (f", within a node {_overlap(within)}" if within is not None else "")
    )


def _overlap(found: Overlap) -> str:
    return (
        f"{found.joint:.2f} (computation x{found.compute:.2f}, "
        f"communication x{found.communication:.2f})"
    )


def sections(profile: ClusterProfile) -> tuple[Section, ...]:
    """Computation, then collectives; each cell is what the profile answers, not a raw point."""
    found = [
        _rates("Matrix products (TFLOP/s)", "n x n x n", profile.matmul),
        _rates("Attention (TFLOP/s)", "GFLOP", profile.attention),
        _collectives(profile),
    ]
    return tuple(section for section in found if section.rows)


def sources(profile: ClusterProfile) -> Section:
    """Each source once, with what it vouches for."""
    by_source: dict[str, list[str]] = {}
    for name, source in profile.sources().items():
        by_source.setdefault(source, []).append(name)
    rows = tuple((_short(names), source) for source, names in by_source.items())
    return Section("Sources", ("numbers", "source"), rows)


def describe(profile: ClusterProfile) -> str:
    """The whole profile as plain text."""
    parts = [text for text in (warning(profile), headline(profile)) if text]
    parts += [_aligned(section) for section in sections(profile)]
    source_rows = [f"  {names}: {source}" for names, source in sources(profile).rows]
    return "\n".join([*parts, "Sources", *source_rows])


def _rates(title: str, size_name: str, curves: Sequence[RateCurve]) -> Section:
    sizes = sorted({flops for curve in curves for flops, _ in curve.points})
    rows = []
    for flops in sizes:
        side = round((flops / 2) ** (1 / 3))
        label = f"{side}" if size_name != "GFLOP" else f"{flops / 1e9:.3g}"
        cells = [_rate_cell(curve, flops) for curve in curves]
        rows.append((label, *cells))
    return Section(title, (size_name, *(curve.dtype for curve in curves)), tuple(rows))


def _rate_cell(curve: RateCurve, flops: float) -> str:
    if not curve.points[0][0] <= flops <= curve.points[-1][0]:
        return "-"  # not measured here: do not show a rate that was only carried over
    return f"{curve.rate_flops_per_s(flops) / 1e12:.3g}"


def _collectives(profile: ClusterProfile) -> Section:
    curves = sorted(
        profile.collectives, key=lambda c: (KINDS.index(c.kind), c.tier != "node", c.num_ranks)
    )
    rows = []
    for curve in curves:
        times = [f"{curve.ms(payload):.3g}" for payload in _SHOWN_PAYLOADS]
        bus = curve.bytes_per_s * bus_factor(curve.kind, curve.num_ranks) / 1e9
        ends = (f"{1e3 * curve.latency_ms:.0f}", f"{bus:.3g}")
        rows.append((curve.kind, curve.tier, str(curve.num_ranks), *times, *ends))
    heads = ("64 KiB", "1 MiB", "16 MiB", "256 MiB")
    columns = ("collective", "tier", "ranks", *heads, "latency us", "bus GB/s")
    return Section("Collectives (ms by payload)", columns, tuple(rows))


def _aligned(section: Section) -> str:
    table = (section.columns, *section.rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(section.columns))]
    lines = ["  " + "  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in table]
    return "\n".join([section.title, *lines])


def _short(names: Sequence[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]} … {names[-1]} ({len(names)} tables)"
