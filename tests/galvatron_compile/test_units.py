"""Parameters that are gathered, freed and summed together."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import hand_made as hand
import torch

from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.placement import R, V
from galvatron_compile.precision import Precision
from galvatron_compile.units import ParameterUnit


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
    unit.add_gradient(0, torch.full((4,), 5.0))
    unit.add_gradient(1, torch.full((4,), rank + 1.0))
    for start in (unit.reduce, unit.reduce_tensor):
        for launched in start():
            launched.wait()
    unit.commit()
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


def test_a_parameter_without_a_gradient_in_a_later_step_gets_none() -> None:
    alone = Axis("dp1", (0,), 0)
    layouts = [ParameterLayout(name, (2,), R, 1, 1, 0) for name in ("a", "b")]
    unit = ParameterUnit(
        "u", layouts, [torch.ones(2), torch.ones(2)], data=alone, tensor=alone,
        precision=Precision(), device=torch.device("cpu"),
    )  # fmt: skip
    for places in ((0, 1), (0,)):
        for place in places:
            unit.add_gradient(place, torch.full((2,), 3.0))
        for launched in unit.reduce():
            launched.wait()
        for master in unit.masters:
            master.grad = None
        unit.commit()
    assert [m.grad is None for m in unit.masters] == [False, True]


def test_gradients_summed_in_more_bits_are_rounded_once() -> None:
    """bfloat16 rounds 1 + 2**-8 to 1; with two of them it is 1 + 2**-7."""
    alone = Axis("dp1", (0,), 0)
    value = torch.ones(3, dtype=torch.bfloat16)
    unit = ParameterUnit(
        "u", [ParameterLayout("w", (3,), R, 1, 1, 0)], [value], data=alone, tensor=alone,
        precision=Precision(reduce=torch.float32), device=torch.device("cpu"),
    )  # fmt: skip
    for part in (1.0, 2.0**-8, 2.0**-8):
        unit.add_gradient(0, torch.full((3,), part, dtype=torch.bfloat16))
    for launched in unit.reduce():
        launched.wait()
    unit.commit()
    (master,) = unit.masters
    assert master.grad is not None and master.grad.dtype == torch.bfloat16
    assert master.grad.tolist() == [1.0 + 2.0**-7] * 3


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
