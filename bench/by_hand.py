"""The strategies of bench/step_time.py as a person writes them with PyTorch's own parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

Batch = dict[str, Tensor]


class ByHand:
    """A module parallelised by hand, with the same step as ours: ``step(local_batch) -> loss``.

    data_size: ranks that the batch is cut over. The loss returned is the global mean, which holds
    here because every rank has as many labels.
    """

    def __init__(self, module: nn.Module, data_size: int) -> None:
        self.module = module
        self.data_size = data_size

    def local_batch(self, batch: Batch) -> Batch:
        if self.data_size == 1:
            return batch
        rank = dist.get_rank()
        return {name: value.chunk(self.data_size)[rank] for name, value in batch.items()}

    def step(self, batch: Batch) -> Tensor:
        loss: Tensor = self.module(**batch).loss
        loss.backward()
        total = loss.detach().clone()
        if self.data_size > 1:
            dist.all_reduce(total)  # ours reports the global mean as well
        return total / self.data_size

    def parameters(self) -> Any:
        return self.module.parameters()


def ddp(model: nn.Module) -> ByHand:
    return ByHand(DistributedDataParallel(model), dist.get_world_size())


def zero3(model: nn.Module) -> ByHand:
    """``fully_shard`` for every block, then for the rest, as its tutorial does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return ByHand(model, dist.get_world_size())


def tensor_parallel(model: nn.Module) -> ByHand:
    """Megatron's cut of every Llama block: columns, then rows; embedding and head are replicated.

    Attention reads its number of heads from the shapes of its projections.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    columns += ("mlp.gate_proj", "mlp.up_proj")
    cut: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    cut |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for block in model.model.layers:
        parallelize_module(block, mesh, cut)
    return ByHand(model, 1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW over groups that its fused-list form takes: DTensors and plain tensors do not mix."""
    split: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        split.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in split.values()], lr=1e-4, foreach=True)


BY_HAND = {name: ("DDP", ddp) for name in ("dp2", "dp2.zero1", "dp2.zero2")}
BY_HAND |= {"dp2.zero3": ("fully_shard", zero3)}
BY_HAND |= {"tp2": ("parallelize_module", tensor_parallel)}
