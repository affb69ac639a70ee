"""The ranks that a kernel talks to, and a name to find them (``symmetric_memory.py``: memory).

``torch.library`` operators take no objects, so they find their peers by name: :func:`register`
once, then pass the name. Peers without symmetric memory (gloo on the CPU, or NCCL without peer
access) are registered too: operators then use the collectives of their process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.kernels.base import HAS_TRITON, INTERPRETED, runs_kernels
from galvatron_compile.kernels.symmetric_memory import Symmetric, cuda_memory, shared_memory
from galvatron_compile.kernels.sync import barrier_kernel

# A poll takes perhaps a microsecond on a GPU, so this is minutes: ranks may be apart for as long as
# one of them compiles. It takes 20 us in the interpreter.
_POLLS_GPU, _POLLS_INTERPRETED = 300_000_000, 3_000_000


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
    _seen: Tensor | None = field(default=None, init=False, repr=False)  # pinned copy of the state

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

    def glance(self) -> None:
        """As :meth:`check`, without waiting for the device: a failure is told by one of the next
        calls. On the CPU nothing is left to tell."""
        if self.memory is None or not self.memory.state.is_cuda:
            return
        if self._seen is None:
            self._seen = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        if int(self._seen[1]):
            self.check()
        self._seen.copy_(self.memory.state, non_blocking=True)

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
        make = cuda_memory
    elif INTERPRETED and device.type == "cpu":
        make = shared_memory
    if make is None:
        return Peers(rank, size, group)
    wanted = (-(-capacity_bytes // 4096) * 4096, num_slots)
    all_wanted: list[Any] = [None] * size
    dist.all_gather_object(all_wanted, wanted, group=group)
    if any(other != wanted for other in all_wanted):
        raise ValueError(f"ranks asked for different (capacity_bytes, num_slots): {all_wanted}")
    polls = max_polls or (_POLLS_GPU if device.type == "cuda" else _POLLS_INTERPRETED)
    return Peers(rank, size, group, make(group, *wanted, polls, device))


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
