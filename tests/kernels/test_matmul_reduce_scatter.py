"""Matmul + reduce-scatter in real processes against float64, and both products' machine code."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peer_checks import (
    EPS,
    NAME,
    as_fake,
    check_synchronisation,
    come_late,
    epochs_of,
    near,
    of_all_ranks,
    poisoned,
    slow_reader,
)

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
        come_late(peers, seed)

        def run() -> None:
            y = tested.matmul_reduce_scatter(x, weight, n, NAME)
            found.extend((y, *torch.autograd.grad(y, (x, weight), dys[rank])))
            as_fake(tested.matmul_reduce_scatter, (x, weight, n, NAME), (y,))

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
    """Both products by turns, without a barrier between them; then each with a slow reader."""
    with poisoned() as peers:
        n, rank = peers.size, peers.rank
        weight = torch.eye(4)

        def gather(turn: int) -> torch.Tensor:
            x = torch.full((2, 4), float(turn + rank))
            y, _ = all_gather_matmul.all_gather_matmul(x, weight, n, NAME)
            assert y[::2, 0].tolist() == [turn + r for r in range(n)], turn
            return y

        def scatter(turn: int, y: torch.Tensor) -> None:
            z = tested.matmul_reduce_scatter(y, weight, n, NAME)
            assert z.tolist() == [[n * (turn + rank)] * 4] * 2, turn

        for turn in range(times):
            scatter(turn, gather(turn))
        for slow in (0, n - 1):
            with slow_reader() if slow == rank else nullcontext():
                for turn in range(2):
                    gather(turn)
                for turn in range(2):
                    rows = torch.arange(n).float().repeat_interleave(2)[:, None]
                    scatter(turn, (turn + rows).expand(2 * n, 4))


@pytest.mark.parametrize(("size", "times"), [(2, 60), (4, 12)])
def test_many_in_a_row_are_right(interpreted: Any, size: int, times: int) -> None:
    interpreted(size).run(in_turn, times)


def one_gradient() -> None:
    """Where only one factor needs a gradient, only that is made."""
    with poisoned() as peers:
        n, rank = peers.size, peers.rank
        x, weight = torch.full((n, 2), 3.0), torch.full((4, 2), 5.0)
        dy = torch.full((1, 4), float(rank))
        for needs_x in (True, False):
            factor = (x if needs_x else weight).requires_grad_()
            found: list[torch.Tensor] = []

            def run(factor: torch.Tensor = factor, found: list[torch.Tensor] = found) -> None:
                y = tested.matmul_reduce_scatter(x, weight, n, NAME)
                found.extend(torch.autograd.grad(y, factor, dy))

            assert epochs_of(peers, run) == 2
            rows = torch.arange(n).float()[:, None].expand(n, 4)
            wanted = rows @ weight if needs_x else rows.t() @ x
            assert torch.equal(found[0], wanted.detach())
            factor.requires_grad_(False)


def test_gradient_of_one_factor(interpreted: Any) -> None:
    interpreted(2).run(one_gradient)


def at_the_edges() -> None:
    """Sizes of zero; more than the memory or its flags take."""
    with poisoned(capacity_bytes=4096, num_slots=2) as peers:
        n, rank = peers.size, peers.rank
        for m, k, out, epochs in ((3, 4, 0, 0), (3, 0, 4, 1), (0, 4, 3, 0), (16, 3, 32, 1),
                                  (33, 3, 1, 1), (32, 3, 17, 0), (65, 3, 1, 0)):  # fmt: skip
            x, found = torch.full((n * m, k), float(1 + rank)), []

            def run(x: torch.Tensor = x, out: int = out, found: list[Any] = found) -> None:
                weight = torch.ones(out, x.shape[1])
                found.append(tested.matmul_reduce_scatter(x, weight, n, NAME))

            assert epochs_of(peers, run) == epochs, (m, k, out)
            assert torch.equal(found[0], torch.full((m, out), float(k * sum(range(n + 1)))))


def test_empty_tensors_and_those_that_do_not_fit(interpreted: Any) -> None:
    interpreted(2).run(at_the_edges)


def test_alone() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    y = tested.matmul_reduce_scatter(x, weight, 1, "nobody")
    near(y, tested.matmul_reduce_scatter_reference([x], [weight])[0], 3)


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows cannot be scattered to 2 ranks; pad them"):
        tested.matmul_reduce_scatter(torch.ones(5, 3), torch.ones(2, 3), 2, NAME)


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 2), torch.ones(2, 3).half(), torch.ones(3)], ids=["k", "dtype", "dim"]
)
@pytest.mark.parametrize(
    "product", [tested.matmul_reduce_scatter, all_gather_matmul.all_gather_matmul]
)
def test_factors_that_do_not_fit_are_refused(product: Any, weight: torch.Tensor) -> None:
    """A kernel would read what lies behind them."""
    with pytest.raises(ValueError, match=r"x must be \[rows, k\] and weight \[out, k\] of one"):
        product(torch.ones(4, 3), weight, 2, NAME)


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
    check_synchronisation(made)
