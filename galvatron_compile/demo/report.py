"""What the demo leaves behind: a summary for programs, a picture and a table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from galvatron_compile.plans import Plan

MIB = 1 << 20


@dataclass(frozen=True)
class Timed:
    """A plan for all layers alike, and its step time: as predicted, and as measured if it was."""

    name: str
    predicted_step_ms: float
    measured_step_ms: float | None


@dataclass(frozen=True)
class Summary:
    """The result of a demo run; memory is of the rank that holds most."""

    losses: Sequence[float]
    predicted_step_ms: float
    measured_step_ms: float
    predicted_memory_bytes: int
    measured_memory_bytes: int
    max_rel_loss_error: float
    max_rel_grad_error: float
    alternatives: tuple[Timed, ...] = ()
    name: str = ""  # the chosen plan in the compact notation

    def save(self, path: Path, plan: Plan) -> None:
        """Write JSON: these fields, and ``plan`` in the schema of saved plans."""
        document: dict[str, Any] = {"plan": json.loads(plan.to_json()), **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    def table(self) -> Table:
        table = Table(title="Predicted against measured", title_justify="left")
        for heading in ("", "predicted", "measured", "predicted / measured"):
            table.add_column(heading, justify="left" if not heading else "right")
        rows = [
            (f"step time, ms: {self.name}", self.predicted_step_ms, self.measured_step_ms),
            (
                "memory of a rank, MiB",
                self.predicted_memory_bytes / MIB,
                self.measured_memory_bytes / MIB,
            ),
        ]
        rows += [
            (f"step time, ms: {timed.name}", timed.predicted_step_ms, timed.measured_step_ms)
            for timed in self.alternatives
            if timed.measured_step_ms is not None
        ]
        for name, predicted, measured in rows:
            ratio = f"{predicted / measured:.2f}"
            table.add_row(name, f"{predicted:.1f}", f"{measured:.1f}", ratio)
        return table


def draw(summary: Summary, path: Path) -> None:
    """The loss over the steps, and predicted against measured step time of every plan tried."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(summary.losses) + 1), summary.losses, color="#1f6fb4", linewidth=1.2)
    left.set(xlabel="step", ylabel="loss, nats per byte", title="Small Llama, stdlib sources")
    left.grid(alpha=0.3)

    chosen = Timed(f"chosen: {summary.name}", summary.predicted_step_ms, summary.measured_step_ms)
    plans = [chosen, *(p for p in summary.alternatives if p.measured_step_ms is not None)]
    places = range(len(plans))
    predicted = [plan.predicted_step_ms for plan in plans]
    measured = [plan.measured_step_ms or 0.0 for plan in plans]
    height = 0.38
    for offset, values, label, color in (
        (-height / 2, predicted, "predicted", "#9dc3e6"),
        (height / 2, measured, "measured", "#1f6fb4"),
    ):
        bars = right.barh([p + offset for p in places], values, height, label=label, color=color)
        right.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    right.set_yticks(list(places), [plan.name for plan in plans])
    right.invert_yaxis()
    right.margins(x=0.12)
    right.set(xlabel="ms per step", title="Step time")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
