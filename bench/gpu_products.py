"""Both overlapped products for bench/gpu.py, without peers: with all flags preset against cuBLAS,
and over a link against transfer, then cuBLAS.

The link is PCIe: the buffers of the peers lie in pinned memory of the host, and the kernels read
and store there as they would over NVLink, at whatever rate the machine has (it is measured beside
them). So peers' data really crosses a link while the kernel multiplies; the signals do not.
The matrices are such that link and product take about as long at 50 GB/s.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_check import poisoned, wrong_results
from gpu_peers import alone
from torch import Tensor

from galvatron_compile.kernels import all_gather_matmul, matmul_reduce_scatter
from galvatron_compile.kernels.peers import Peers

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Of a rank of n: m rows of a shard; inner: what is summed over; out: columns."""

    n: int
    m: int
    inner: int
    out: int

    @property
    def flops(self) -> float:
        return 2.0 * self.n * self.m * self.inner * self.out


@dataclass(frozen=True)
class Product:
    """kernel: writes ``y``. blas: PyTorch's product of the same. transfer: what the link carries,
    by the copy engine, where there is a link. exact: ``y`` in float64. wrote: lines for what else
    the kernel wrote wrongly."""

    flops: float
    kernel: Call
    blas: Call
    y: Tensor
    exact: Callable[[], Tensor]
    wrote: Callable[[], list[str]]
    transfer: Call | None = None
    link_bytes: int = 0
    roundings: int = 1

    def wrong(self, name: str) -> list[str]:
        with poisoned():
            self.y.fill_(float("nan"))
            self.kernel()
        return wrong_results(name, self.y, self.exact(), self.roundings) + self.wrote()


# A rank of 8 of a 70B Llama: up projection in, down projection out; over the link, of 2 ranks.
PRESET = {"gather": Shape(8, 1024, 8192, 3584), "scatter": Shape(8, 1024, 3584, 8192)}
LINKED = {"gather": Shape(8, 512, 8192, 14336), "scatter": Shape(8, 512, 14336, 8192)}
TINY = {"gather": Shape(3, 33, 40, 48), "scatter": Shape(3, 33, 40, 48)}


def make(kind: str, shape: Shape, device: torch.device, *, linked: bool) -> Product:
    """kind: gather (all-gather + matmul) or scatter (matmul + reduce-scatter)."""
    return (_gather if kind == "gather" else _scatter)(shape, device, linked)


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _fill(data: list[Tensor], parts: list[Tensor]) -> None:
    """Put each part at the beginning of both halves of a buffer."""
    for buffer, part in zip(data, parts, strict=True):
        buffer.view(torch.bfloat16)[:, : part.numel()] = part.flatten().to(buffer.device)


def _gather(shape: Shape, device: torch.device, linked: bool) -> Product:
    n, m = shape.n, shape.m
    peers, data = alone(n, _capacity(m * shape.inner), device, far=linked)
    assert peers.memory is not None
    if linked:  # the second half of the flags are the own producers'
        peers.memory.pad[n * peers.memory.num_slots :] = 0
    rows, weight = _randn(device, n * m, shape.inner), _randn(device, shape.out, shape.inner)
    x = rows[:m].clone()
    gathered = torch.full_like(rows, float("nan")) if linked else rows.clone()
    _fill(data[1:], list(rows.view(n, -1))[1:])
    y = rows.new_empty(n * m, shape.out)
    out = torch.empty_like(y)
    arrived = torch.empty_like(rows)

    def transfer() -> None:
        for rank in range(1, n):
            far = data[rank].view(torch.bfloat16)[0, : m * shape.inner]
            arrived[rank * m : (rank + 1) * m].view(-1).copy_(far, non_blocking=True)

    return Product(
        shape.flops,
        lambda: all_gather_matmul.launch(x, weight, y, gathered, peers, ready=not linked),
        lambda: torch.mm(rows, weight.t(), out=out),
        y,
        lambda: rows.double() @ weight.double().t(),
        lambda: wrong_results("gathered", gathered, rows) + _checked(peers),
        transfer if linked else None,
        (n - 1) * m * shape.inner * 2,
    )


def _scatter(shape: Shape, device: torch.device, linked: bool) -> Product:
    n, m, numel = shape.n, shape.m, shape.m * shape.out
    peers, data = alone(n, _capacity(n * numel), device, far=linked)
    x, weight = _randn(device, n * m, shape.inner), _randn(device, shape.out, shape.inner)
    # Partial tiles of the others for this rank, of the size that its own have.
    partial = _randn(device, n, m, shape.out) * shape.inner**0.5
    _fill(data[:1], [partial])
    y = x.new_empty(m, shape.out)
    product = x.new_empty(n * m, shape.out)

    def exact() -> Tensor:
        own = x[:m].double() @ weight.double().t()
        return own + partial[1:].double().sum(0)

    def sent() -> Tensor:
        """What the last launch put into the buffers of the others."""
        assert peers.memory is not None
        half = int(peers.memory.state[0]) % 2
        halves = [buffer.view(torch.bfloat16)[half, :numel] for buffer in data[1:]]
        return torch.cat([part.to(device) for part in halves]).view(-1, shape.out)

    def transfer() -> None:
        for rank in range(1, n):
            far = data[rank].view(torch.bfloat16)[0, :numel]
            far.copy_(product[rank * m : (rank + 1) * m].view(-1), non_blocking=True)

    return Product(
        shape.flops,
        lambda: matmul_reduce_scatter.launch(x, weight, y, peers, ready=not linked),
        lambda: torch.mm(x, weight.t(), out=product),
        y,
        exact,
        lambda: wrong_results("tiles sent", sent(), x[m:].double() @ weight.double().t())
        + _checked(peers),
        transfer if linked else None,
        (n - 1) * numel * 2,
        roundings=2,
    )


def _capacity(numel: int) -> int:
    return -(-2 * numel // 4096) * 4096


def _checked(peers: Peers) -> list[str]:
    """A wait in vain, as a line."""
    try:
        peers.check()
    except RuntimeError as error:
        return [str(error)]
    return []
