"""Reports of :mod:`.report` for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from galvatron_compile.text import columns, mib, ms

MIB = 2**20
_MEMORY = {
    "layer_state_bytes": "layer states",
    "layer_activation_bytes": "layer activations",
    "end_state_bytes": "ends' states",
    "end_activation_bytes": "ends' activations",
    "tp_buffer_bytes": "tp buffer",
    "context_bytes": "context",
    "used_bytes": "counted",
}


def describe_plan(report: Mapping[str, Any]) -> str:
    """A plan's report: price, memory, alternatives."""
    parts = [describe_price(report)]
    if "alternatives" in report:
        parts.append(_alternatives(report["alternatives"], report["step_ms"]))
        parts.append(f"{_proof(report)}, found in {report['search_s']:.2f} s")
    if report.get("left_out"):
        parts.append("not measured, so left out:\n" + "\n".join(report["left_out"]))
    return "\n\n".join(parts)


def describe_price(report: Mapping[str, Any]) -> str:
    """Time by cause, and memory by stage against the limit."""
    lines = [report["source"], report["notation"], ""]
    lines += [f"{ms(report['step_ms'])} ms a step, {report['tokens_per_s']:,.0f} tokens/s"]
    mfu = report["mfu"]
    lines += [f"MFU {100 * mfu:.1f} % ({report['mfu_reason']})"] if mfu is not None else []
    return "\n".join([*lines, "", _parts(report), "", _memory(report)])


def _proof(report: Mapping[str, Any]) -> str:
    if report["proven_optimal"]:
        return "exact optimum of Galvatron's space by its formulas"
    gap = 100 * (report["step_ms"] / report["no_plan_below_ms"] - 1)
    return f"NOT PROVEN optimal: a faster plan may exist, by at most {gap:.2f} %"


def _parts(report: Mapping[str, Any]) -> str:
    step = report["step_ms"]
    parts = report["parts_ms"].items()
    rows = [[name, ms(part), f"{100 * part / step:.1f}"] for name, part in parts]
    return columns(["time by cause", "ms", "%"], rows)


def _memory(report: Mapping[str, Any]) -> str:
    limit = report["memory_limit_bytes"]
    header = ["memory (MiB)", *_MEMORY.values(), "limit", "fits"]
    rows = []
    for index, stage in enumerate(report["stages"]):
        fits = "yes" if stage["used_bytes"] <= limit else "NO"
        rows.append([f"stage {index}", *(mib(stage[key]) for key in _MEMORY), mib(limit), fits])
    note = f"limit: {mib(limit)} MiB of {mib(report['gpu_memory_bytes'])} MiB"
    return f"{columns(header, rows)}\n{note} (Galvatron keeps 20 % of GPUs above 20 GiB)"


def _alternatives(records: Sequence[Mapping[str, Any]], step_ms: float) -> str:
    rows = [["this plan", ms(step_ms), "", ""]]
    for record in records:
        if record["step_ms"] is None:
            rows.append([record["name"], "-", "-", record["why"]])
        else:
            behind = f"{record['behind_percent']:+.2f}"
            rows.append([record["name"], ms(record["step_ms"]), behind, record["why"]])
    table = columns(["alternatives", "ms", "%"], [row[:3] for row in rows]).split("\n")
    width = max(map(len, table))
    reasons = ["why", *(row[3] for row in rows)]
    lines = [f"{line.ljust(width)}  {why}" for line, why in zip(table, reasons, strict=True)]
    return "\n".join(line.rstrip() for line in lines)
