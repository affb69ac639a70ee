"""A recording of two stages with one micro-batch, written by hand."""

from __future__ import annotations

from galvatron_compile import notation
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.recorded import Event, Recording
from galvatron_compile.recordings import Recordings
from galvatron_compile.strategy import Strategy


def plan() -> Plan:
    names = ("first", "second")
    return Plan("", 2, 4, 1, names, (Strategy(),) * 2, (Stage(0, 1), Stage(1, 2)))


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
