"""Small groups, layers and pipelines for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from galvatron_compile.actions import Action, LayerOutline, Outline, UnitOutline
from galvatron_compile.passes.order import order
from galvatron_compile.simulation import Simulation
from galvatron_compile.simulator import simulate
from galvatron_compile.work import LayerWork, Phase, SendWork, UnitWork, Work


def alone(
    actions: Sequence[Action], layers: Sequence[LayerWork], unit: UnitWork, **work: float | bool
) -> Simulation:
    """One group, one micro-batch, one unit, which every layer uses; lists by hand."""
    numbers = range(len(layers))
    named = {i: LayerOutline(f"l{i}", (0,)) for i in numbers}
    outline = Outline((tuple(numbers),), named, (UnitOutline("a", zero=3),), 1)
    costs = Work(dict(enumerate(layers)), (unit,), **work)  # type: ignore[arg-type]
    return simulate([outline], [actions], [costs])


def layer(forward: float, inner: float = 0.0, backward: float = 0.0) -> LayerWork:
    return LayerWork(Phase(forward, inner), Phase(backward))


def pipeline(
    pp: int, m: int, schedule: str = "1f1b", virtual: int = 1, **changed: object
) -> tuple[list[Outline], list[Work]]:
    """A layer of 3 ms a stage (over all chunks), a third of it forward; thirds where split."""
    outlines, works = [], []
    for group in range(pp):
        stages = range(group, pp * virtual, pp)
        outlines.append(
            Outline(
                tuple((stage,) for stage in stages),
                {stage: LayerOutline(f"layer {stage}", (0,)) for stage in stages},
                (UnitOutline(f"of {group}", gathers=False),),
                m, schedule, pp, group,
            )
        )  # fmt: skip
        each = LayerWork(Phase(1 / virtual), Phase(2 / virtual))
        last = pp * virtual - 1
        sends = tuple(
            SendWork(0.25 * (s < last), 0.25 * (s > 0), 7 * (s < last), 5 * (s > 0))
            if changed.get("messages") else SendWork()
            for s in stages
        )  # fmt: skip
        works.append(Work({s: each for s in stages}, (UnitWork(reduce_ms=0.5),), sends, 1.5))
    return outlines, works


def run(outlines: Sequence[Outline], works: Sequence[Work]) -> Simulation:
    return simulate(outlines, [order(outline) for outline in outlines], works)
