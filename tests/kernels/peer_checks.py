"""What tests of kernels with peers share. Runs in ranks, by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.kernels.peers import Peers, make_peers, register

NAME = "test"
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def of_all_ranks(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The same list on every rank; an item is one rank's tensor."""
    generator = torch.Generator().manual_seed(seed)
    size = dist.get_world_size()
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(size)]


def near(got: Tensor, wanted: Tensor, length: int, roundings: int = 1) -> None:
    """As exact as float32 sums of ``length`` normal numbers or products, rounded to the dtype.

    roundings: how often, where partial sums are too; the interpreter cuts bfloat16 off.
    """
    bound = 5 * length**0.5 * (roundings * EPS[got.dtype] + length * EPS[torch.float32])
    assert got.isfinite().all(), "an element was never written, or a wait failed"
    error = (got.double() - wanted).abs().max().item()
    assert error <= bound, f"{error:g} > {bound:g} for {got.dtype} {tuple(got.shape)}"


@contextmanager
def poisoned(capacity_bytes: int = 1 << 16, num_slots: int = 64) -> Iterator[Peers]:
    """Peers of all ranks. Symmetric memory and what ``empty`` returns are full of NaN."""
    peers = register(NAME, make_peers(capacity_bytes=capacity_bytes, num_slots=num_slots))
    torch.use_deterministic_algorithms(True)
    try:
        if peers.memory is not None:
            peers.memory.data.fill_(0xFF)
            peers.barrier()
        yield peers
    finally:
        torch.use_deterministic_algorithms(False)


def epochs_of(peers: Peers, run: Callable[[], object]) -> int:
    """How many operations of kernels ``run`` began."""
    assert peers.memory is not None
    before = int(peers.memory.state[0])
    run()
    return int(peers.memory.state[0]) - before
