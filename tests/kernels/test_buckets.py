"""Packing, unpacking and summing buckets, against the references, in PyTorch and as kernels."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_checks import close, launched, watched

from galvatron_compile.kernels import base
from galvatron_compile.kernels import buckets as tested
from galvatron_compile.kernels.ahead import compile_ahead

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layout(draw: random.Random, parts: int) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
    """Shapes, offsets and chunks of some tensors with gaps between them."""
    shapes = [(1,), (draw.randrange(1, 9), 33), (draw.randrange(1, 5000),), (3, 5, 7)]
    draw.shuffle(shapes)
    chunks = [-(-torch.Size(shape).numel() // parts) + draw.randrange(3) for shape in shapes]
    offsets, end = [], 0
    for chunk in chunks:
        offsets.append(end)
        end += -(-chunk // 32) * 32
    return shapes, offsets, chunks


def check_pack(seed: int, parts: int, dtype: torch.dtype, kernels: bool) -> None:
    assert base.INTERPRETED is kernels
    draw = random.Random(seed)
    torch.manual_seed(seed)
    shapes, offsets, chunks = layout(draw, parts)
    gradients = [torch.randn(*s[:-1], 2 * s[-1]).to(dtype)[..., ::2] for s in shapes]
    shard = offsets[-1] + chunks[-1] + 5
    out = torch.full((parts, shard), float("nan"))
    with watched(tested, "copy_kernel") as counts:
        tested.pack(gradients, out, offsets, chunks, 0.25)
    assert launched(counts) == ({"copy_kernel"} if kernels else set())
    wanted = tested.pack_reference(gradients, parts, shard, offsets, chunks, 0.25)
    written = torch.zeros(shard, dtype=torch.bool)
    for offset, chunk in zip(offsets, chunks, strict=True):
        written[offset : offset + chunk] = True
    assert torch.equal(out[:, written].double(), wanted[:, written])  # float32 holds them exactly
    assert out[:, ~written].isnan().all(), "what lies between chunks was written"


def check_unpack(seed: int, parts: int, dtype: torch.dtype, kernels: bool) -> None:
    torch.manual_seed(seed)
    _, offsets, chunks = layout(random.Random(seed), parts)
    gathered = torch.randn(parts, offsets[-1] + chunks[-1]).to(dtype)
    regions = [torch.full((parts * chunk,), float("nan"), dtype=dtype) for chunk in chunks]
    with watched(tested, "copy_kernel") as counts:
        tested.unpack(gathered, regions, offsets, chunks)
    assert launched(counts) == ({"copy_kernel"} if kernels else set())
    for region, offset, chunk in zip(regions, offsets, chunks, strict=True):
        assert torch.equal(region.view(parts, chunk), gathered[:, offset : offset + chunk])


def check_sum(seed: int, parts: int, dtype: torch.dtype, kernels: bool) -> None:
    torch.manual_seed(seed)
    for count in (1, 4097):
        given = torch.randn(parts, count).to(dtype)
        out = torch.full((count,), float("nan"), dtype=dtype)
        with watched(tested, "sum_kernel") as counts:
            tested.sum_parts(given, out)
        assert launched(counts) == ({"sum_kernel"} if kernels else set())
        wide = given.double()
        close(out, wide.sum(0), terms=parts, what="sum", summed=wide.abs().sum(0))


def check_blocks(seed: int, kernels: bool) -> None:
    """Chunks of several blocks, whole ones and not; three tensors (no power of 2) of one dtype."""
    assert base.INTERPRETED is kernels
    torch.manual_seed(seed)
    parts, offsets, chunks = 2, [0, 256, 384, 514], [200, 128, 130, 6]
    sizes = [290, 256, 200, 12]  # the first ends inside a block that its chunk fills
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    given = [torch.randn(n).to(d) for n, d in zip(sizes, dtypes, strict=True)]
    with mock.patch.object(tested, "BLOCK", 64), watched(tested, "copy_kernel") as counts:
        around = torch.full((parts, 600), float("nan"))
        out = around[:, :520]  # rows with gaps between them
        tested.pack(given, out, offsets, chunks, 0.25)
        # Views with NaN behind: of a region that is shorter than its chunks nothing more is there.
        spaces = [
            torch.full((n + 64,), float("nan"), dtype=x.dtype)
            for n, x in zip(sizes, given, strict=True)
        ]
        regions = [space[:n] for n, space in zip(sizes, spaces, strict=True)]
        tested.unpack(out, regions, offsets, chunks)
    assert counts == {"copy_kernel": 4 if kernels else 0}  # one for each dtype
    wanted = tested.pack_reference(given, parts, 520, offsets, chunks, 0.25)
    for offset, chunk in zip(offsets, chunks, strict=True):
        columns = slice(offset, offset + chunk)
        assert torch.equal(out[:, columns].double(), wanted[:, columns])
        out[:, columns] = float("nan")
    assert around.isnan().all(), "what lies between or behind chunks was written"
    for region, space, x in zip(regions, spaces, given, strict=True):
        assert torch.equal(region, x * 0.25) and space[x.numel() :].isnan().all()


def check_sums_are_float32(kernels: bool) -> None:
    """A thousand ones of bfloat16, which itself cannot count beyond 256."""
    assert base.INTERPRETED is kernels
    out = torch.zeros(3)
    tested.sum_parts(torch.ones(1000, 3, dtype=torch.bfloat16), out)
    assert out.tolist() == [1000.0] * 3


def check_tables_are_kept(seed: int) -> None:
    """The same tensors need one table; others, at other addresses, need one of their own."""
    torch.manual_seed(seed)
    tested._table.cache_clear()
    first, second = torch.randn(8), torch.randn(8)
    out = torch.zeros(1, 8)
    for given in (first, second, first):
        tested.pack([given], out, [0], [8])
        assert torch.equal(out[0], given)
    info = tested._table.cache_info()
    assert (info.hits, info.misses) == (1, 2)


CHECKS = [check_pack, check_unpack, check_sum]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", range(len(CHECKS)))
def test_kernels_equal_the_reference(
    interpreted: Any, seed: int, place: int, dtype: torch.dtype
) -> None:
    for parts in (1, 3):
        interpreted(1).run(CHECKS[place], seed, parts, dtype, True)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("place", range(len(CHECKS)))
def test_without_kernels_they_do_the_same(seed: int, place: int, dtype: torch.dtype) -> None:
    if dtype != torch.float64 or CHECKS[place] is not check_pack:  # which packs into float32
        CHECKS[place](seed, 4, dtype, False)


def test_blocks(interpreted: Any, seed: int) -> None:
    check_blocks(seed, False)
    interpreted(1).run(check_blocks, seed, True)


def test_sums_are_float32(interpreted: Any) -> None:
    check_sums_are_float32(False)
    interpreted(1).run(check_sums_are_float32, True)


def test_tables_are_kept(interpreted: Any, seed: int) -> None:
    interpreted(1).run(check_tables_are_kept, seed)


def test_opcheck() -> None:
    given = [torch.randn(7), torch.randn(4)]
    bucket, places = torch.zeros(2, 8), ([0, 4], [4, 2])
    torch.library.opcheck(torch.ops.galvatron.bucket_pack_, (given, bucket, *places, 0.5))
    torch.library.opcheck(torch.ops.galvatron.bucket_unpack_, (bucket, given, *places))
    torch.library.opcheck(torch.ops.galvatron.sum_parts_, (torch.randn(3, 5), torch.zeros(5)))


def test_moved_bytes() -> None:
    """As counted by hand: 10 bfloat16 elements in 12 of a float32 bucket; 3 parts of 5."""
    assert tested.moved_bytes(10, 2, 12, 4) == 20 + 48
    assert tested.sum_moved_bytes(3, 5, 2, 4) == 5 * (2 + 2 + 2 + 4)


def test_what_does_not_fit_is_refused() -> None:
    out = torch.zeros(2, 8)
    with pytest.raises(ValueError):
        tested.pack([torch.zeros(17)], out, [0], [8])
    with pytest.raises(ValueError):
        tested.pack([torch.zeros(8)], out, [6], [4])
    with pytest.raises(ValueError):
        tested.unpack(out, [torch.zeros(4, 4).t()], [0], [8])
    with pytest.raises(ValueError, match="contiguous"):
        tested.sum_parts(out, torch.zeros(9))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("place", range(len(tested.ahead())))
def test_machine_code(place: int, capability: int) -> None:
    kernel, arguments, num_warps = tested.ahead()[place]
    made = compile_ahead(kernel, arguments, capability=capability, num_warps=num_warps)
    assert made.spilled_bytes == 0 and made.num_wide_loads > 0 and made.num_wide_stores > 0
