"""Parameters are there when a layer needs them and only then; gradients travel during backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import hand_made as hand
import pytest
import torch

from galvatron_compile.flat import FlatBucket
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.placement import R, V
from galvatron_compile.precision import Precision
from galvatron_compile.unit_schedule import UnitSchedule
from galvatron_compile.units import BackwardFence, ParameterUnit, Recompute

NUM_LAYERS = 5


def make_units(zero: int, log: list[str]) -> list[ParameterUnit]:
    """One 3×3 weight each, frozen in the middle layer; gathers and reductions are logged."""
    mesh = Mesh.create(torch.distributed.get_world_size(), torch.distributed.get_rank(), {1})
    units = []
    for number in range(NUM_LAYERS):
        frozen = ParameterLayout(f"frozen{number}", (3, 3), R, 1, 2, zero, False)
        layout = ParameterLayout(f"weight{number}", (3, 3), R, 1, 2, zero, number != 2)
        unit = ParameterUnit(
            str(number),
            [frozen, layout],
            [torch.eye(3) * 2, torch.eye(3) * (number + 1)],
            data=mesh.data(1),
            tensor=mesh.tensor(1),
            precision=Precision(),
            device=torch.device("cpu"),
        )
        for bucket in unit.buckets[-1:]:
            _log(bucket, "launch_gather", f"gather {number}", log)
            _log(bucket, "free", f"free {number}", log)
            _log(bucket, "launch_reduce", f"reduce {number}", log)
        units.append(unit)
    return units


def _log(bucket: FlatBucket, method: str, text: str, log: list[str]) -> None:
    real = getattr(bucket, method)

    def logged() -> Any:
        log.append(text)
        return real()

    setattr(bucket, method, logged)


class Times(torch.nn.Module):
    def forward(self, x: torch.Tensor, frozen: torch.Tensor, weight: torch.Tensor) -> Any:
        return ((x @ weight) @ frozen).tanh()


def run_step(units: list[ParameterUnit], log: list[str], recompute: bool) -> None:
    schedule = UnitSchedule(units, max_in_flight=2)
    fences = [BackwardFence(unit) for unit in units]
    layer: torch.nn.Module = Recompute(Times()) if recompute else Times()
    most = 0
    for last in (False, True):
        log.append(f"micro-batch, last={last}")
        schedule.begin()
        schedule.begin_micro_batch(last=last)
        x = torch.ones(2, 3, requires_grad=True)
        for number, (unit, fence) in enumerate(zip(units, fences, strict=True)):
            (x, _) = fence(layer(x, *unit()), "not a tensor")
            log.append(f"forward {number}")
            most = max(most, sum(not other.is_freed for other in units))
        x.register_hook(lambda gradient: log.append("backward"))
        x.sum().backward()
        log.append("backward is over")
        schedule.end_micro_batch()
        assert all(unit.is_freed for unit in units) or units[0].zero != 3
        assert len(schedule._reductions) <= 2
    schedule.finish()
    schedule.commit()
    assert most <= 3 or units[0].zero != 3  # the layer's, the next one's, the last one's


def zero3_order(recompute: bool) -> list[str]:
    log: list[str] = []
    units = make_units(3, log)
    run_step(units, log, recompute)
    for number, unit in enumerate(units):
        assert unit.masters[0].grad is None
        assert (unit.masters[1].grad is None) == (number == 2)
    return log


@pytest.mark.parametrize("recompute", [False, True])
def test_zero3_gathers_one_ahead_and_frees_behind(ranks: Any, recompute: bool) -> None:
    logs = ranks(2).run(zero3_order, recompute)
    assert logs[0] == logs[1]  # the same collectives in the same order
    log = [line for line in logs[0] if not line.startswith("reduce")]
    begin, end = log.index("micro-batch, last=True"), len(log)
    calls = log[begin:end]
    gathers = [line for line in calls if line.startswith("gather")]
    forward, backward = ["0", "1", "2", "3", "4"], ["3", "2", "1", "0"]
    assert [line.split()[1] for line in gathers] == forward + backward
    for number in range(NUM_LAYERS - 1):  # gathered before the layer in front of it has run
        assert calls.index(f"gather {number + 1}") < calls.index(f"forward {number}")
        assert calls.index(f"free {number}") < calls.index(f"forward {number}") + 1
    assert calls.index("free 4") > calls.index("backward")  # the last is kept for backward
    assert calls.index("gather 3", calls.index("backward")) < calls.index("free 4")


def reductions(zero: int) -> list[str]:
    log: list[str] = []
    run_step(make_units(zero, log), log, False)
    return [line for line in log if line.startswith(("reduce", "backward is", "micro"))]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_are_summed_during_backward(ranks: Any, zero: int) -> None:
    found = ranks(2).run(reductions, zero)
    order = [f"reduce {number}" for number in (4, 3, 1, 0)]
    early = order if zero >= 2 else []  # sharded accumulators: every micro-batch
    wanted = ["micro-batch, last=False", *early, "backward is over"]
    wanted += ["micro-batch, last=True", *order, "backward is over"]
    assert found == [wanted, wanted]


def gradient_values(zero: int) -> None:
    units = make_units(zero, [])
    run_step(units, [], False)
    weights = [torch.eye(3) * (n + 1) for n in range(NUM_LAYERS)]
    for weight in weights:
        weight.requires_grad_()
    x = torch.ones(2, 3)
    for weight in weights:
        x = ((x @ weight) @ (torch.eye(3) * 2)).tanh()
    x.sum().backward()
    for number, unit in enumerate(units):
        grad = unit.masters[1].grad
        if number == 2:
            continue
        assert grad is not None
        whole = weights[number].grad
        assert whole is not None
        wanted = unit.layouts[1].take(4 * whole, unit.rank)  # 2 ranks, 2 micro-batches
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_frozen_weights_pass_gradients_on_and_get_none(ranks: Any, zero: int) -> None:
    ranks(2).run(gradient_values, zero)


def freed_between_steps() -> None:
    model = hand.parallel(hand.Net(True), zero=3, micro_batches=3)
    share = model.local_batch(hand.batch())
    units = model._program.units
    for run in (model.step, model.evaluate):
        assert all(unit.is_freed for unit in units)
        run(share)
        sizes = [w.untyped_storage().size() for unit in units for w in unit.working]
        assert sizes == [0] * len(sizes)


def test_zero3_working_storage_is_empty_between_steps(ranks: Any) -> None:
    ranks(4).run(freed_between_steps)


def test_a_varying_parameter_is_summed_over_the_tensor_axis(ranks: Any) -> None:
    ranks(2).run(varying)


def varying() -> None:
    rank = torch.distributed.get_rank()
    mesh = Mesh.create(2, rank, {2})
    layouts = [ParameterLayout(name, (4,), kind, 2, 1, 0) for name, kind in (("r", R), ("v", V))]
    unit = ParameterUnit(
        "u",
        layouts,
        [torch.ones(4), torch.ones(4)],
        data=mesh.data(2),
        tensor=mesh.tensor(2),
        precision=Precision(),
        device=torch.device("cpu"),
    )
    unit.schedule.begin()
    unit.schedule.begin_micro_batch(last=True)
    replicated, different = unit()
    (replicated.sum() * 5 + different.sum() * (rank + 1)).backward()
    unit.schedule.end_micro_batch()
    unit.schedule.finish()
    unit.schedule.commit()
    assert [m.grad.tolist() for m in unit.masters] == [[5.0] * 4, [3.0] * 4]  # type: ignore


def test_without_zero_the_layer_computes_with_the_masters_memory() -> None:
    alone = Axis("dp1", (0,), 0)
    layout = ParameterLayout("w", (2, 2), R, 1, 1, 0)
    unit = ParameterUnit(
        "u",
        [layout],
        [torch.ones(2, 2)],
        data=alone,
        tensor=alone,
        precision=Precision(),
        device=torch.device("cpu"),
    )
    (working,) = unit()
    assert working is unit()[0]
    assert working.data_ptr() == unit.masters[0].data_ptr()
    assert not list(unit.parameters())


def test_a_dropped_unit_is_freed() -> None:
    """Its tensors' hooks must not keep it, its memory and its process groups alive."""
    layout = ParameterLayout("w", (4, 2), R, tp=1, dp=1, zero=0)
    axis = Axis("one", (0,), 0)
    unit = ParameterUnit(
        "layer", [layout], [torch.ones(4, 2)], data=axis, tensor=axis,
        precision=Precision(), device=torch.device("cpu"),
    )
    unit()[0].sum().backward()
    ghost = weakref.ref(unit)
    del unit
    gc.collect()
    assert ghost() is None
