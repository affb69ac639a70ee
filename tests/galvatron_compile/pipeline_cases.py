"""A model whose values cross pipeline cuts in every way, and programs of it on real ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from galvatron_compile import notation
from galvatron_compile.compiler import understand
from galvatron_compile.job import Job
from galvatron_compile.lowered import LoweredProgram
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.lower import lower
from galvatron_compile.passes.rewrite import make_mesh, rewrite
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.precision import Precision

WIDTH, LENGTH, BATCH = 4, 6, 8
TESTS = str(Path(__file__).parents[1])
Found = tuple[float, dict[str, torch.Tensor]]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x) * 0.5)) * rotary


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mine, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, y: Any, memory: Any, mask: Any, noise: Any) -> torch.Tensor:
        scores = self.mine(y) @ memory.transpose(1, 2)
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return y + self.other(weights @ memory) * noise


class Both(nn.Module):
    """Two encoder layers, three decoder layers that all look at the encoder's result, a head that
    looks at the first embedding too. Before the layers a mask, a rotary table and noise are made.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.table = nn.Embedding(10, WIDTH)
        self.encoder = nn.ModuleList(Encoder() for _ in range(2))
        self.start = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.ModuleList(Decoder() for _ in range(3))
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.register_buffer("rates", torch.linspace(0.5, 2.0, WIDTH).double())

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = first = self.table(ids)
        rotary = (torch.arange(LENGTH).double()[:, None] * self.rates).cos()
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (ids != 0)[:, None, :]
        noise = F.dropout(torch.ones_like(ids, dtype=torch.float64), self.chance).unsqueeze(-1)
        for layer in self.encoder:
            x = layer(x, rotary)
        y = self.start(first).tanh()
        for layer in self.decoder:
            y = layer(y, x, mask, noise)
        return F.cross_entropy(self.head(y + first).flatten(0, 1), labels.flatten())


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (BATCH, LENGTH), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


def both(chance: float = 0.2) -> nn.Module:
    """The model in float64, the same in every process. chance: of the noise to be 0."""
    torch.manual_seed(0)
    return Both(chance).double()


def odd_gpt() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The equivalence matrix's GPT, whose head has the embedding's weight, with its batch."""
    folder = str(Path(TESTS) / "equivalence")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import models

    case = models.make("odd_gpt")
    return case.model, case.batch


class Captured:
    """A model that is captured once, to be run under several plans."""

    def __init__(self, model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> None:
        self.model, self.batch = model, batch() if inputs is None else inputs
        self.layered = understand(model, self.batch, None, Precision())
        self.names = [layer.name for layer in self.layered.layers]

    def lowered(self, text: str, **options: Any) -> LoweredProgram:
        """The program of this rank under the plan ``text``, on the default group if any."""
        job = Job.current(self.model)
        plan = notation.parse(text, self.names, job.world_size, BATCH)
        mesh = make_mesh(self.layered, plan, job.world_size, job.rank)
        shardings = shard(self.layered, set(plan.strategies))
        program = rewrite(self.layered, plan, mesh, shardings, Precision(), job.device)
        return lower(program, **options)

    def parallel(self, text: str, **options: Any) -> ParallelModel:
        return ParallelModel(self.lowered(text, **options), Precision())


def reference(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Found:
    """Loss and gradients of one process, by plain autograd."""
    model.zero_grad()
    loss = model(**inputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def step(model: ParallelModel, inputs: dict[str, torch.Tensor]) -> Found:
    """Loss on this rank, and gradients (on rank 0)."""
    loss = model.step(model.local_batch(inputs)).item()
    return loss, model.full_gradients()


def same(found: Found, wanted: Found) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    if dist.is_initialized() and dist.get_rank():
        return
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11)
