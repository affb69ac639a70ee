"""A checkpoint of any plan goes on under any other as if training had never stopped."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import galvatron_compile as gc
from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint

MODELS = str(Path(__file__).parents[1] / "equivalence")
STEPS, MORE = 20, 3
OTHER_PLANS = [
    (1, "all: dp1"),
    (2, "all: tp2"),
    (2, "all: dp2.zero1; micro=2"),
    (4, "all: tp2.dp2.zero3; 2: dp4.zero2"),
    (4, "dp2.zero3; pp=2; micro=2"),
]
STAGES = [(2, "dp1; pp=2; micro=2"), (2, "dp2.zero3"), (4, "tp2; pp=2; micro=2; schedule=gpipe")]


def tiny(folder: str, plan: str, dropout: float = 0.0, seed: int = 0) -> Any:
    """A parallel model and this rank's share of its batch; tied embedding, odd names."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import models as module

    torch.manual_seed(seed)
    model = module.OddGPT(width=16, heads=2, depth=2, dropout=dropout).double()
    torch.manual_seed(0)
    batch = module.odd_gpt().batch
    world = dist.get_world_size() if dist.is_initialized() else 1
    profile = gc.ClusterProfile.preset(f"{world}xH100")
    parallel = gc.compile(
        model, profile, example_inputs=batch, plan=plan, measure=False, seed=5 + seed
    )
    assert parallel.plan.world_size == world
    return parallel, parallel.local_batch(batch)


def adam(parallel: Any) -> torch.optim.Optimizer:
    """Two groups, of which one decays; by name, so the same under any plan."""
    named = list(parallel.named_parameters())
    decays = [p for name, p in named if "weight" in name]
    rest = [p for name, p in named if "weight" not in name]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))


def train(parallel: Any, optimizer: Any, share: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(parallel.step(share).item())
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.95
    return losses


def train_and_save(folder: str, path: str, plan: str, dropout: float, background: bool) -> Any:
    parallel, share = tiny(folder, plan, dropout)
    optimizer = adam(parallel)
    train(parallel, optimizer, share, STEPS)
    handle = save_checkpoint(path, parallel, optimizer, asynchronous=background)
    losses = train(parallel, optimizer, share, MORE)  # what is being saved changes meanwhile
    if handle is not None:
        assert handle.wait().name == f"step-{STEPS:06d}"
    return losses, parallel.full_state_dict()


def load_and_go_on(folder: str, path: str, plan: str, dropout: float) -> Any:
    parallel, share = tiny(folder, plan, dropout, seed=3)  # other values, another seed
    optimizer = adam(parallel)
    loaded = load_checkpoint(path, parallel, optimizer)
    assert (loaded.num_steps, parallel.num_steps) == (STEPS, STEPS)
    losses = train(parallel, optimizer, share, MORE)
    return losses, parallel.full_state_dict()


def alike(found: Any, wanted: Any) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    assert list(found[1]) == list(wanted[1])
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("background", [False, True])
def test_it_goes_on_under_five_other_plans(ranks: Any, tmp_path: Path, background: bool) -> None:
    arguments = (MODELS, str(tmp_path), "all: dp2.zero3", 0.0, background)
    wanted, _ = ranks(2).run(train_and_save, *arguments, timeout_s=500.0)
    assert wanted[0][0] != pytest.approx(wanted[0][-1], rel=1e-3)  # there is something to learn
    for world, plan in OTHER_PLANS[:: 2 if background else 1]:
        arguments = (MODELS, str(tmp_path), plan, 0.0)
        if world == 1:
            found = load_and_go_on(*arguments)
        else:
            found = ranks(world).run(load_and_go_on, *arguments, timeout_s=500.0)[0]
        alike(found, wanted)


def test_stages_are_saved_and_go_on_as_other_stages(ranks: Any, tmp_path: Path) -> None:
    arguments = (MODELS, str(tmp_path), "all: dp2.zero1; pp=2; micro=2", 0.0, True)
    wanted = ranks(4).run(train_and_save, *arguments, timeout_s=500.0)[0]
    for world, plan in STAGES:
        found = ranks(world).run(load_and_go_on, MODELS, str(tmp_path), plan, 0.0, timeout_s=500.0)
        alike(found[0], wanted)


def test_dropout_goes_on_where_it_was(ranks: Any, tmp_path: Path) -> None:
    arguments = (MODELS, str(tmp_path), "all: dp2.zero3", 0.3)
    wanted = ranks(2).run(train_and_save, *arguments, False, timeout_s=500.0)[0]
    alike(ranks(2).run(load_and_go_on, MODELS, str(tmp_path), "all: dp2.zero1", 0.3)[0], wanted)


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def random_states(path: str) -> Any:
    linear = torch.nn.Linear(4, 1)
    x = torch.ones(8, 4)
    world = dist.get_world_size() if dist.is_initialized() else 1
    profile = gc.ClusterProfile.preset(f"{world}xH100")
    plan = f"dp{world}"
    parallel = gc.compile(
        linear, profile, example_inputs=(x,), loss_fn=lambda y, _: y.sum(), plan=plan, measure=False
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    parallel.num_steps = 7
    extra = {"epoch": 3, "scheduler": {"lr": [0.1]}, "of": rank, "x": torch.arange(3)}
    save_checkpoint(path, parallel, extra=extra)
    wanted = draw()
    draw()
    loaded = load_checkpoint(path, parallel)
    assert loaded.path == Path(path) / "step-000007"
    assert (loaded.extra["of"], loaded.extra["epoch"], loaded.extra["scheduler"]) == (
        0, 3, {"lr": [0.1]},
    )  # fmt: skip
    assert torch.equal(loaded.extra["x"], torch.arange(3))
    assert draw() == wanted
    return wanted


def test_extra_and_random_states_of_every_rank_come_back(ranks: Any, tmp_path: Path) -> None:
    one, other = ranks(2).run(random_states, str(tmp_path / "two"))
    assert one != other
    assert random_states(str(tmp_path / "one")) == one  # seeded alike
