"""The end of a sum with residual and norm, whole and in shares, in real processes and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_checks import (
    NAME,
    as_fake,
    check_synchronisation,
    come_late,
    epochs_of,
    near,
    of_all_ranks,
    poisoned,
)
from torch import Tensor

from galvatron_compile.kernels import scatter_norm, sum_norm
from galvatron_compile.kernels.ahead import compile_ahead

EPSILON = 1e-3
Wide = tuple[list[Tensor], list[Tensor]]


def draw(seed: int, n: int, shape: tuple[int, ...], dtypes: Any, shares: bool) -> list[Any]:
    """Of all ranks: partials, residuals, weights. Not contiguous. Replicated unless shared out."""
    partial, residual, weight = dtypes
    rows = (n * shape[0], *shape[1:]) if shares else shape
    turned = [(*size[:-2], size[-1], size[-2]) for size in (rows, shape)]
    drawn = [
        [x.transpose(-1, -2) for x in of_all_ranks(seed, turned[0], partial)],
        [x.transpose(-1, -2) for x in of_all_ranks(seed + 1, turned[1], residual)],
        of_all_ranks(seed + 2, shape[-1:], weight),
    ]
    return drawn if shares else [drawn[0], [drawn[1][0]] * n, [drawn[2][0]] * n]


def check(
    seed: int, shape: tuple[int, ...], dtypes: Any, programs: int, shares: bool, kernels: bool
) -> None:
    with poisoned(num_slots=16) as peers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sum_norm, "num_programs", lambda _: programs)
        n, rank = peers.size, peers.rank
        operator = scatter_norm.reduce_scatter_add_rms_norm if shares else (
            sum_norm.all_reduce_add_rms_norm
        )
        drawn = draw(seed, n, shape, dtypes, shares)
        inputs = [x[rank].detach().requires_grad_() for x in drawn]
        come_late(peers, seed)
        found: list[tuple[Tensor, Tensor]] = []

        def run() -> None:
            found.append(operator(*inputs, EPSILON, n, NAME))
            as_fake(operator, (*inputs, EPSILON, n, NAME), found[0])

        assert not kernels or epochs_of(peers, run) == 1
        if not kernels:
            run()
        y, total = found[0]
        assert total.dtype == dtypes[0] and y.dtype == torch.promote_types(dtypes[0], dtypes[2])
        wide = [[x.detach().double().requires_grad_() for x in part] for part in drawn]
        wanted_ys, wanted_totals = reference(wide, shares)
        # y is not exacter than what is between: a total that is rounded without kernels.
        near(y.detach(), wanted_ys[rank].detach(), 16, 1 if kernels else 8)
        near(total.detach(), wanted_totals[rank].detach(), 2 * n, 1 if kernels else n + 1)
        check_gradients(seed, peers, operator, inputs, found[0], (wide, wanted_ys, wanted_totals))


def reference(wide: list[list[Tensor]], shares: bool) -> Wide:
    if shares:
        both = scatter_norm.scatter_norm_reference(*wide, EPSILON)
        return [y for y, _ in both], [total for _, total in both]
    y, total = sum_norm.sum_norm_reference(wide[0], wide[1][0], wide[2][0], EPSILON)
    return [y] * len(wide[0]), [total] * len(wide[0])


def check_gradients(
    seed: int, peers: Any, operator: Any, inputs: list[Tensor], found: Any, expected: Any
) -> None:
    """Of y and total together, of total alone, of y alone."""
    wide, ys, totals = expected
    rank, shares = peers.rank, operator is scatter_norm.reduce_scatter_add_rms_norm
    y, total = found
    dys = [dy.to(y.dtype) for dy in of_all_ranks(seed + 7, tuple(y.shape), torch.float32)]
    dtotals = of_all_ranks(seed + 8, tuple(y.shape), total.dtype)
    if not shares:  # both are replicated
        dys, dtotals = dys[:1] * peers.size, dtotals[:1] * peers.size
    rows = total.numel() // total.shape[-1]
    for outputs in (0, 1), (1,), (0,):
        ours = [(y, total)[k] for k in outputs]
        given = [(dys, dtotals)[k] for k in outputs]
        got = torch.autograd.grad(
            ours, inputs, [d[rank] for d in given], retain_graph=True, allow_unused=True
        )
        places = range(peers.size) if shares else range(1)  # a replicated loss counts once
        wanted = torch.autograd.grad(
            [(ys, totals)[k][r] for k in outputs for r in places],
            [wide[0][rank], wide[1][rank if shares else 0], wide[2][rank if shares else 0]],
            [d[r].double() for d in given for r in places],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        lengths = (64, 64, 16 * rows)
        for one, other, length, x in zip(got, wanted, lengths, inputs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == x.dtype
                low = max((one, total), key=lambda t: torch.finfo(t.dtype).eps).dtype
                near(one.to(low), other.to(one.dtype).double(), length, 4)


HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
CASES = [
    (2, (3, 5, 40), (SINGLE,) * 3, 16),
    (2, (33, 7), (BRAIN,) * 3, 4),
    (4, (6, 64), (HALF,) * 3, 16),
    (4, (1, 1), (SINGLE,) * 3, 16),
    (2, (5, 24), (BRAIN, SINGLE, SINGLE), 2),
]


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("size", "shape", "dtypes", "programs"), CASES)
def test_kernels_equal_the_float64_reference(
    interpreted: Any, seed: int, size: int, shape: tuple[int, ...], dtypes: Any, programs: int,
    shares: bool,
) -> None:  # fmt: skip
    interpreted(size).run(check, seed, shape, dtypes, programs, shares, True)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_collectives_equal_the_float64_reference(
    ranks: Any, seed: int, shares: bool, dtype: torch.dtype
) -> None:
    ranks(2).run(check, seed, (4, 9), (dtype,) * 3, 16, shares, False)


def too_long() -> None:
    """More than a program holds in registers, or than one-shot is good for, goes another way."""
    with poisoned(num_slots=16) as peers, pytest.MonkeyPatch.context() as patch:
        n = peers.size
        ones = torch.ones(2 * n, 32)

        def whole() -> None:
            y, total = sum_norm.all_reduce_add_rms_norm(ones, ones, ones[0], 0.0, n, NAME)
            assert total.unique().item() == n + 1
            torch.testing.assert_close(y, ones)

        def shares() -> None:
            y, total = scatter_norm.reduce_scatter_add_rms_norm(
                ones, ones[:2], ones[0], 0.0, n, NAME
            )
            assert total.unique().item() == n + 1
            torch.testing.assert_close(y, ones[:2])

        launched: list[Any] = []
        start = sum_norm.launch
        for module in (sum_norm, scatter_norm):
            patch.setattr(module, "launch", lambda *args: launched.append(0) or start(*args))
        for features, most_bytes, num in ((32, 1 << 20, 2), (31, 1 << 20, 0), (32, 16, 1)):
            patch.setattr(sum_norm, "MAX_FEATURES", features)
            patch.setattr(sum_norm, "MAX_BYTES", most_bytes)
            launched.clear()
            whole(), shares()
            assert len(launched) == num


def test_long_rows_and_many_bytes_go_another_way(interpreted: Any) -> None:
    interpreted(2).run(too_long)


def test_alone() -> None:
    x, residual, weight = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    expected = sum_norm.sum_norm_reference([x], residual, weight, EPSILON)
    for operator in (sum_norm.all_reduce_add_rms_norm, scatter_norm.reduce_scatter_add_rms_norm):
        for one, other in zip(operator(x, residual, weight, EPSILON, 1, ""), expected, strict=True):
            near(one, other, 8)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(4, 6), torch.ones(6)
    whole, shares = sum_norm.all_reduce_add_rms_norm, scatter_norm.reduce_scatter_add_rms_norm
    with pytest.raises(ValueError, match=r"residual must be \[4, 6\]"):
        whole(x, x[:2], weight, EPSILON, 2, NAME)
    with pytest.raises(ValueError, match=r"weight and bias must be \[6\]"):
        whole(x, x, weight[:1], EPSILON, 2, NAME)
    with pytest.raises(ValueError, match=r"residual must be \[2, 6\]"):
        shares(x, x, weight, EPSILON, 2, NAME)
    with pytest.raises(ValueError, match="4 rows cannot be scattered to 3 ranks; pad them"):
        shares(x, x[:1], weight, EPSILON, 3, NAME)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("module", [sum_norm, scatter_norm])
def test_machine_code(module: Any, capability: int) -> None:
    ((kernel, arguments, num_warps),) = module.ahead()
    made = compile_ahead(kernel, arguments, capability=capability, num_warps=num_warps)
    assert made.spilled_bytes == 0
    assert made.num_wide_loads >= 2
    assert made.num_wide_stores == made.count(r"\bSTG\S*") >= 2
    check_synchronisation(made)
