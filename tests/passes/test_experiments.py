"""Which layer graphs are timed, and at which sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import understand
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import Experiment
from galvatron_compile.passes.annotate import Workload, micro_batch_counts
from galvatron_compile.passes.experiments import experiments
from galvatron_compile.passes.layer_estimate import Estimator
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy

WIDTH, HIDDEN = 64, 256
CPU = torch.device("cpu")
STRATEGIES = (Strategy(dp=2), Strategy(dp=2, zero=3), Strategy(tp=2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def layered() -> LayeredGraph:
    return understand(Model(), {"x": torch.randn(4, 8, WIDTH)}, None, Precision())


def blocks(layered: LayeredGraph, batch: int, memory_bytes: int) -> list[Experiment]:
    """The experiments with the class of the blocks, the only one with parameters."""
    estimator = Estimator(layered, shard(layered, STRATEGIES), ClusterProfile.preset("2xH100"))
    workload = Workload(2, batch, micro_batch_counts(batch), Precision())
    (index,) = {layer.class_index for layer in layered.layers if layer.name == "blocks.0"}
    uses = [(index, strategy) for strategy in STRATEGIES]
    return experiments(layered, estimator, uses, workload, CPU, memory_bytes)


def test_each_form_is_timed_once_at_the_sizes_that_plans_may_use(layered: LayeredGraph) -> None:
    data, tensor = blocks(layered, 16, 2**30)
    assert (data.form[1:], data.sizes, data.first) == ((1, False), (1, 2, 4, 8), 1)
    assert (tensor.form[1:], tensor.sizes, tensor.first) == ((2, False), (1, 2, 4, 8, 16), 1)


def test_sizes_beyond_the_memory_are_left_out(layered: LayeredGraph) -> None:
    """A sample of the hidden layer is 8 KiB: all 2**20 of them are 8 GiB, before the gradient."""
    data, _ = blocks(layered, 2**20, 2**28)
    assert data.sizes[-1] > 2**9 and data.sizes[-1] * 8 * HIDDEN * 4 < 2**28
    assert data.first < data.sizes[-1]
    # Nothing that plans use fits: it begins with a single sample, from which times are scaled.
    (data, _) = blocks(layered, 2**20, 2**21)
    assert (data.sizes, data.first) == ((), 1)
    assert blocks(layered, 2**20, 2**10) == []


def test_the_first_size_is_a_quick_one(layered: LayeredGraph) -> None:
    """Where even the smallest size of a plan may take long, less is run first."""
    data, tensor = blocks(layered, 2**20, 2**40)
    assert data.first < min(data.sizes) and tensor.first < min(tensor.sizes)
    assert data.first < tensor.first  # half of the work
