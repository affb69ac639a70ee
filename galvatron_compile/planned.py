"""What a search over pipelines found: the plan, what came next, and why the rest lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galvatron_compile import notation
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import CAUSES
from galvatron_compile.text import columns

GIB = 2**30

@dataclass(frozen=True)
class Alternative:
    """A plan that was not chosen. name: of a standard baseline. why: what it loses by."""

    plan: Plan
    why: str
    name: str = ""

    def behind_percent(self, best: Plan) -> float:
        """By simulation where both were simulated, which is what plans are ranked by."""
        both = all("simulated_ms" in plan.predicted for plan in (self.plan, best))
        key = "simulated_ms" if both else "step_ms"
        return 100 * (float(self.plan.predicted[key]) / float(best.predicted[key]) - 1)


@dataclass(frozen=True)
class Planned:
    """plan: the best of the few that the closed form is best for, or of the baselines, in
    simulation, ``predicted`` filled in. alternatives: the next best pipelines, each with
    its own optimal strategies. baselines: what people use, under the same model; plan None and
    ``why`` where none fits. rejected: (family, why). search_s: CPU seconds of the search alone;
    costs_s: of capturing and pricing."""

    plan: Plan
    memory_limit_bytes: int
    alternatives: tuple[Alternative, ...]
    baselines: tuple[Alternative, ...]
    unfit_baselines: tuple[tuple[str, str], ...]
    rejected: tuple[tuple[str, str], ...]
    constraints: str
    search_s: float
    costs_s: float
    certificate: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        predicted = self.plan.predicted
        return {
            "step_ms": predicted["step_ms"],
            "tokens_per_s": predicted["tokens_per_s"],
            "samples_per_s": predicted["samples_per_s"],
            "mfu": predicted["mfu"],
            "peak_memory_bytes": [group["memory_bytes"] for group in predicted["groups"]],
            "memory_limit_bytes": self.memory_limit_bytes,
            "bound_by": predicted["bound_by"],
            "causes": predicted["causes"],
            "search_s": self.search_s,
            "costs_s": self.costs_s,
            "constraints": self.constraints,
            "certificate": self.certificate,
            "warnings": predicted["warnings"],
            "notation": notation.format(self.plan),
            "alternatives": predicted["alternatives"],
            "baselines": predicted["baselines"],
            "rejected": predicted["rejected"],
            "plan": json.loads(self.plan.to_json()),
        }

    def __str__(self) -> str:
        parts = [describe(self.plan), self._others()]
        if ranking := self.plan.predicted.get("ranking"):
            parts.append(ranking)
        if self.rejected:
            lines = [f"  {family}: {why}" for family, why in self.rejected]
            parts.append("why other families lost\n" + "\n".join(lines))
        if self.constraints:
            parts.append(f"constraints honoured: {self.constraints}")
        if self.certificate:
            parts.append(self.certificate)
        parts.append(
            f"notation: {notation.format(self.plan)}\n"
            f"searched in {self.search_s:.2f} CPU-s, costs in {self.costs_s:.1f} CPU-s"
        )
        return "\n\n".join(parts)

    def _others(self) -> str:
        """The best plan, the next pipelines and the baselines, in one table."""
        best_row = ["1", "best plan", _step(self.plan), _simulated(self.plan), ""]
        rows = [[*best_row, notation.format(self.plan)]]
        for rank, other in enumerate(self.alternatives, 2):
            behind = f"{other.behind_percent(self.plan):+.1f} %"
            numbers = [_step(other.plan), _simulated(other.plan), behind]
            rows.append([str(rank), "", *numbers, _short(other)])
        for other in self.baselines:
            behind = f"{other.behind_percent(self.plan):+.1f} %"
            numbers = [_step(other.plan), _simulated(other.plan), behind]
            rows.append(["", other.name, *numbers, _short(other)])
        for name, why in self.unfit_baselines:
            rows.append(["", name, "-", "-", "", why])
        head = [["", "", "step ms", "simulated", "behind", "plan"]]
        table = columns(head[0][:-1], [row[:-1] for row in rows], left=2).split("\n")
        width = max(map(len, table))
        prose = [head[0][-1], *(row[-1] for row in rows)]
        return "\n".join(
            f"{line.ljust(width)}  {text}".rstrip()
            for line, text in zip(table, prose, strict=True)
        )


def describe(plan: Plan) -> str:
    """A priced plan: warnings, what runs and how fast, memory by stage, time by cause."""
    predicted = plan.predicted
    parts = [f"WARNING: {text}" for text in predicted["warnings"]]
    parts += [headline(plan), _memory_table(predicted), _causes_table(predicted)]
    limit = predicted["memory_limit_bytes"]
    over = predicted["memory_bytes"] - limit
    if over > 0:
        parts.append(f"DOES NOT FIT: {over / GIB:.2f} GiB over the limit of {limit / GIB:.1f} GiB")
    return "\n\n".join([*parts, f"bound by {predicted['bound_by']}"])


def headline(plan: Plan) -> str:
    """Two or three lines: what runs, how fast, in how much memory."""
    predicted = plan.predicted
    mfu = f", MFU {100 * predicted['mfu']:.1f} %" if predicted.get("mfu") is not None else ""
    limit = predicted.get("memory_limit_bytes")
    of = f" of {limit / GIB:.1f}" if limit else ""
    return (
        f"{predicted.get('model_name', 'model')} on {predicted.get('hardware', 'the cluster')}\n"
        f"{predicted['step_ms']:,.1f} ms a step, {predicted['tokens_per_s']:,.0f} tokens/s{mfu}, "
        f"{predicted['memory_bytes'] / GIB:.1f}{of} GiB a rank\n\n{plan_lines(plan)}"
    )


def plan_lines(plan: Plan) -> str:
    """The plan's table without its numbers, which other tables show by group and cause."""
    bare = Plan(
        plan.model, plan.world_size, plan.global_batch_size, plan.num_micro_batches, plan.layers,
        plan.strategies, plan.stages, plan.schedule, plan.virtual, {}, plan.classes,
    )  # fmt: skip
    return str(bare)


def _memory_table(predicted: Mapping[str, Any]) -> str:
    header = ["stage", "layers", "parameters", "gradients", "optimizer", "activations"]
    header += ["transient", "reserve", "GiB", "in flight", "ms"]
    rows = []
    keys = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes")
    for number, group in enumerate(predicted["groups"]):
        sizes = [*keys, "transient_bytes", "reserve_bytes", "memory_bytes"]
        flights = ",".join(map(str, group["in_flight"]))
        cells = [f"{group[key] / GIB:.2f}" for key in sizes]
        time = f"{group['total_ms']:,.1f}"
        rows.append([str(number), group["layers"], *cells, flights, time])
    return columns(header, rows, left=2)


def _causes_table(predicted: Mapping[str, Any]) -> str:
    step_ms = predicted["step_ms"]
    rows = [
        [CAUSES[key], f"{value:,.2f}", f"{100 * value / step_ms:.1f} %"]
        for key, value in predicted["causes"].items()
        if value >= 5e-3
    ]
    return columns(["time of the slowest stage by cause", "ms", "share"], rows)


def _step(plan: Plan) -> str:
    return f"{plan.predicted['step_ms']:,.1f}"


def _simulated(plan: Plan) -> str:
    """Action by action, where the closed form that is searched and this may differ by a few %."""
    simulated_ms = plan.predicted.get("simulated_ms")
    return "" if simulated_ms is None else f"{simulated_ms:,.1f}"


def _short(other: Alternative) -> str:
    text = notation.format(other.plan)
    return f"{text}: {other.why}" if other.why else text


def biggest_difference(plan: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """What a plan loses by: the cause that grew most over the best plan's."""
    ours, theirs = plan["causes"], best["causes"]
    grown = {key: ours[key] - theirs.get(key, 0.0) for key in ours}
    key = max(grown, key=lambda name: grown[name])
    return f"{CAUSES[key]} {grown[key]:+,.1f} ms"
