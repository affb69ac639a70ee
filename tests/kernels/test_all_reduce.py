"""One-shot and two-shot all-reduce, and the end of a sum with residual and norm, in real processes
against float64."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from peer_checks import EPS, NAME, epochs_of, near, of_all_ranks, poisoned

from galvatron_compile.kernels import all_reduce as tested
from galvatron_compile.kernels import sum_norm
from galvatron_compile.kernels.ahead import compile_ahead

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

        def run() -> None:
            y = getattr(tested, f"{name}_peers")(x, n, NAME)
            found.extend((y.detach(), *torch.autograd.grad(y, x, dys[rank])))

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
    """One after the other without a barrier, with ranks that are late now and then."""
    with poisoned(capacity_bytes=1 << 16) as peers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tested, "ONE_SHOT_BYTES", 0 if two_shot else 1 << 30)
        late = random.Random(seed + peers.rank)
        for turn in range(times):
            if late.random() < 0.05:
                time.sleep(0.003)
            x = torch.full((8,), float(turn + peers.rank))
            y = tested.all_reduce_peers(x, peers.size, NAME)
            wanted = peers.size * turn + sum(range(peers.size))
            assert y.tolist() == [wanted] * 8, (turn, y)


@pytest.mark.parametrize(("size", "times"), [(2, 300), (4, 60)])
@pytest.mark.parametrize("two_shot", [False, True])
def test_hundreds_in_a_row_are_right(
    interpreted: Any, seed: int, size: int, times: int, two_shot: bool
) -> None:
    interpreted(size).run(many, seed, times, two_shot)


def check_norm(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, programs: int, kernels: bool
) -> None:
    with poisoned(num_slots=16) as peers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sum_norm, "num_programs", lambda _: programs)
        eps, features = 1e-3, shape[-1]
        partials = of_all_ranks(seed, shape, dtype)
        residual, weight = (of_all_ranks(seed + 1 + k, s, dtype)[0] for k, s in
                            enumerate((shape, (features,))))
        inputs = [partials[peers.rank].clone(), residual.clone(), weight.clone()]
        for x in inputs:
            x.requires_grad_()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def run() -> None:
            found.append(sum_norm.all_reduce_add_rms_norm(*inputs, eps, peers.size, NAME))

        assert not kernels or epochs_of(peers, run) == 1
        if not kernels:
            run()
        y, total = found[0]
        wide = [x.detach().double().requires_grad_() for x in (*partials, residual, weight)]
        wanted_y, wanted_total = sum_norm.sum_norm_reference(wide[:-2], *wide[-2:], eps)
        near(y.detach(), wanted_y, 16)
        near(total.detach(), wanted_total, 2 * peers.size)
        dy, dtotal = (of_all_ranks(seed + 7 + k, shape, dtype)[0] for k in range(2))
        got = torch.autograd.grad((y, total), inputs, (dy, dtotal))
        wanted = torch.autograd.grad(
            (wanted_y, wanted_total), [wide[0], *wide[-2:]], (dy.double(), dtotal.double())
        )
        rows = total.numel() // features
        for one, other, length in zip(got, wanted, (64, 64, 16 * rows), strict=True):
            near(one, other, length)
        (alone,) = torch.autograd.grad(
            sum_norm.all_reduce_add_rms_norm(*inputs, eps, peers.size, NAME)[1], inputs[1], dtotal
        )
        assert torch.equal(alone, dtotal)


@pytest.mark.parametrize(
    ("size", "shape", "dtype", "programs"),
    [(2, (3, 5, 40), torch.float32, 16), (2, (33, 7), torch.bfloat16, 4),
     (4, (6, 64), torch.float16, 16), (4, (1, 1), torch.float32, 16)],
)  # fmt: skip
def test_sum_and_norm_equal_the_float64_reference(
    interpreted: Any, seed: int, size: int, shape: tuple[int, ...], dtype: torch.dtype,
    programs: int,
) -> None:  # fmt: skip
    interpreted(size).run(check_norm, seed, shape, dtype, programs, True)


def test_sum_and_norm_by_collectives(ranks: Any, seed: int) -> None:
    ranks(2).run(check_norm, seed, (4, 9), torch.float32, 16, False)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "place", range(len([*tested.ahead(), *sum_norm.ahead()]))
)
def test_machine_code(place: int, capability: int) -> None:
    kernel, arguments, num_warps = [*tested.ahead(), *sum_norm.ahead()][place]
    made = compile_ahead(kernel, arguments, capability=capability, num_warps=num_warps)
    assert made.spilled_bytes == 0
    # What is narrow are tables of addresses, the epoch, the error flag.
    assert made.num_wide_loads >= 2 and made.num_wide_stores >= 2
    lines = made.ptx.splitlines()
    releases = [at for at, line in enumerate(lines) if "atom" in line and "sys.release" in line]
    assert releases
    for at in releases:
        before = [x for x in lines[:at] if "bar.sync" in x or "st.global" in x]
        assert before and "bar.sync" in before[-1], "stores are not ordered before the release"
    assert any("sys.acquire" in line for line in lines)
