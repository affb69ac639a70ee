"""A small model and its trainer, for tests of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import galvatron_compile as gc
from galvatron_compile.checkpoint import save_checkpoint


class Net(nn.Module):
    """``also`` is the second name of ``one``; a buffer and a layer that forward does not use."""

    def __init__(self, width: int = 6, extra: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, width), nn.Linear(width, 3)
        self.also = self.one
        if extra:
            self.idle = nn.Linear(2, 2)
        self.register_buffer("count", torch.tensor(7))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x))).square().mean()


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)}


def compiled(net: nn.Module | None = None, plan: str = "dp1") -> Any:
    profile = gc.ClusterProfile.preset("2xH100" if dist.is_initialized() else "1xH100")
    return gc.compile(
        Net() if net is None else net, profile, example_inputs=batch(), plan=plan, measure=False
    )


def stepped(parallel: Any, optimizer: Any = None, count: int = 1) -> float:
    for _ in range(count):
        loss = parallel.step(parallel.local_batch(batch())).item()
        if optimizer is not None:
            optimizer.step()
        parallel.zero_grad()
    return loss


def adam(parallel: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parallel.parameters(), lr=0.01)


def two_checkpoints(folder: Path) -> Path:
    """Checkpoints of steps 1 and 2, with the optimizer."""
    parallel = compiled()
    optimizer = adam(parallel)
    for _ in range(2):
        stepped(parallel, optimizer)
        save_checkpoint(folder, parallel, optimizer)
    return folder


def copied(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "saved"))
