"""The page: a headline and sections, put into page.html with page.css inside.

One file without scripts, fonts or pictures from elsewhere, so that it opens from disk, prints, and
can be mailed. What a plan does not say, its section says is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import galvatron_compile
from galvatron_compile import notation
from galvatron_compile.explain import layers, memory, pipeline, rivals, step_time, tradeoff
from galvatron_compile.explain import trace as trace_sections
from galvatron_compile.explain.parts import Section
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import Prediction, schedule_name
from galvatron_compile.quantities import count, duration, percent, size
from galvatron_compile.trace import Trace

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """A headline number. share: how much of a bar under it is filled, if it has one."""

    name: str
    value: str
    detail: str = ""
    share: float | None = None


def page(plan: Plan, trace: Trace | None = None) -> str:
    """A plan as one self-contained HTML page; with a trace, what was measured beside it."""
    import jinja2  # here: a planner that draws nothing need not pay for it
    from markupsafe import Markup

    prediction = Prediction.of(plan)
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup  # figures escape their own texts
    return environment.get_template("page.html").render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        title=prediction.model_name or f"Plan for {count(plan.world_size, 'rank')}",
        summary=_summary(plan, prediction),
        warnings=prediction.warnings,
        figures=_figures(plan, prediction) + _measured(trace),
        bound_by=prediction.bound_by,
        hardware=prediction.hardware,
        sections=_sections(plan, prediction, trace),
        notation=notation.format(plan),
        sources=prediction.sources,
        version=galvatron_compile.__version__,
        fingerprint=plan.model,
    )


def _sections(plan: Plan, prediction: Prediction, trace: Trace | None) -> tuple[Section, ...]:
    return (
        *(trace_sections.sections(trace) if trace is not None else ()),
        step_time.section(plan, prediction),
        memory.section(plan, prediction),
        layers.section(plan, prediction),
        pipeline.section(plan, prediction),
        tradeoff.section(plan, prediction),
        *rivals.sections(prediction),
    )


def _summary(plan: Plan, prediction: Prediction) -> str:
    """What the plan is, in one sentence of parts."""
    parts = [count(plan.world_size, "rank")]
    if plan.pp > 1:
        each = count(plan.world_size // plan.pp, "rank")
        parts.append(f"pipeline of {plan.pp} groups with {each} each")
        virtual = f", {plan.virtual} stages a group" if plan.virtual > 1 else ""
        parts.append(f"{schedule_name(plan)} schedule{virtual}")
    batch = f"global batch {count(plan.global_batch_size)}"
    if prediction.seq:
        batch += f" × {count(prediction.seq)} tokens"
    parts.append(batch)
    parts.append(count(plan.num_micro_batches, "micro-batch", "micro-batches"))
    parts.append(count(len(plan.layers), "layer"))
    return " · ".join(parts)


def _measured(trace: Trace | None) -> list[Figure]:
    """The headline's numbers of a real step."""
    if trace is None:
        return []
    row = trace.rows[0]
    peaks = [peak.measured for peak in trace.peaks if peak.measured is not None]
    beside = f"{row.ratio:.2f} of the simulated step" if row.ratio is not None else "no prediction"
    figures = [Figure("measured step", duration(trace.recordings.step_ms), beside)]
    if peaks:
        figures.append(Figure("measured peak of a rank", size(max(peaks)), "of tensors alone"))
    return figures


def _figures(plan: Plan, prediction: Prediction) -> list[Figure]:
    """The headline's numbers; empty where the plan predicts nothing."""
    figures = []
    if prediction.step_ms is not None:
        samples = 1e3 * plan.global_batch_size / prediction.step_ms if prediction.step_ms else 0
        figures.append(
            Figure("step time", duration(prediction.step_ms), f"{count(samples)} samples/s")
        )
    tokens = prediction.tokens_per_s
    if tokens is not None:
        each = count(tokens / plan.world_size)
        figures.append(Figure("tokens/s", count(round(tokens)), f"{each} a rank"))
    if prediction.mfu is not None:
        basis = prediction.mfu_basis or "model FLOP/s of the peak"
        figures.append(Figure("MFU", percent(prediction.mfu), basis, prediction.mfu))
    memory, limit = prediction.memory_bytes, prediction.memory_limit_bytes
    if memory is not None:
        of_limit = f"of {size(limit)} ({percent(memory / limit)})" if limit else "no limit is named"
        share = memory / limit if limit else None
        figures.append(Figure("peak memory of a rank", size(memory), of_limit, share))
    return figures
