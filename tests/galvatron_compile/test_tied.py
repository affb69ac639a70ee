"""A parameter in two stages: its gradients are summed, however each stage lays it out."""

from __future__ import annotations

import itertools
from typing import Any

import pipeline_cases as cases
import pytest
import torch
import torch.distributed as dist

from galvatron_compile.entry import gather_full
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Mesh
from galvatron_compile.placement import Placement, R, S, V
from galvatron_compile.precision import Precision
from galvatron_compile.tied import sum_tied
from galvatron_compile.units import ParameterUnit

SHAPES = ((5, 4), (7, 8), ())
Form = tuple[Placement, int, int]  # placement on the tensor axis, tp, ZeRO stage
FORMS: list[Form] = [(R, 1, 0), (R, 1, 1), (R, 1, 3), (S(1), 2, 0), (V, 2, 0), (S(1, 2), 2, 0)]


def gradient(shape: tuple[int, ...], rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def unit_of(form: Form, mesh: Mesh) -> ParameterUnit:
    placement, tp, zero = form
    dp = mesh.group_size // tp
    layouts = [
        ParameterLayout(f"p{at}", shape, placement if shape else R, tp, dp, zero)
        for at, shape in enumerate(SHAPES)
    ]
    return ParameterUnit(
        "tied",
        layouts,
        [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES],
        data=mesh.data(tp),
        tensor=mesh.tensor(tp),
        precision=Precision(),
        device=torch.device("cpu"),
        tied=mesh.tied[0, 1],
    )


def whole_sum(form: Form, shape: tuple[int, ...], group: int) -> torch.Tensor:
    """What a stage's own ranks sum to: replicas along the tensor axis have one gradient."""
    placement, tp, _ = form
    first = 2 * group
    both = gradient(shape, first) + gradient(shape, first + 1)
    summed = tp == 1 or (placement.kind == "V" and shape != ())
    return both if summed else gradient(shape, first)


def summed_over_stages(forms: list[tuple[Form, Form]]) -> None:
    rank = dist.get_rank()
    mesh = Mesh.create(4, rank, [1, 2], pp=2, tied=[(0, 1)])
    for pair, alone in itertools.product(forms, (False, True)):
        form = pair[mesh.group]
        unit = unit_of(form, mesh)
        has_gradient = not alone or mesh.group == 1  # the first stage may have none
        for at, (shape, layout) in enumerate(zip(SHAPES, unit.layouts, strict=True)):
            shared = layout.tp == 2 and layout.tensor.kind != "V"
            mine = gradient(shape, 2 * mesh.group if shared else rank)
            if has_gradient:
                unit.add_gradient(at, layout.take_tensor(mine, unit.tensor.index))
        for reduce in (unit.reduce, unit.reduce_tensor):
            for launched in reduce():
                launched.wait()
        sum_tied(unit)
        unit.commit()
        for shape, layout, master in zip(SHAPES, unit.layouts, unit.masters, strict=True):
            wanted = whole_sum(pair[1], shape, 1)
            if not alone:
                wanted = wanted + whole_sum(pair[0], shape, 0)
            assert master.grad is not None and master.grad.shape == master.shape
            found = gather_full(layout, master.grad, unit.data, unit.tensor)
            say = f"{pair} {alone} {layout.name}\n{{}}".format
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=say)


def test_whole_gradients_are_summed_in_any_pair_of_layouts(ranks: Any) -> None:
    """Rows that do not divide, interleaved shards, scalars, a stage without gradient."""
    ranks(4).run(summed_over_stages, list(itertools.product(FORMS, FORMS)))


def trained(plans: list[str]) -> None:
    """Two AdamW steps: copies of the tied table stay equal, and equal to one process's."""
    model, inputs = cases.odd_gpt()
    captured = cases.Captured(model, inputs)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).backward()
        optimizer.step()
    wanted = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load_state_dict(start, strict=False)
    for text in plans:
        parallel = captured.parallel(text)
        share = parallel.local_batch(inputs)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01, eps=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            parallel.step(share)
            optimizer.step()
        held = [e for e in parallel.states.entries if e.name == "lettuce.weight"]
        assert len(held) == 1, "first and last stage have a copy each"
        assert held[0].unit.tied is not None
        copy = held[0].whole(held[0].master.detach())
        torch.testing.assert_close(copy, wanted["lettuce.weight"], rtol=1e-9, atol=1e-11)
        state = parallel.full_state_dict()
        for name in wanted if state else ():
            torch.testing.assert_close(state[name], wanted[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "plan",
    [
        "all: dp2.zero3; 0-2: tp2; stages=3,3; micro=2",
        "all: dp2.zero1; 0-2: dp2.zero3; stages=3,3; micro=2",
    ],
)
def test_copies_with_different_layouts_stay_equal_in_training(ranks: Any, plan: str) -> None:
    ranks(4).run(trained, [plan])
