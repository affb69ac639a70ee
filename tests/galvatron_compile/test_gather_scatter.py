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
    """Several of both kinds at a time, waited for in another order than started."""
    rank, n = dist.get_rank(), dist.get_world_size()
    sums = [torch.empty(10) for _ in range(count)]
    wholes = [torch.full((10 * n,), float(rank + place)) for place in range(count)]
    gathers = [torch.empty(3 * n) for _ in range(count)]
    parts = [torch.full((3,), float(10 * rank + place)) for place in range(count)]
    started = []
    for place in range(count):
        started.append(reduce_scatter(sums[place], wholes[place], None))
        started.append(all_gather(gathers[place], parts[place], None))
    for work in reversed(started):
        work.wait()
    for place in range(count):
        assert sums[place].tolist() == [float(sum(range(n)) + n * place)] * 10
        assert gathers[place].view(n, 3)[:, 0].tolist() == [10.0 * r + place for r in range(n)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_are_under_way_at_once(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(overlapping, 4)


def in_place() -> None:
    """A part that lies in the output already, and one that does not, where autograd watches."""
    rank, n = dist.get_rank(), dist.get_world_size()
    output = torch.zeros(n * 5, requires_grad=True)
    with torch.no_grad():
        output[rank * 5 : rank * 5 + 5].fill_(float(rank + 1))
    all_gather(output, output[rank * 5 : rank * 5 + 5], None).wait()
    assert output.view(n, 5)[:, 0].tolist() == [r + 1.0 for r in range(n)]
    all_gather(output, torch.full((5,), 7.0 + rank, requires_grad=True), None).wait()
    assert output.view(n, 5)[:, 0].tolist() == [r + 7.0 for r in range(n)]
    assert output.is_leaf and output.grad_fn is None


def test_a_gather_may_read_where_it_writes(ranks: Any) -> None:
    ranks(2).run(in_place)


def of_several_groups() -> None:
    """Two groups of two ranks and that of all, whose messages are under way at the same time."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = [0, 2] if rank % 2 == 0 else [1, 3]
    pair, place = pairs[rank % 2], mine.index(rank)
    started, wanted = [], []
    for turn in range(3):
        sums, both, everyone = torch.empty(4), torch.empty(6), torch.empty(20)
        whole = torch.arange(8.0) + 100 * rank + turn
        started.append(reduce_scatter(sums, whole, pair))
        started.append(all_gather(everyone, torch.full((5,), 10.0 * rank + turn), None))
        started.append(all_gather(both, torch.full((3,), 20.0 * rank + turn), pair))
        part = torch.arange(8.0)[4 * place : 4 * place + 4]
        wanted.append((sums, 2 * (part + turn) + 100 * sum(mine)))
        each = torch.tensor([10.0 * r + turn for r in range(4)])
        wanted.append((everyone, each.repeat_interleave(5)))
        wanted.append((both, torch.tensor([20.0 * r + turn for r in mine]).repeat_interleave(3)))
    for work in reversed(started):
        work.wait()
    for found, expected in wanted:
        assert torch.equal(found, expected)
    dist.barrier()
    dist.destroy_process_group(pair)


def test_messages_of_several_groups_do_not_mix(ranks: Any) -> None:
    ranks(4).run(of_several_groups)


def fails_to_start() -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", broken)
        patch.setattr(dist, "irecv", broken)
        work = all_gather(torch.empty(4), torch.zeros(2), None)
        with pytest.raises(RuntimeError, match="Connection closed"):
            work.wait()
    all_gather(torch.empty(4), torch.zeros(2), None).wait()  # the next one starts


def test_what_fails_on_the_other_thread_is_raised_by_who_waits(ranks: Any) -> None:
    ranks(2).run(fails_to_start)
