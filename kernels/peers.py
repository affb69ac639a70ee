"""The ranks that a kernel talks to: addresses of their buffers and flags, and a name to find them.

Each rank gives *symmetric memory* that all ranks of the group can address: two halves of
``capacity_bytes`` for data, and a pad of int64 flags (``sync.py`` says how both are used).

Flags of a pad, by place; ``S`` is ``num_slots``::

    [0, n S)        slot s of peer r at r S + s: set by peer r
    [n S, 2 n S)    the same again, for an operation that signals twice or that signals itself
    [2 n S, + n)    the barrier

``torch.library`` operators take no objects, so they find their peers by name: :func:`register`
once, then pass the name. Peers without symmetric memory (gloo on the CPU, or NCCL without peer
access) are registered too: operators then use the collectives of their process group.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.kernels.base import HAS_TRITON, INTERPRETED, runs_kernels
from galvatron_compile.kernels.sync import barrier_kernel

# A poll takes perhaps a microsecond on a GPU, so this is minutes: ranks may be apart for as long as
# one of them compiles. It takes 20 us in the interpreter.
_POLLS_GPU, _POLLS_INTERPRETED = 300_000_000, 3_000_000


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


@dataclass
class Peers:
    """``size`` ranks of a process group, of which this process is ``rank``.

    All ranks make the same operations in the same order, one after the other, from one thread.

    group: for collectives without kernels. memory: None where there is no symmetric memory.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    memory: Symmetric | None = None
    _begun: bool = field(default=False, init=False, repr=False)
    _stream: Any = field(default=None, init=False, repr=False)  # of the last operation

    def begin(self) -> Symmetric:
        """Begin an operation: the next epoch. Counted on the device, so a CUDA graph replays it.

        Raises:
            RuntimeError: the operation before was not ended, since something raised in it: this
                rank has counted an epoch that it did not signal.
        """
        assert self.memory is not None
        if self._begun:
            raise RuntimeError("an operation of these peers failed at its launch; make new Peers")
        self._begun = True
        state = self.memory.state
        if state.is_cuda:
            self._follow(torch.cuda.current_stream(state.device))
        state[:1].add_(1)
        return self.memory

    def end(self) -> None:
        """End an operation. On the CPU a wait that failed is known now; on CUDA call ``check``."""
        assert self.memory is not None
        self._begun = False
        if not self.memory.state.is_cuda:
            self.check()

    def _follow(self, stream: Any) -> None:
        """Let ``stream`` wait for the last operation, if that went to another stream.

        A capture and what is not captured cannot wait for each other: there ``torch.cuda.graph``,
        which synchronises, and the stream that replays must keep the order.
        """
        last, self._stream = self._stream, stream
        if last is not None and last != stream and _captures(last) == _captures(stream):
            stream.wait_stream(last)

    def check(self) -> None:
        """Waits for the device.

        Raises:
            RuntimeError: a rank did not signal in time; these peers can not be used any more.
        """
        if self.memory is not None and (failed := int(self.memory.state[1])):
            raise RuntimeError(
                f"rank {self.rank} of {self.size} waited in vain for rank {failed - 1}: that rank "
                "has died, or did not make the same calls in the same order; make new Peers"
            )

    def barrier(self) -> None:
        """All ranks wait for each other: on the device, the host goes on, if there are kernels."""
        if self.size == 1:
            return
        if self.memory is None:
            dist.barrier(self.group)
            return
        memory = self.begin()
        first = 2 * self.size * memory.num_slots
        barrier_kernel[(1,)](
            memory.pads, memory.state, first, self.rank, self.size, memory.max_polls, num_warps=1
        )
        self.end()

    def runs(self, *tensors: Tensor, num_bytes: int, num_slots: int) -> bool:
        """Whether kernels do an operation that needs so many bytes, and flags for each peer.

        Depends on shapes and dtypes only, so all ranks decide alike.
        """
        memory = self.memory
        return (
            memory is not None
            and num_bytes <= memory.capacity_bytes
            and num_slots <= memory.num_slots
            and runs_kernels(*tensors)
        )


def _captures(stream: Any) -> bool:
    """Whether a CUDA graph captures what is launched on a stream."""
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


_REGISTERED: dict[str, Peers] = {}  # operators take strings only


def register(name: str, peers: Peers) -> Peers:
    """Let operators find ``peers`` under ``name``; a later call replaces an earlier one."""
    _REGISTERED[name] = peers
    return peers


def peers_of(name: str, n: int) -> Peers:
    """What was registered.

    Raises:
        ValueError: nothing was registered, or another number of ranks.
    """
    if n == 1:
        return Peers(0, 1)
    if name not in _REGISTERED:
        known = ", ".join(map(repr, _REGISTERED)) or "none"
        raise ValueError(f"no peers are registered as {name!r} (known: {known}); call register")
    peers = _REGISTERED[name]
    if peers.size != n:
        raise ValueError(f"peers {name!r} are {peers.size} ranks, the operator was made for {n}")
    return peers


def make_peers(
    group: dist.ProcessGroup | None = None,
    *,
    capacity_bytes: int = 256 << 20,
    num_slots: int = 4096,
    device: torch.device | str = "cpu",
    max_polls: int | None = None,
) -> Peers:
    """Peers over a process group (default: all ranks); a collective call.

    capacity_bytes: of one half of the data; an operation that needs more uses collectives.
    num_slots: flags that one peer sets in one operation, at most.

    Raises:
        ValueError: ranks asked for different sizes.
    """
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is not initialised"
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    device = torch.device(device)
    make: Callable[..., Symmetric] | None = None
    if HAS_TRITON and device.type == "cuda":
        make = _cuda_memory
    elif INTERPRETED and device.type == "cpu":
        make = _shared_memory
    if make is None:
        return Peers(rank, size, group)
    wanted = (-(-capacity_bytes // 4096) * 4096, num_slots)
    all_wanted: list[Any] = [None] * size
    dist.all_gather_object(all_wanted, wanted, group=group)
    if any(other != wanted for other in all_wanted):
        raise ValueError(f"ranks asked for different (capacity_bytes, num_slots): {all_wanted}")
    polls = max_polls or (_POLLS_GPU if device.type == "cuda" else _POLLS_INTERPRETED)
    return Peers(rank, size, group, make(group, *wanted, polls, device))


def _num_flags(size: int, num_slots: int) -> int:
    return -(-(2 * size * num_slots + size) // 512) * 512  # data behind it begins at a page


def _cuda_memory(
    group: dist.ProcessGroup, capacity: int, num_slots: int, polls: int, device: torch.device
) -> Symmetric:
    """torch's symmetric memory: private API, read in the sources of torch 2.13, not run yet."""
    import torch.distributed._symmetric_memory as symmetric_memory

    flag_bytes = 8 * _num_flags(dist.get_world_size(group), num_slots)
    whole = symmetric_memory.empty(flag_bytes + 2 * capacity, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(whole, group.group_name)
    whole.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)  # no peer signals before all flags are down
    views = [handle.get_buffer(r, whole.shape, whole.dtype) for r in range(handle.world_size)]
    owners = [handle, whole]
    return _symmetric(views, dist.get_rank(group), flag_bytes, capacity, num_slots, polls, owners)


def _shared_memory(
    group: dist.ProcessGroup, capacity: int, num_slots: int, polls: int, device: torch.device
) -> Symmetric:
    """Files in memory that all processes of this machine map, and that lose their names at once."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    flag_bytes = 8 * _num_flags(size, num_slots)
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


def plain_all_gather(x: Tensor, peers: Peers) -> Tensor:
    """``[rows, …]`` of every rank, one behind the other: ``[n rows, …]``."""
    whole = x.new_empty((peers.size * x.shape[0], *x.shape[1:]))
    if x.numel():
        # torch 2.13 renamed it and warns at every call of the old name.
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(whole, x.contiguous(), group=peers.group)
    return whole


def plain_reduce_scatter(x: Tensor, peers: Peers) -> Tensor:
    """``[n rows, …]`` to this rank's rows of the SUM over ranks, ``[rows, …]``.

    Floats of 16 bits are summed in float32, others in their dtype. An exchange, because gloo
    reduces whole copies and NCCL in the dtype of ``x``.
    """
    parts = x.new_empty((peers.size, x.shape[0] // peers.size, *x.shape[1:]))
    if x.numel():
        dist.all_to_all_single(parts.view(-1), x.contiguous().view(-1), group=peers.group)
    wide = torch.float32 if x.is_floating_point() and x.element_size() < 4 else x.dtype
    return parts.sum(0, dtype=wide).to(x.dtype)
