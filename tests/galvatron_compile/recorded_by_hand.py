"""A recording of two stages with one micro-batch, written by hand."""

from __future__ import annotations

from dataclasses import replace

from galvatron_compile import notation, work_json
from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.recorded import Event, Recording
from galvatron_compile.recordings import Recordings
from galvatron_compile.strategy import Strategy
from galvatron_compile.work import LayerWork, Phase, SendWork, UnitWork, Work


def plan() -> Plan:
    names = ("first", "second")
    stages = (Stage(0, 1), Stage(1, 2))
    return Plan("", 2, 4, 1, names, (Strategy(),) * 2, stages, schedule="gpipe")


def pipeline(**changes: object) -> Recordings:
    first = (
        Event("forward", 0, 0, 1, 4, 110, 130),
        Event("send_activations", 0, 0, 4, 5, 110, 110),
        Event("receive_gradients", 0, 0, 5, 5.5, 120, 120),
        Event("wait_gradients", 0, 0, 13.5, 14, 120, 120),
        Event("backward", 0, 0, 14, 18, 105, 140),
        Event("reduce", 0, -1, 18, 18.25, 105, 105),
        Event("wait_reduce", 0, -1, 18.25, 18.5, 105, 105),
        Event("reduce_tied", 0, -1, 19, 20, 105, 110),
        Event("optimizer", -1, -1, 20, 21, 105, 110),
    )
    second = (
        Event("receive_activations", 1, 0, 0.5, 1, 90, 90),
        Event("wait_activations", 1, 0, 1, 6, 90, 90),
        Event("forward", 1, 0, 6, 7, 95, 100),
        Event("backward", 1, 0, 7, 9, 92, 105),
        Event("send_gradients", 1, 0, 9, 9.5, 92, 92),
        Event("reduce_tied", 1, -1, 10, 20, 92, 95),
    )
    ranks = (
        Recording(0, ("embedding",), first, 0, 22, 100),
        Recording(1, ("head", "embedding"), second, 0.25, 21.5, 80),
    )
    given = {
        "ranks": ranks, "pp": 2, "plan": notation.format(plan()), "model": "",
        "global_batch_size": 4, "hardware": "2 x nothing", "torch": "2.13", "warm_up": 2,
        "recorded_at": "2026-11-25 01:00 UTC", "has_one_clock": True, "all_step_ms": (22.0,),
    }  # fmt: skip
    return Recordings(**{**given, **changes})  # type: ignore[arg-type]


def predicted(**changes: object) -> Plan:
    """The same plan with what its actions are predicted to take, in round numbers."""
    outlines = tuple(
        Outline(
            ((group,),),
            {group: LayerOutline(name, tuple(range(1 + group)))},
            tuple(UnitOutline(unit, tied=unit == "embedding") for unit in units),
            num_micro_batches=1,
            schedule="gpipe",
            pp=2,
            group=group,
        )
        for group, (name, units) in enumerate(
            (("first", ("embedding",)), ("second", ("head", "embedding")))
        )
    )
    works = (
        Work(
            {0: LayerWork(Phase(2.0), Phase(4.0), saved_bytes=10, transient_bytes=20)},
            (UnitWork(reduce_ms=0.5, tied_ms=1.0, parameter_bytes=100),),
            (SendWork(activations_ms=1.0, activations_bytes=4),),
            optimizer_ms=1.0,
            reserve_bytes=7,
        ),
        Work(
            {1: LayerWork(Phase(1.0), Phase(2.0), saved_bytes=5, transient_bytes=9)},
            (UnitWork(parameter_bytes=40), UnitWork(tied_ms=1.0, parameter_bytes=40)),
            (SendWork(gradients_ms=1.0, gradients_bytes=4),),
            optimizer_ms=1.0,
            reserve_bytes=7,
        ),
    )
    given = {"step_ms": 12.0, work_json.KEY: work_json.dump(outlines, works)}
    return replace(plan(), predicted={**given, **changes})
