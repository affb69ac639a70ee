"""Ranks that hold some of the parameters save and load all of them; units made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint
from galvatron_compile.errors import CheckpointError, GalvatronError
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Mesh
from galvatron_compile.placement import R, S, V
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.states import States
from galvatron_compile.strategy import Strategy
from galvatron_compile.units import ParameterUnit

PARAMETERS = {
    "tied": ((6, 4), S(0)),
    "a.wide": ((8, 3), S(0, 2)),  # two blocks a rank: no DTensor says so
    "a.gain": ((3,), V),
    "a.scale": ((), R),
    "b.down": ((3, 8), S(1)),
    "b.bias": ((5,), R),
}
A, B, TIED = ("a.wide", "a.gain", "a.scale"), ("b.down", "b.bias"), ("tied",)

# Per pipeline group its units: tp, ZeRO stage, names.
Groups = list[list[tuple[int, int, tuple[str, ...]]]]
SETUPS: dict[str, tuple[int, Groups]] = {
    "two stages": (4, [[(2, 0, TIED), (2, 0, A)], [(1, 3, B), (1, 2, TIED)]]),
    "turned": (4, [[(1, 3, B), (1, 0, TIED)], [(1, 2, A), (2, 0, TIED)]]),
    "four stages": (4, [[(1, 0, TIED)], [(1, 0, A)], [(1, 0, B)], [(1, 0, TIED)]]),
    "one stage": (4, [[(2, 3, TIED), (2, 3, A), (4, 0, B)]]),
    "two ranks": (2, [[(1, 0, A), (1, 0, TIED)], [(1, 0, B), (1, 0, TIED)]]),
    "one rank": (1, [[(1, 0, TIED + A + B)]]),
}


def whole(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, (shape, _) in PARAMETERS.items()
    }


def layout(name: str, size: int, tp: int, zero: int) -> ParameterLayout:
    shape, placement = PARAMETERS[name]
    return ParameterLayout(name, shape, placement if tp > 1 else R, tp, size // tp, zero)


def made(setup: str, values: dict[str, torch.Tensor]) -> Any:
    """What functions of checkpoints need of a ParallelModel, with the states of a setup."""
    world, groups = SETUPS[setup]
    rank = dist.get_rank() if world > 1 else 0
    pp = len(groups)
    size = world // pp
    degrees = {tp for units in groups for tp, _, _ in units}
    mesh = Mesh.create(world, rank, degrees, pp=pp)
    units = [
        ParameterUnit(
            names[0], [layout(name, size, tp, zero) for name in names],
            [values[name] for name in names], data=mesh.data(tp), tensor=mesh.tensor(tp),
            precision=Precision(), device=torch.device("cpu"),
        )
        for tp, zero, names in groups[rank // size]
    ]  # fmt: skip
    owners = {}
    for name in PARAMETERS:
        for group, held in reversed(list(enumerate(groups))):
            for tp, zero, names in held:
                if name in names:
                    owners[name] = (group, layout(name, size, tp, zero))
    buffers = {"shift": torch.full((2,), 9.0)}
    states = States(units, buffers, {"also": "tied"}, layouts=owners, num_groups=pp)
    plan = Plan("", world, world, 1, ("layer",), (Strategy(tp=1, dp=world),))
    return SimpleNamespace(states=states, plan=plan, num_steps=0, seed=0)


def adam(parallel: Any) -> torch.optim.Optimizer:
    decays, rest = [], []
    for entry in parallel.states.entries:
        (decays if entry.name in ("tied", "a.wide") else rest).append(entry.master)
    groups = [{"params": decays, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.05)


def step(parallel: Any, optimizer: Any) -> None:
    """One optimizer step with gradients made from the number of steps; none for b.bias."""
    parallel.num_steps += 1
    gradients = whole(100 + parallel.num_steps)
    for entry in parallel.states.entries:
        if entry.name != "b.bias":
            entry.master.grad = entry.take(gradients[entry.name]).clone()
    optimizer.step()


def alone(steps: int) -> dict[str, torch.Tensor]:
    """The values after so many steps on whole tensors."""
    values = whole(1)
    decays = [values[name] for name in ("tied", "a.wide")]
    rest = [value for name, value in values.items() if name not in ("tied", "a.wide")]
    groups = [{"params": decays, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for number in range(1, steps + 1):
        gradients = whole(100 + number)
        for name, value in values.items():
            value.grad = gradients[name] if name != "b.bias" else None
        optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def check(parallel: Any, wanted: dict[str, torch.Tensor]) -> None:
    """On rank 0 all values, elsewhere none; and every copy of what is tied."""
    states = parallel.states
    found = states.full()
    names = [*PARAMETERS, "shift", "also"]
    assert list(found) == (names if states.rank == 0 else [])
    for name in found.keys() & wanted.keys():
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=0)
    for entry in states.entries:
        local = entry.take(wanted[entry.name])
        torch.testing.assert_close(entry.master.detach(), local, rtol=1e-12, atol=0)


def whole_tensors(setup: str) -> None:
    parallel = made(setup, whole(1))
    states = parallel.states
    check(parallel, whole(1))
    gradients = whole(2)
    for entry in states.entries:
        if entry.name != "a.gain":
            entry.master.grad = entry.take(gradients[entry.name]).clone()
    found = states.full_gradients()
    first = states.rank == 0
    assert list(found) == ([n for n in PARAMETERS if n != "a.gain"] if first else [])
    assert all(torch.equal(value, gradients[name]) for name, value in found.items())
    state = {**whole(3), "shift": torch.ones(2)}
    states.load_full({**state, "also": state["tied"]} if first else None)
    check(parallel, whole(3))
    assert torch.equal(states.tensors["shift"], torch.ones(2))
    with pytest.raises(GalvatronError, match=r"missing: b\.down; .*shape \[5\]"):
        wrong = {name: value for name, value in state.items() if name != "b.down"}
        states.load_full({**wrong, "a.gain": torch.ones(5)} if first else None)
    check(parallel, whole(3))


@pytest.mark.parametrize("setup", ["two stages", "four stages"])
def test_whole_tensors_come_from_and_go_to_every_stage(ranks: Any, setup: str) -> None:
    ranks(4).run(whole_tensors, setup)


def by_hand(path: str) -> None:
    """``state_dict`` and ``load_state_dict`` with torch.distributed.checkpoint itself."""
    dcp.save(made("two stages", whole(1)).states.sharded(), checkpoint_id=path)
    for setup in ("turned", "four stages", "one stage"):
        parallel = made(setup, whole(2))
        state = parallel.states.sharded()
        dcp.load(state, checkpoint_id=path)
        parallel.states.load_sharded(state)
        check(parallel, whole(1))


def test_states_go_through_dcp_between_stages(ranks: Any, tmp_path: Path) -> None:
    ranks(4).run(by_hand, str(tmp_path))


def save(path: str, setup: str, background: bool) -> None:
    parallel = made(setup, whole(1))
    optimizer = adam(parallel)
    for _ in range(3):
        step(parallel, optimizer)
    handle = save_checkpoint(path, parallel, optimizer, asynchronous=background)
    step(parallel, optimizer)
    if handle is not None:
        handle.wait()
    check(parallel, alone(4))
    metadata = dcp.FileSystemReader(Path(path) / "step-000003").read_metadata()
    for name, tensor in metadata.state_dict_metadata.items():
        sizes = [math.prod(chunk.sizes) for chunk in tensor.chunks]
        assert sum(sizes) == math.prod(tensor.size), name  # every element once


def load(path: str, setup: str) -> None:
    parallel = made(setup, whole(2))
    optimizer = adam(parallel)
    step(parallel, optimizer)  # a state of its own, which goes
    manifest = load_checkpoint(path, parallel, optimizer).manifest
    assert parallel.num_steps == 3
    assert list(manifest.tensors) == [*PARAMETERS, "shift"]
    assert manifest.optimizer is not None
    assert set(manifest.optimizer.states) == PARAMETERS.keys() - {"b.bias"}
    check(parallel, alone(3))
    step(parallel, optimizer)
    check(parallel, alone(4))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) + (
        "b.bias" in parallel.states.by_name
    )


@pytest.mark.parametrize(("setup", "background"), [("two stages", False), ("four stages", True)])
def test_any_stages_load_any_others_with_the_optimizer(
    ranks: Any, tmp_path: Path, setup: str, background: bool
) -> None:
    path = str(tmp_path)
    ranks(4).run(save, path, setup, background)
    for other, (world, _) in SETUPS.items():
        if world == 1:
            load(path, other)
        else:
            ranks(world).run(load, path, other)


def differing(path: str, kind: str) -> None:
    parallel = made("two stages", whole(1))
    masters = [entry.master for entry in parallel.states.entries]
    late = parallel.states.group == 1
    if kind == "options":
        optimizer = torch.optim.SGD(masters, lr=0.1 + late)
    else:
        groups = [{"params": masters}, {"params": []}] if late else [{"params": masters}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
    save_checkpoint(path, parallel, optimizer)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("options", "group 0 has other options on other ranks"), ("groups", "1 or 2 parameter grou")],
)
def test_optimizers_that_differ_between_stages_are_refused(
    ranks: Any, tmp_path: Path, kind: str, message: str
) -> None:
    errors = ranks(4).errors(differing, str(tmp_path), kind)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all(message in str(error) for error in errors)
    assert list(tmp_path.iterdir()) == []
