"""What lost, by how much, and why: runners-up, standard baselines, rejected families."""

from __future__ import annotations

from collections.abc import Sequence

from galvatron_compile.explain.parts import Column, Grid, Section, numbers
from galvatron_compile.prediction import Prediction, Rival
from galvatron_compile.quantities import percent


def sections(prediction: Prediction) -> tuple[Section, ...]:
    return (
        _rivals(
            "Runners-up",
            prediction.alternatives,
            prediction.step_ms,
            "The plan names no runners-up.",
        ),
        _rivals(
            "Standard baselines",
            prediction.baselines,
            prediction.step_ms,
            "The plan was not compared with standard baselines.",
        ),
        _rejected(prediction),
    )


def _rivals(title: str, rivals: Sequence[Rival], step_ms: float | None, missing: str) -> Section:
    if not rivals:
        return Section(title, missing)
    named = any(rival.name for rival in rivals)
    columns = [Column("name")] if named else []
    columns += [
        Column("plan", "code"),
        Column("step ms", "number"),
        Column("behind", "number"),
        Column("why", "prose"),
    ]
    rows = []
    for rival, time in zip(rivals, numbers([rival.step_ms for rival in rivals]), strict=True):
        cells = [rival.name or "–"] if named else []
        cells += [rival.notation or "–", time, _behind(rival, step_ms), rival.why or "–"]
        rows.append(tuple(cells))
    return Section(title, _lead(rivals, step_ms), tables=(Grid(tuple(columns), tuple(rows)),))


def _share(rival: Rival, step_ms: float | None) -> float | None:
    if rival.behind_percent is not None:
        return rival.behind_percent / 100
    if rival.step_ms is not None and step_ms:
        return rival.step_ms / step_ms - 1
    return None


def _behind(rival: Rival, step_ms: float | None) -> str:
    share = _share(rival, step_ms)
    return "–" if share is None else percent(share)


def _lead(rivals: Sequence[Rival], step_ms: float | None) -> str:
    shares = [share for rival in rivals if (share := _share(rival, step_ms)) is not None]
    unpriced = sum(_share(rival, step_ms) is None for rival in rivals)
    text = f"The nearest is {percent(min(shares))} slower." if shares else ""
    if unpriced:
        text += f" {unpriced} of them cannot run." if shares else "None of them can run."
    return text.strip()


def _rejected(prediction: Prediction) -> Section:
    title = "Rejected families"
    if not prediction.rejected:
        return Section(title, "The plan does not say which families of plans were rejected.")
    columns = (Column("family", "code"), Column("why it lost", "prose"))
    return Section(
        title,
        "Whole families of plans, and why each lost.",
        tables=(Grid(columns, prediction.rejected),),
    )
