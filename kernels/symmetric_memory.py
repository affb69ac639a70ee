"""Memory that all ranks of a group can address: torch's on GPUs, mapped files in the interpreter.

Each rank gives two halves of ``capacity_bytes`` for data, and a pad of int64 flags (``sync.py``
says how both are used). Flags of a pad, by place; ``S`` is ``num_slots``::

    [0, n S)        slot s of peer r at r S + s: set by peer r
    [n S, 2 n S)    the same again, for an operation that signals twice or that signals itself
    [2 n S, + n)    the barrier
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.torch_private import symmetric_views


@dataclass
class Symmetric:
    """Memory that all ranks of a group can address.

    buffers, pads: int64 [n], address of each rank's data and flags as seen from this rank.
    data: uint8 [2, capacity_bytes], pad: int64 flags; this rank's own.
    state: int64 [2]: the current epoch, and 1 + the rank that was waited for in vain (0: none).
    """

    buffers: Tensor
    pads: Tensor
    data: Tensor
    pad: Tensor
    capacity_bytes: int
    num_slots: int
    max_polls: int
    owners: list[Any] = field(default_factory=list, repr=False)  # keep every rank's mapping alive

    def __post_init__(self) -> None:
        self.state = torch.zeros(2, dtype=torch.int64, device=self.data.device)
        if self.capacity_bytes % 16:
            raise ValueError(f"capacity_bytes is {self.capacity_bytes}; make it a multiple of 16")


def num_flags(size: int, num_slots: int) -> int:
    return -(-(2 * size * num_slots + size) // 512) * 512  # data behind it begins at a page


def cuda_memory(
    group: dist.ProcessGroup, capacity: int, num_slots: int, polls: int, device: torch.device
) -> Symmetric:
    """torch's symmetric memory; not run yet, as everything that needs a GPU."""
    flag_bytes = 8 * num_flags(dist.get_world_size(group), num_slots)
    views, owners = symmetric_views(flag_bytes + 2 * capacity, device, group)
    views[dist.get_rank(group)].zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)  # no peer signals before all flags are down
    return _symmetric(views, dist.get_rank(group), flag_bytes, capacity, num_slots, polls, owners)


def shared_memory(
    group: dist.ProcessGroup, capacity: int, num_slots: int, polls: int, device: torch.device
) -> Symmetric:
    """Files in memory that all processes of this machine map, and that lose their names at once."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    flag_bytes = 8 * num_flags(size, num_slots)
    num_bytes = flag_bytes + 2 * capacity
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    descriptor, mine = tempfile.mkstemp(prefix="galvatron-", dir=folder)
    try:
        os.truncate(descriptor, num_bytes)  # zeros: all flags are down
        paths: list[Any] = [None] * size
        dist.all_gather_object(paths, mine, group=group)
        views = [torch.from_file(p, shared=True, size=num_bytes, dtype=torch.uint8) for p in paths]
        dist.barrier(group)
    finally:
        os.close(descriptor)
        os.unlink(mine)
    return _symmetric(views, rank, flag_bytes, capacity, num_slots, polls, [])


def _symmetric(
    views: list[Tensor],
    rank: int,
    flag_bytes: int,
    capacity: int,
    num_slots: int,
    polls: int,
    owners: list[Any],
) -> Symmetric:
    """views: every rank's memory, flags first, as seen from this rank."""
    addresses = [view.data_ptr() for view in views]
    assert all(address % 16 == 0 for address in addresses)
    device = views[rank].device
    return Symmetric(
        buffers=torch.tensor([a + flag_bytes for a in addresses], device=device),
        pads=torch.tensor(addresses, device=device),
        data=views[rank][flag_bytes:].view(2, capacity),
        pad=views[rank][:flag_bytes].view(torch.int64),
        capacity_bytes=capacity,
        num_slots=num_slots,
        max_polls=polls,
        owners=[*owners, *views],
    )
