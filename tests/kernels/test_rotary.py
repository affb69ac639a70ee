"""Rotary: operators against float64, kernels under the interpreter, machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import close, new_seed, watched
from torch import Tensor

from galvatron_compile.kernels import rotary as op
from galvatron_compile.kernels.rotary import rotary, rotary_, rotary_reference

LAYOUTS = ("dense", "transposed", "slice", "gaps")


def _input(
    shape: tuple[int, ...], dtype: torch.dtype, make: torch.Generator, layout: str
) -> Tensor:
    """``[b, h, s, d]``: dense, as attention makes it, part of a wider tensor, d not contiguous."""
    b, h, s, d = shape
    if layout == "transposed":
        return torch.randn(b, s, h, d, generator=make).to(dtype).transpose(1, 2)
    if layout == "slice":
        return torch.randn(b, s, h + 2, d, generator=make).to(dtype)[:, :, 1:-1].transpose(1, 2)
    x = torch.randn(shape, generator=make).to(dtype)
    return torch.stack((x, x * float("nan")), -1)[..., 0] if layout == "gaps" else x


def _tables(shape: tuple[int, ...], dtype: torch.dtype, make: torch.Generator) -> list[Tensor]:
    """cos and sin whose halves differ: only then does the transpose show."""
    return [torch.randn(shape, generator=make).to(dtype) for _ in range(2)]


def _check(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str, batches: int, heads: bool
) -> None:
    """batches: of cos and sin; heads: whether they have a dim for the heads."""
    make = torch.Generator().manual_seed(seed)
    x = _input(shape, dtype, make, layout)
    cos, sin = _tables((batches, *shape[2:]), dtype, make)
    dy = _input(shape, dtype, make, layout)
    wide = x.double().requires_grad_()
    expected = rotary_reference(wide, cos, sin)
    [dx] = torch.autograd.grad(expected, wide, dy.double())
    if heads:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x = x.detach().requires_grad_()
    actual = rotary(x, cos, sin)
    assert actual.dtype == dtype and actual.stride() == torch.empty_like(x).stride()
    [grad] = torch.autograd.grad(actual, x, dy)
    close(actual.detach(), expected.detach(), terms=2, what="rotated")
    close(grad, dx, terms=2, what="dx")
    mine = x.detach()
    assert rotary_(mine, cos, sin) is mine
    close(mine, expected.detach(), terms=2, what="in place")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain(layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 3, 5, 8), (1, 1, 1, 2), (2, 4, 0, 8), (0, 2, 3, 4)):
        for batches in {1, shape[0]}:
            _check(shape, dtype, new_seed(), layout, batches, heads=batches > 1)


def test_gradcheck() -> None:
    make = torch.Generator().manual_seed(new_seed())
    x = _input((2, 3, 4, 6), torch.float64, make, "transposed").detach().requires_grad_()
    cos, sin = _tables((2, 4, 6), torch.float64, make)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x)
    given = [x, *(table.requires_grad_() for table in (cos, sin))]
    assert torch.autograd.gradcheck(rotary, given)
    given[1:] = (table[:1].detach().requires_grad_() for table in (cos, sin))
    assert torch.autograd.gradcheck(rotary, given)  # of all batches


def test_opcheck() -> None:
    make = torch.Generator().manual_seed(0)
    cos, sin = _tables((1, 4, 6), torch.float32, make)
    x = _input((2, 3, 4, 6), torch.float32, make, "transposed")
    torch.library.opcheck(torch.ops.galvatron.rotary, (x.detach().requires_grad_(), cos, sin))
    torch.library.opcheck(torch.ops.galvatron.rotary_, (x, cos, sin))


def test_wider_tables_widen_the_result() -> None:
    """As in eager PyTorch; the gradient is of the dtype of x again."""
    make = torch.Generator().manual_seed(0)
    x = _input((1, 2, 4, 6), torch.bfloat16, make, "dense").requires_grad_()
    y = rotary(x, *_tables((1, 4, 6), torch.float32, make))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_shapes_are_refused() -> None:
    x, table = torch.ones(2, 3, 4, 6), torch.ones(1, 4, 6)
    with pytest.raises(ValueError, match="even d"):
        rotary(torch.ones(2, 3, 4, 5), torch.ones(1, 4, 5), torch.ones(1, 4, 5))
    for wrong in ((4, 6), (3, 4, 6), (1, 5, 6), (1, 3, 4, 6)):
        with pytest.raises(ValueError, match="must be"):
            rotary(x, table, torch.ones(wrong))


def test_traced_with_a_symbolic_batch() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rotary(x, cos, sin).square().sum(), x)

    make = torch.Generator().manual_seed(0)
    tables = _tables((1, 4, 6), torch.float32, make)
    graph = make_fx(step, tracing_mode="symbolic")(
        torch.randn(2, 3, 4, 6, requires_grad=True), *tables
    )
    names = [str(node.target) for node in graph.graph.nodes]
    assert "galvatron.rotary.default" in names and "galvatron.rotary_backward.default" in names
    other = torch.randn(5, 3, 4, 6, requires_grad=True)
    torch.testing.assert_close(graph(other, *tables), step(other, *tables))


def _in_interpreter(dtype: torch.dtype, seed: int, changes: dict[str, Any]) -> int:
    with watched(op, "rotary_kernel", **changes) as counts:
        for layout in LAYOUTS:
            _check((2, 6, 5, 12), dtype, seed, layout, batches=1, heads=True)
        _check((2, 3, 7, 16), dtype, seed, "transposed", batches=2, heads=False)
    return counts["rotary_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels(interpreted: Any, dtype: torch.dtype) -> None:
    """Forward, backward and in place: a launch each for the five cases."""
    assert interpreted(1).run(_in_interpreter, dtype, new_seed(), {}) == [15]


def test_several_tiles(interpreted: Any) -> None:
    """Two heads and two positions a program; neither divides."""
    changes = {"TILE": 32, "MAX_HEADS": 2}
    assert interpreted(1).run(_in_interpreter, torch.float32, new_seed(), changes) == [15]


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """No spills; x and y move 16 bytes a lane (cos and sin, read once for four heads, 8)."""
    from galvatron_compile.kernels.ahead import compile_ahead

    for kernel, arguments, warps in op.ahead():
        made = compile_ahead(kernel, arguments, capability=capability, num_warps=warps)
        assert made.spilled_bytes == 0
        assert made.num_wide_loads >= 4 and made.num_narrow_loads <= 4
        assert made.count(r"\bLDG\S*\.64") == made.num_narrow_loads
        assert made.num_wide_stores == made.count(r"\bSTG\b") == 4


def test_moved_bytes() -> None:
    assert op.moved_bytes(2, 3, 4, 6, 2) == 2 * (2 * 144 + 2 * 24)
    assert op.moved_bytes(2, 3, 4, 6, 2, num_tables=2) == 2 * (2 * 144 + 4 * 24)
