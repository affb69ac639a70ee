"""torch.distributed.pipelining runs our stage graphs: the same loss, the same gradients.

Its schedules are its own, and it knows nothing of our lists of actions, pieces, traces or links: it
runs the rewritten graph of a whole stage under eager autograd. Our executor has to agree with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "galvatron_compile")]
MICRO = 4
# The library's schedule, ours, and how many stages each rank runs.
SCHEDULES = [
    ("GPipe", "gpipe", 1),
    ("1F1B", "1f1b", 1),
    ("Interleaved1F1B", "interleaved", 2),
    ("InterleavedZeroBubble", "interleaved", 2),
    ("InterleavedZeroBubble", "zero-bubble", 1),
]


class Stage(nn.Module):
    """One stage's graph as the library wants it: received values by place, the batch by name.

    Its parameters are the working tensors themselves, so that gradients arrive in them.
    """

    def __init__(self, graph: Any, program: Any, denominators: list[Tensor]) -> None:
        super().__init__()
        self.graph, self.denominators = graph, denominators
        self.is_first = graph.index == 0
        called = {
            str(n.target) for n in graph.module.graph.nodes if str(n.target).startswith("units.")
        }
        units = [program.units[int(name.split(".")[1])] for name in sorted(called)]
        self.weights = nn.ParameterList([w for unit in units for w in unit.working])

    def forward(self, *received: Tensor, **leaves: Tensor) -> Any:
        values = () if self.is_first else received
        names = [n.name for n in self.graph.module.graph.find_nodes(op="placeholder")]
        given = [leaves[name] for name in names if name in leaves]
        found = self.graph.module(*given, *self.denominators, *values, 0)
        return found[0] if len(found) == 1 else found


def meta(crossings: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(c.shape, dtype=c.dtype, device="meta", requires_grad=c.differentiable)
        for c in crossings
    )


def by_the_library(program: Any, batch: dict[str, Tensor], schedule: str) -> Any:
    """Sum of the losses on the last rank, and the gradients of this rank by name."""
    from torch.distributed.pipelining import PipelineStage, schedules

    for unit in program.units:
        unit.working = [nn.Parameter(value.data) for value in unit.working]
    leaves = [batch[name] for name in program.inputs.names]
    denominators = list(program.denominators(*leaves)) if program.denominators else []
    last = program.plan.num_stages - 1
    rows = len(leaves[0]) // MICRO
    first_input = torch.empty((rows, *leaves[0].shape[1:]), dtype=leaves[0].dtype, device="meta")
    stages = [
        PipelineStage(
            Stage(graph, program, denominators),
            graph.index,
            last + 1,
            torch.device("cpu"),
            input_args=meta(graph.received) if graph.index else (first_input,),
            output_args=meta(graph.sent)
            if graph.index < last
            else torch.empty((), dtype=program.loss_dtype, device="meta", requires_grad=True),
        )
        for graph in program.stages
    ]
    multi = issubclass(schedules.get_schedule_class(schedule), schedules.PipelineScheduleMulti)
    made = schedules.get_schedule_class(schedule)(
        stages if multi else stages[0],
        MICRO,
        loss_fn=lambda output, target: output,
        scale_grads=False,
    )
    named = {name: leaf for name, leaf in batch.items() if isinstance(leaf, Tensor)}
    losses: list[Tensor] = []
    first = (leaves[0],) if program.stages[0].index == 0 else ()
    target = torch.zeros(MICRO) if program.stages[-1].index == last else None
    made.step(*first, target=target, losses=losses, return_outputs=False, **named)
    gradients = {
        layout.name: value.grad
        for unit in program.units
        for layout, value in zip(unit.layouts, unit.working, strict=True)
        if value.grad is not None
    }
    return sum(float(loss.detach()) for loss in losses), gradients


def on_ranks(folders: list[str], model: str) -> list[dict[str, Any]]:
    for folder in folders:
        if folder not in sys.path:
            sys.path.insert(0, folder)
    import models
    import pipeline_cases

    case = models.make(model)
    with models.Promote():
        captured = pipeline_cases.Captured(case.model, case.batch)
    found = []
    four = f"stages=1,2,1,{len(captured.names) - 4}; virtual=2; schedule=interleaved"
    for theirs, ours, virtual in SCHEDULES:
        text = f"dp1; micro={MICRO}; " + (four if virtual == 2 else f"pp=2; schedule={ours}")
        many = f"dp1; micro={MICRO}; {four}" if "Interleaved" in theirs else text
        library = captured.lowered(many, eager=True).program
        loss, gradients = by_the_library(library, case.batch, theirs)
        each: list[Any] = [None, None]
        dist.all_gather_object(each, (loss, gradients))
        wanted_loss = sum(entry[0] for entry in each)
        wanted: dict[str, Tensor] = {}
        for _, some in each:  # a tied parameter has a gradient on both
            for name, value in some.items():
                wanted[name] = wanted[name] + value if name in wanted else value
        got_loss, got = pipeline_cases.step(captured.parallel(text), case.batch)
        errors = {
            name: float((value - wanted[name]).abs().max() / wanted[name].abs().max())
            for name, value in got.items()  # on rank 0
        }
        found.append(
            {
                "schedule": (theirs, ours),
                "losses": (got_loss, wanted_loss),
                "names": (sorted(got), sorted(wanted)),
                "error": max(errors.values(), default=0.0),
                "largest": max(float(v.abs().max()) for v in wanted.values()),
            }
        )
    return found


@pytest.mark.parametrize("model", ["odd_gpt", "llama"])
def test_the_executor_agrees_with_the_library_s_schedules(
    ranks: Callable[[int], Any], model: str
) -> None:
    found = ranks(2).run(on_ranks, FOLDERS, model)[0]
    assert len(found) == len(SCHEDULES)
    for outcome in found:
        got, wanted = outcome["losses"]
        assert got == pytest.approx(wanted, rel=1e-9), outcome["schedule"]
        assert outcome["names"][0] == outcome["names"][1] != [], outcome["schedule"]
        assert outcome["error"] < 1e-9 and outcome["largest"] > 1e-3, outcome["schedule"]
