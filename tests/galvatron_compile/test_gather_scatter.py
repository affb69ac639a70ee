"""All-gather and reduce-scatter of flat buffers on gloo, against sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from galvatron_compile.gather_scatter import all_gather, reduce_scatter


def parts_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (100 * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype)


def scattered(dtype: torch.dtype, part: int) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    whole = parts_of(rank, n * part, dtype)
    before = whole.clone()
    output = torch.full((part,), float("nan") if dtype.is_floating_point else -1).to(dtype)
    reduce_scatter(output, whole, None).wait()
    exact = sum(parts_of(r, n * part, dtype).double() for r in range(n))
    assert torch.equal(whole, before)
    mine = torch.as_tensor(exact)[rank * part : (rank + 1) * part].to(dtype)
    # 16-bit sums are rounded once, from float32: at most to a neighbour of the exact one, which
    # n - 1 roundings on the way are not.
    rtol = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    torch.testing.assert_close(output, mine, rtol=rtol, atol=1e-4)


def gathered(dtype: torch.dtype, part: int) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    output = torch.zeros(n * part, dtype=dtype)
    all_gather(output, parts_of(rank, part, dtype), None).wait()
    assert torch.equal(output, torch.cat([parts_of(r, part, dtype) for r in range(n)]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_and_gathers(ranks: Any, world_size: int) -> None:
    pool = ranks(world_size)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for part in (1, 1000):
            pool.run(scattered, dtype, part)
            pool.run(gathered, dtype, part)


def overlapping(count: int) -> None:
    """Several at a time, waited for in another order than started."""
    rank, n = dist.get_rank(), dist.get_world_size()
    outputs = [torch.empty(10) for _ in range(count)]
    wholes = [torch.full((10 * n,), float(rank + place)) for place in range(count)]
    started = [reduce_scatter(o, w, None) for o, w in zip(outputs, wholes, strict=True)]
    for work in reversed(started):
        work.wait()
    for place, output in enumerate(outputs):
        assert output.tolist() == [float(sum(range(n)) + n * place)] * 10


def test_several_are_under_way_at_once(ranks: Any) -> None:
    ranks(2).run(overlapping, 4)
