"""All-reduce, reduce-scatter, all-gather in real processes against float64."""

from __future__ import annotations

import random
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
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

from galvatron_compile.kernels import all_reduce as tested
from galvatron_compile.kernels import matmul_reduce_scatter, scatter_norm, sum_norm
from galvatron_compile.kernels.ahead import compile_ahead
from galvatron_compile.kernels.peers import make_peers, register

OPERATORS = ("all_reduce", "reduce_scatter", "all_gather")


def check(
    seed: int, name: str, rows: int, columns: int, dtype: torch.dtype, one_shot: bool, kernels: bool
) -> Any:
    """Forward and backward, whose operator is the adjoint; returns the bits of the result."""
    with poisoned(capacity_bytes=1 << 18) as peers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tested, "ONE_SHOT_BYTES", 1 << 30 if one_shot else 0)
        n, rank = peers.size, peers.rank
        rows *= n
        xs = of_all_ranks(seed, (columns, rows), dtype)
        x = xs[rank].clone().t().requires_grad_()  # not contiguous
        wide = [x.t().double().requires_grad_() for x in xs]
        total = tested.all_reduce_reference(wide)
        wanted = {
            "all_reduce": [total] * n,
            "reduce_scatter": list(total.chunk(n)),
            "all_gather": [torch.cat(wide)] * n,
        }[name]
        dys = of_all_ranks(seed + 1, tuple(wanted[rank].shape), dtype)
        found: list[torch.Tensor] = []

        operator = getattr(tested, f"{name}_peers")
        come_late(peers, seed)

        def run() -> None:
            y = operator(x, n, NAME)
            found.extend((y.detach(), *torch.autograd.grad(y, x, dys[rank])))
            as_fake(operator, (x, n, NAME), (y,))

        assert not kernels or epochs_of(peers, run) == 2
        if not kernels:
            run()
        y, dx = found
        near(y, wanted[rank].detach(), n)
        # The loss is the sum over ranks.
        gradients = torch.autograd.grad(wanted, wide, [dy.double() for dy in dys])
        near(dx, gradients[rank], n)
        return y.view(torch.int16 if dtype.itemsize == 2 else torch.int32).tolist()


CASES = [(1, 1, torch.float32), (5, 601, torch.float32), (8, 96, torch.bfloat16),
         (3, 7, torch.float16)]  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*OPERATORS, "all_reduce one-shot"])
def test_kernels_equal_the_float64_reference(
    interpreted: Any, seed: int, size: int, name: str
) -> None:
    operator, _, shot = name.partition(" ")
    for rows, columns, dtype in CASES:
        bits = interpreted(size).run(check, seed, operator, rows, columns, dtype, bool(shot), True)
        assert operator == "reduce_scatter" or all(each == bits[0] for each in bits)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_collectives_equal_the_float64_reference(ranks: Any, seed: int, dtype: torch.dtype) -> None:
    for name in OPERATORS:
        ranks(2).run(check, seed, name, 3, 7, dtype, False, False)


def many(seed: int, times: int, two_shot: bool) -> None:
    """One after the other without a barrier, with ranks that are late now and then, or slow."""
    with poisoned(capacity_bytes=1 << 16) as peers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tested, "ONE_SHOT_BYTES", 0 if two_shot else 1 << 30)
        late = random.Random(seed + peers.rank)

        def once(turn: int) -> None:
            x = torch.full((9,), float(turn + peers.rank))
            y = tested.all_reduce_peers(x, peers.size, NAME)
            wanted = peers.size * turn + sum(range(peers.size))
            assert y.tolist() == [wanted] * 9, (turn, y)

        for turn in range(times):
            if late.random() < 0.05:
                time.sleep(0.003)
            once(turn)
        for slow in range(peers.size):
            with slow_reader() if slow == peers.rank else nullcontext():
                for turn in range(3):
                    once(turn)


@pytest.mark.parametrize(("size", "times"), [(2, 300), (4, 60)])
@pytest.mark.parametrize("two_shot", [False, True])
def test_hundreds_in_a_row_are_right(
    interpreted: Any, seed: int, size: int, times: int, two_shot: bool
) -> None:
    interpreted(size).run(many, seed, times, two_shot)


def small_terms(kernels: bool) -> None:
    """2048 + 1 is 2048 in float16, 2048 + 3 is not."""
    with poisoned() as peers, pytest.MonkeyPatch.context() as patch:
        n, rank = peers.size, peers.rank
        x = torch.full((n, 1), 1.0 if rank else 2048.0, dtype=torch.float16)
        one = torch.ones(1, 1, dtype=torch.float16)

        def run() -> None:
            for most in (0, 1 << 30):
                patch.setattr(tested, "ONE_SHOT_BYTES", most)
                assert tested.all_reduce_peers(x, n, NAME).unique().tolist() == [2052.0]
            assert tested.reduce_scatter_peers(x, n, NAME).tolist() == [[2052.0]]
            assert matmul_reduce_scatter.matmul_reduce_scatter(x, one, n, NAME).item() == 2052.0
            rest = (torch.zeros_like(one), one[0], 0.0, n, NAME)
            assert scatter_norm.reduce_scatter_add_rms_norm(x, *rest)[1].item() == 2052.0
            assert sum_norm.all_reduce_add_rms_norm(x[:1], *rest)[1].item() == 2052.0

        assert not kernels or epochs_of(peers, run) == 6
        if not kernels:
            run()


@pytest.mark.parametrize("pool", ["interpreted", "ranks"])
def test_sums_are_made_in_float32(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool)(4).run(small_terms, pool == "interpreted")


def whole_numbers() -> None:
    """Kernels add in float32, which is not enough for them."""
    with poisoned() as peers:
        n, rank = peers.size, peers.rank
        x = torch.tensor([[2**40 + rank], [3 * rank]] * n)

        def run() -> None:
            assert tested.all_reduce_peers(x, n, NAME)[:2].tolist() == [
                [n * 2**40 + sum(range(n))], [3 * sum(range(n))]
            ]  # fmt: skip
            assert tested.reduce_scatter_peers(x, n, NAME).tolist() == [
                [n * 2**40 + sum(range(n))], [3 * sum(range(n))]
            ]  # fmt: skip
            gathered = tested.all_gather_peers(x[:1], n, NAME)
            assert gathered.tolist() == [[2**40 + r] for r in range(n)]

        assert epochs_of(peers, run) == 0


def test_whole_numbers_are_exact(interpreted: Any) -> None:
    interpreted(2).run(whole_numbers)


def at_the_edges() -> None:
    """Nothing at all; as much as the memory takes; more."""
    with poisoned(capacity_bytes=4096) as peers:
        n, rank = peers.size, peers.rank
        for columns, epochs in ((0, 0), (1024 // n, 3), (1024 // n + 1, 1)):
            x = torch.full((n, columns), float(rank))
            found: list[torch.Tensor] = []

            def run(x: torch.Tensor = x, found: list[torch.Tensor] = found) -> None:
                for name in OPERATORS:
                    given = x[:1] if name == "all_gather" else x
                    found.append(getattr(tested, f"{name}_peers")(given, n, NAME))

            assert epochs_of(peers, run) == epochs  # a gather gives one row only
            total = torch.full_like(x, sum(range(n)))
            gathered = torch.arange(n).float()[:, None].expand(n, columns)
            for one, other in zip(found, (total, total[:1], gathered), strict=True):
                assert torch.equal(one, other)


def test_empty_tensors_and_those_that_do_not_fit(interpreted: Any) -> None:
    interpreted(2).run(at_the_edges)


def in_part_of_the_world() -> float:
    """Ranks of a group are numbered in the group."""
    world = dist.get_rank()
    groups = [dist.new_group(pair) for pair in ([0, 2], [1, 3])]
    peers = register(NAME, make_peers(groups[world % 2], capacity_bytes=4096, num_slots=4))
    come_late(peers, world)
    return float(tested.all_reduce_peers(torch.tensor([10.0**world]), 2, NAME))


def test_groups_that_are_not_the_world(interpreted: Any) -> None:
    assert interpreted(4).run(in_part_of_the_world) == [101.0, 1010.0] * 2


@pytest.mark.parametrize("name", OPERATORS)
def test_alone(name: str) -> None:
    x = torch.randn(4, 3).t()
    y = getattr(tested, f"{name}_peers")(x, 1, "nobody")
    assert torch.equal(y, x) and y.is_contiguous() and y.data_ptr() != x.data_ptr()


def test_bytes_over_the_link() -> None:
    one = tested.ONE_SHOT_BYTES // 4
    assert tested.link_bytes(one, 8, 4) == 7 * 4 * one
    assert tested.link_bytes(one + 1, 8, 4) == 2 * 7 * 4 * (one + 1) // 8


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("place", range(4))
def test_machine_code(place: int, capability: int) -> None:
    kernel, arguments, num_warps = tested.ahead()[place]
    made = compile_ahead(kernel, arguments, capability=capability, num_warps=num_warps)
    assert made.spilled_bytes == 0
    # What is narrow are tables of addresses, the epoch, the error flag.
    assert made.num_wide_loads >= 2
    assert made.num_wide_stores == made.count(r"\bSTG\S*") >= 2
    check_synchronisation(made)
