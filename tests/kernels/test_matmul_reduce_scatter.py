"""Matmul + reduce-scatter in real processes against float64, and both products' machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_checks import EPS, NAME, epochs_of, near, of_all_ranks, poisoned

from galvatron_compile.kernels import all_gather_matmul
from galvatron_compile.kernels import matmul_reduce_scatter as tested
from galvatron_compile.kernels.ahead import compile_ahead


def check(
    seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, strided: bool, kernels: bool
) -> None:
    m, k, out = sizes
    with poisoned() as peers:
        rank, n = peers.rank, peers.size
        xs = of_all_ranks(seed, (n * m, k), dtype)
        weights = of_all_ranks(seed + 1, (out, k), dtype)
        dys = of_all_ranks(seed + 2, (m, out), dtype)
        x, weight = xs[rank].clone(), weights[rank].clone()
        if strided:
            x, weight = x.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0]
        x.requires_grad_(), weight.requires_grad_()
        found: list[torch.Tensor] = []

        def run() -> None:
            y = tested.matmul_reduce_scatter(x, weight, n, NAME)
            found.extend((y, *torch.autograd.grad(y, (x, weight), dys[rank])))

        assert not kernels or epochs_of(peers, run) == 2  # forward and its mirror
        if not kernels:
            run()
        y, dx, dweight = found
        near(y, tested.matmul_reduce_scatter_reference(xs, weights)[rank], n * k, roundings=n + 1)
        dy = torch.cat(dys).double()
        near(dx, dy @ weights[rank].double(), out)
        near(dweight, dy.t() @ xs[rank].double(), n * m)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_collectives_equal_the_float64_reference(
    ranks: Any, size: int, dtype: torch.dtype, seed: int
) -> None:
    ranks(size).run(check, seed, (5, 7, 3), dtype, True, False)


@pytest.mark.parametrize(
    ("size", "sizes", "dtype", "strided"),
    [
        (2, (40, 72, 33), torch.float32, False),
        (2, (33, 37, 65), torch.bfloat16, True),
        (2, (1, 1, 1), torch.float16, False),
        (4, (35, 40, 31), torch.float32, True),
        (4, (32, 64, 32), torch.bfloat16, False),
    ],
    ids=str,
)
def test_kernels_equal_the_float64_reference(
    interpreted: Any, size: int, sizes: Any, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    interpreted(size).run(check, seed, sizes, dtype, strided, True)


def in_turn(times: int) -> None:
    """Both products by turns, without a barrier between them."""
    with poisoned() as peers:
        n, rank = peers.size, peers.rank
        weight = torch.eye(4)
        for turn in range(times):
            x = torch.full((2, 4), float(turn + rank))
            y, _ = all_gather_matmul.all_gather_matmul(x, weight, n, NAME)
            assert y[::2, 0].tolist() == [turn + r for r in range(n)], turn
            z = tested.matmul_reduce_scatter(y, weight, n, NAME)
            assert z.tolist() == [[n * (turn + rank)] * 4] * 2, turn


@pytest.mark.parametrize(("size", "times"), [(2, 100), (4, 20)])
def test_many_in_a_row_are_right(interpreted: Any, size: int, times: int) -> None:
    interpreted(size).run(in_turn, times)


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows cannot be scattered to 2 ranks; pad them"):
        tested.matmul_reduce_scatter(torch.ones(5, 3), torch.ones(2, 3), 2, NAME)


CASES = [*all_gather_matmul.ahead(), *tested.ahead()]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("place", range(len(CASES)))
def test_machine_code(place: int, capability: int) -> None:
    kernel, arguments, num_warps = CASES[place]
    if capability == 80:  # as launches choose it (matmul_tiles.block_sizes)
        arguments = {**arguments, "BLOCK_N": 128}
    made = compile_ahead(kernel, arguments, capability=capability, num_warps=num_warps)
    assert made.spilled_bytes == 0
    assert made.num_tensor_core > 0 and (capability == 80 or made.num_wgmma > 0)
    assert made.num_wide_stores > 0
    lines = made.ptx.splitlines()
    releases = [at for at, line in enumerate(lines) if "atom" in line and "sys.release" in line]
    assert releases and any("sys.acquire" in line for line in lines)
    for at in releases:
        before = [x for x in lines[:at] if "bar.sync" in x or "st.global" in x]
        assert before and "bar.sync" in before[-1], "stores are not ordered before the release"
