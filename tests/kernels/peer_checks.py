"""What tests of kernels with peers share. Runs in ranks, by value."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from galvatron_compile.kernels import all_gather_matmul, all_reduce_kernels, matmul_reduce_scatter
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
    """Peers of all ranks. Symmetric memory and what ``empty`` returns are full of NaN, and what
    lies behind a new tensor must stay so."""
    peers = register(NAME, make_peers(capacity_bytes=capacity_bytes, num_slots=num_slots))
    if peers.memory is not None:
        peers.memory.data.fill_(0xFF)
        peers.barrier()
    guards: list[Tensor] = []

    def guarded(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            wanted = make(*args, **kwargs)
            if not wanted.is_floating_point() or isinstance(wanted, FakeTensor):
                return wanted
            size = wanted.numel()
            whole = torch.full((size + 512,), float("nan"), dtype=wanted.dtype)
            guards.append(whole[size:])
            return whole[:size].as_strided(wanted.shape, wanted.stride())

        return made

    with (
        mock.patch.object(Tensor, "new_empty", guarded(Tensor.new_empty)),
        mock.patch.object(torch, "empty_like", guarded(torch.empty_like)),
    ):
        yield peers
    assert all(guard.isnan().all() for guard in guards), "written behind the end of a tensor"


def come_late(peers: Peers, seed: int) -> None:
    """One rank after the other: who does not wait reads what is not there yet."""
    time.sleep(0.02 * ((peers.rank + seed) % peers.size))


@contextmanager
def slow_reader(seconds: float = 0.02) -> Iterator[None]:
    """Inside, this rank reads only a while after what it waited for has come: its peers must not
    overwrite that in the meantime."""

    def slow(wait: Any) -> Any:
        def waited(*args: Any) -> Any:
            arrived = wait(*args)
            time.sleep(seconds)
            return arrived

        return waited

    modules = (all_gather_matmul, all_reduce_kernels, matmul_reduce_scatter)
    patches = [mock.patch.object(module, "wait", slow(module.wait)) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def as_fake(operator: Any, args: tuple[Any, ...], real: tuple[Tensor, ...]) -> None:
    """Assert that the operator promises to compilers what it returned."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        made = operator(*fakes)
    made = (made,) if isinstance(made, Tensor) else made
    for fake, one in zip(made, real, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (one.shape, one.stride(), one.dtype)


def check_synchronisation(made: Any) -> None:
    """In machine code: releases and acquires at system scope; between the stores of all threads and
    the release of one there is a barrier; nothing is read through a cache that is not coherent."""
    lines = made.ptx.splitlines()
    releases = [at for at, line in enumerate(lines) if "atom" in line and "sys.release" in line]
    assert releases and any("sys.acquire" in line for line in lines)
    for at in releases:
        before = [x for x in lines[:at] if "bar.sync" in x or "st.global" in x]
        assert before and "bar.sync" in before[-1], "stores are not ordered before the release"
    assert "ld.global.nc" not in made.ptx and made.count(r"LDG\S*CONSTANT") == 0


def epochs_of(peers: Peers, run: Callable[[], object]) -> int:
    """How many operations of kernels ``run`` began."""
    assert peers.memory is not None
    before = int(peers.memory.state[0])
    run()
    return int(peers.memory.state[0]) - before
