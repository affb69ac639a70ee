"""Where a step's time goes: one stacked bar and a table."""

from __future__ import annotations

from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Column, Grid, Section, numbers
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import CAUSES, Prediction, stage_noun
from galvatron_compile.quantities import duration, percent

TITLE = "Where the time goes"
COLOURS = {key: f"cause-{key.removesuffix('_ms').replace('_', '-')}" for key in CAUSES}
_HEIGHT = 46.0


def section(plan: Plan, prediction: Prediction) -> Section:
    causes = prediction.causes
    if not causes:
        return Section(TITLE, "The plan does not say what its step time is spent on.")
    total = sum(causes.values())
    parts, x = [], 0.0
    for key, time_ms in causes.items():
        width = svg.WIDTH * time_ms / total
        tip = f"{CAUSES[key]}: {duration(time_ms)} ({percent(time_ms / total)})"
        parts.append(svg.rect(x, 0, max(width - 1, 0.5), _HEIGHT, COLOURS[key], tip))
        label = percent(time_ms / total)
        if svg.fits(label, width):
            parts.append(
                svg.text(x + width / 2, _HEIGHT / 2, label, f"on-{COLOURS[key]}", "middle")
            )
        x += width
    times = numbers(list(causes.values()))
    rows = [
        (CAUSES[key], shown, percent(causes[key] / total))
        for key, shown in zip(causes, times, strict=True)
    ]
    rows.append(("the whole step", numbers([*causes.values(), total])[-1], percent(1)))
    columns = (Column("cause"), Column("ms", "number"), Column("share", "number"))
    swatches = (*(COLOURS[key] for key in causes), "")
    grid = Grid(columns, tuple(rows), swatches, emphasised=len(rows) - 1)
    return Section(
        TITLE, _lead(plan, prediction, total), svg.figure(_HEIGHT, parts, TITLE), tables=(grid,)
    )


def _lead(plan: Plan, prediction: Prediction, total: float) -> str:
    causes = prediction.causes
    communication = sum(time for key, time in causes.items() if "_comm_" in key)
    parts = [f"{percent(causes.get('compute_ms', 0.0) / total)} of the step is computation"]
    parts.append(f"{percent(communication / total)} is communication that nothing hides")
    if causes.get("bubble_ms"):
        parts.append(f"{percent(causes['bubble_ms'] / total)} is waiting in the pipeline")
    whose = f" These are the slowest {stage_noun(plan)}'s." if plan.pp > 1 else ""
    joined = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{joined}.{whose}"
