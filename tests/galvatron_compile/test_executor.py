"""The executor obeys its list: what really runs, in which order, and what is alive meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_cases as cases
import pytest
import torch
import torch.distributed as dist

from galvatron_compile.actions import Action
from galvatron_compile.errors import NonFiniteLossError, PeerError, ShapeError
from galvatron_compile.executor import Executor
from galvatron_compile.flat import FlatBucket
from galvatron_compile.lowered_piece import LoweredPiece

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES = ["gpipe", "1f1b", "zero-bubble"]


# Numbers.


def with_noise(plans: list[str], eager: bool, wanted: cases.Found) -> list[float]:
    captured = cases.Captured(cases.both())
    losses = []
    for text in plans:
        found = cases.step(captured.parallel(text, eager=eager), captured.batch)
        cases.same(found, wanted)
        losses.append(found[0])
    return losses


@pytest.mark.parametrize("eager", [False, True], ids=["lowered", "eager"])
def test_pipelines_give_one_process_s_loss_with_noise_that_crosses(ranks: Any, eager: bool) -> None:
    """The noise is drawn once, in the first stage; recompute repeats it."""
    alone = cases.Captured(cases.both())
    wanted = cases.step(alone.parallel("dp1; micro=4"), alone.batch)
    plans = [f"dp1; pp=2; micro=4; schedule={schedule}" for schedule in SCHEDULES]
    plans.append("dp1.recompute; stages=1,3,1,3; micro=4; schedule=interleaved; virtual=2")
    plans.append("dp1.recompute; stages=7,1; micro=4; schedule=zero-bubble")
    found = ranks(2).run(with_noise, plans, eager, wanted)
    assert found[0] == found[1], "every rank has the same loss"
    deeper = ranks(4).run(with_noise, ["dp1; stages=1,1,3,3; micro=4"], eager, wanted)
    assert deeper == deeper[:1] * 4


def other_layouts(plans: list[str]) -> None:
    captured = cases.Captured(cases.both(0.0))
    wanted = cases.reference(cases.both(0.0), captured.batch)
    for text in plans:
        model = captured.parallel(text)
        share = model.local_batch(captured.batch)
        assert model.evaluate(share).item() == pytest.approx(wanted[0], rel=1e-9), text
        cases.same(cases.step(model, captured.batch), wanted)


def test_the_two_sides_of_a_cut_may_have_different_layouts(ranks: Any) -> None:
    plans = [
        "all: dp2; 0-3: tp2; stages=4,4; micro=2",
        "all: tp2.sp; 0-3: dp2.zero3.recompute; stages=2,6; micro=2",
        "all: dp2.zero2; 0-3: tp2.sp; stages=2,3,2,1; schedule=interleaved; virtual=2; micro=4",
    ]
    ranks(4).run(other_layouts, plans)


# Order.


def ordered() -> list[str]:
    """Every call that moves, frees or computes something, in the order in which they came."""
    model, inputs = cases.odd_gpt()
    lowered = cases.Captured(model, inputs).lowered("dp2.zero3; micro=1")
    names = {id(b): unit.name for unit in lowered.program.units for b in unit.buckets}
    log: list[str] = []

    def logged(function: Callable[..., Any], title: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            is_layer = isinstance(self, LoweredPiece)
            log.append(f"{title:9} {self.graph.name if is_layer else names[id(self)]}")
            if is_layer:
                full = [u.name for u in lowered.program.units if not u.is_freed]
                log[-1] += f"  [{', '.join(full)}]"
            return function(self, *args)

        return call

    hooks = [
        (FlatBucket, "launch_gather", "gather"), (FlatBucket, "wait_gather", "wait"),
        (FlatBucket, "free", "free"), (FlatBucket, "launch_reduce", "reduce"),
        (LoweredPiece, "forward", "forward"), (LoweredPiece, "backward", "backward"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, title in hooks:
            patch.setattr(owner, name, logged(getattr(owner, name), title))
        parallel = cases.ParallelModel(lowered, cases.Precision())
        parallel.step(parallel.local_batch(inputs))
    return log


def test_zero3_gathers_ahead_and_frees_behind_in_forward_and_backward(ranks: Any) -> None:
    """What really ran; in brackets whose parameters had memory when a layer began."""
    logs = ranks(2).run(ordered)
    assert logs[0] == logs[1]
    text = "\n".join(logs[0]) + "\n"
    assert text == (GOLDEN / "executor_zero3.txt").read_text(encoding="utf-8")


# Memory.


class Alive:
    """Follows everything that layers give and keep, by layer and micro-batch."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.kept: dict[tuple[int, int], list[Any]] = defaultdict(list)
        self.values: dict[tuple[int, int], list[Any]] = defaultdict(list)

    def __call__(self, action: Action, run: Callable[[], None]) -> None:
        run()
        key = (action.index, action.micro_batch)
        step = self.last = self.executor._step
        if action.kind == "forward":
            graph = self.executor.pieces[action.index].graph
            stage = self.executor.stage_of[action.index]
            held = step.values.get((stage, action.micro_batch), {})
            assert not set(graph.drops) & held.keys()
            self.values[key] += [weakref.ref(held[n]) for n in graph.outputs if n in held]
        if action.kind in ("forward", "recompute"):
            batch = {id(value) for value in step.inputs[action.micro_batch].values()}
            kept = (value for value in step.kept.get(key, []) if id(value) not in batch)
            self.kept[key] += [weakref.ref(value) for value in kept]
        elif action.kind in ("backward", "backward_weight"):
            assert key not in step.kept
            alive = sum(ref() is not None for ref in self.kept[key])
            assert alive == 0, f"{alive} kept tensors of {graph_name(self.executor, key)} live on"
        elif action.kind == "send_activations":
            assert key not in step.values
        elif action.kind == "send_gradients":
            assert key not in step.gradients


def graph_name(executor: Executor, key: tuple[int, int]) -> str:
    return f"{executor.pieces[key[0]].graph.name} of micro-batch {key[1]}"


def nothing_left(plans: list[str]) -> None:
    model, inputs = cases.odd_gpt()
    captured = cases.Captured(model, inputs)
    for text in plans:
        parallel = captured.parallel(text)
        executor = parallel._executor
        alive = Alive(executor)
        parallel.step_recorded(parallel.local_batch(inputs), alive)
        gc.collect()
        followed = [*alive.kept.values(), *alive.values.values()]
        assert sum(map(len, followed)) > 10
        assert all(ref() is None for found in followed for ref in found)
        assert not hasattr(executor, "_step")
        assert not alive.last.values and not alive.last.kept
        assert not any(alive.last.gradients.values())
        assert not executor.links._leaving and not executor.links._arriving
        frozen = [unit.is_freed for unit in parallel._program.units if unit.zero == 3]
        assert all(frozen) and len(frozen) == len(parallel._program.units)
        buckets = [bucket for unit in parallel._program.units for bucket in unit.buckets]
        assert all(bucket.gradients.pending is None for bucket in buckets)


def test_nothing_lives_longer_than_the_list_says(ranks: Any) -> None:
    """Kept tensors end with the layer's backward, values with their last use or when sent."""
    plans = ["dp2.zero3; micro=2", "dp2.zero3.recompute; micro=2"]
    ranks(2).run(nothing_left, plans)
    deep = [
        "dp2.zero3; pp=2; micro=4",
        "dp2.zero3; pp=2; micro=4; schedule=zero-bubble",
        "dp2.zero3; stages=1,2,2,1; micro=4; schedule=interleaved; virtual=2",
    ]
    ranks(4).run(nothing_left, deep)


# What users see.


def as_one(plans: list[str]) -> None:
    """Accumulation over two steps, the global norm with tied weights, evaluation."""
    model, inputs = cases.odd_gpt()
    captured = cases.Captured(model, inputs)
    loss, gradients = cases.reference(model, inputs)
    norm = torch.stack([2 * g.norm() for g in gradients.values()]).norm()
    twice = {name: 2 * gradient for name, gradient in gradients.items()}
    scale = 0.5 / (norm + 1e-6)
    for text in plans:
        parallel = captured.parallel(text)
        share = parallel.local_batch(inputs)
        assert parallel.evaluate(share).item() == pytest.approx(loss, rel=1e-12)
        parallel.step(share)
        cases.same(cases.step(parallel, inputs), (loss, twice))
        found = parallel.clip_grad_norm_(0.5)
        torch.testing.assert_close(found, norm, rtol=1e-9, atol=0)
        clipped = {name: scale * gradient for name, gradient in twice.items()}
        cases.same((loss, parallel.full_gradients()), (loss, clipped))


def test_steps_add_up_and_clip_by_the_norm_that_counts_tied_weights_once(ranks: Any) -> None:
    ranks(2).run(as_one, ["dp1; pp=2; micro=2"])
    plans = ["dp2.zero3; pp=2; micro=2", "tp2; pp=2; micro=2; schedule=zero-bubble"]
    ranks(4).run(as_one, plans)


def spoiled(text: str) -> None:
    """A step whose loss is not finite, between two good ones."""
    model, inputs = cases.odd_gpt()
    parallel = cases.Captured(model, inputs).parallel(text)
    share = parallel.local_batch(inputs)
    good = parallel.step(share).item()
    before = [None if p.grad is None else p.grad.clone() for p in parallel.parameters()]
    held = dict(parallel.named_parameters())
    assert ("where" in held) == (parallel._group == 0)
    saved = {name: value.detach().clone() for name, value in held.items()}
    if "where" in held and parallel.data_rank == 1:
        held["where"].data.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match="the loss of step 2 is"):
        parallel.step(share)
    for name, value in held.items():
        value.data.copy_(saved[name])
    for parameter, gradient in zip(parallel.parameters(), before, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert parallel.step(share).item() == pytest.approx(good, rel=1e-12)


def test_a_loss_that_is_not_finite_is_told_on_every_stage(ranks: Any) -> None:
    ranks(4).run(spoiled, "dp2; pp=2; micro=2")


def bad_batch(text: str, culprit: int) -> None:
    model, inputs = cases.odd_gpt()
    parallel = cases.Captured(model, inputs).parallel(text)
    share = parallel.local_batch(inputs)
    if dist.get_rank() == culprit:
        share["tokens"] = share["tokens"][1:]
    parallel.step(share)


@pytest.mark.parametrize("culprit", [0, 3])
def test_a_bad_batch_on_one_rank_raises_on_every_stage(ranks: Any, culprit: int) -> None:
    errors = ranks(4).errors(bad_batch, "dp2; pp=2; micro=2", culprit)
    for rank, error in enumerate(errors):
        assert isinstance(error, ShapeError if rank == culprit else PeerError), (rank, error)
        assert rank == culprit or f"rank {culprit} failed: ShapeError: tokens" in str(error)


def test_parameters_that_values_look_at_are_not_freed_under_them(ranks: Any) -> None:
    """Positions that every block adds are a view of a parameter of the first layer."""
    ranks(2).run(positions, ["dp2.zero3; micro=2", "dp2.zero3.recompute"], False)
    ranks(2).run(positions, ["dp2.zero3; micro=2"], True)


def positions(plans: list[str], eager: bool) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Linear(cases.WIDTH, cases.WIDTH)

        def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.weight(x + where))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(10, cases.WIDTH)
            self.where = torch.nn.Parameter(torch.randn(cases.LENGTH, cases.WIDTH))
            self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
            self.head = torch.nn.Linear(cases.WIDTH, 10)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x, where = self.table(ids), self.where.unsqueeze(0)
            for block in self.blocks:
                x = block(x, where)
            loss = torch.nn.functional.cross_entropy
            return loss(self.head(x).flatten(0, 1), labels.flatten())

    torch.manual_seed(0)
    model = Net().double()
    captured = cases.Captured(model)
    wanted = cases.reference(model, captured.batch)
    for text in plans:
        parallel = captured.parallel(text, eager=eager)
        share = parallel.local_batch(captured.batch)
        assert parallel.evaluate(share).item() == pytest.approx(wanted[0], rel=1e-9)
        cases.same(cases.step(parallel, captured.batch), wanted)


class Passing(torch.nn.Module):
    """A frozen layer between two halves: gradients of the first half pass through its stage."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, cases.WIDTH)
        self.first = torch.nn.ModuleList(cases.Encoder() for _ in range(2))
        self.frozen = torch.nn.Embedding(10, cases.WIDTH)
        self.frozen.weight.requires_grad_(False)
        self.second = torch.nn.ModuleList(cases.Encoder() for _ in range(3))
        self.head = torch.nn.Linear(cases.WIDTH, 10)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.first:
            x = layer(x, torch.tanh(x))
        y = torch.tanh(self.frozen(labels).exp())
        for layer in self.second:
            y = layer(y, x)
        loss = torch.nn.functional.cross_entropy
        return loss(self.head(y).flatten(0, 1), labels.flatten())


def through_a_frozen_stage() -> None:
    torch.manual_seed(0)
    model = Passing().double()
    captured = cases.Captured(model)
    wanted = cases.reference(model, captured.batch)
    for schedule in SCHEDULES:
        plan = f"dp1; stages=3,1,2,2; micro=4; schedule={schedule}"
        cases.same(cases.step(captured.parallel(plan), captured.batch), wanted)


def test_gradients_pass_through_a_stage_in_which_nothing_learns(ranks: Any) -> None:
    ranks(4).run(through_a_frozen_stage)
