"""SwiGLU: operators against float64, kernels under the interpreter, machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import close, launched, new_seed, watched
from torch import Tensor

from galvatron_compile.kernels import swiglu as op
from galvatron_compile.kernels.swiglu import swiglu, swiglu_reference

KERNELS = ("swiglu_kernel", "swiglu_backward_kernel")


def _check(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str) -> None:
    """layout: ``dense``, ``halves`` of one matrix, ``mixed``, or ``gaps`` between the elements."""
    make = torch.Generator().manual_seed(seed)
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=make).mul(4).to(dtype)
    dout = torch.randn(shape, generator=make).to(dtype)
    gate, up = both[..., : shape[-1]], both[..., shape[-1] :]
    if layout == "dense":
        gate = gate.contiguous()
    if layout in ("dense", "mixed"):
        up = up.contiguous()
    if layout == "gaps":
        gate, up, dout = (torch.stack((t, t * float("nan")), -1)[..., 0] for t in (gate, up, dout))
    wide = gate.double().requires_grad_(), up.double().requires_grad_()
    expected = swiglu_reference(*wide)
    dgate, dup = torch.autograd.grad(expected, wide, dout.double())
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    actual = swiglu(*leaves)
    assert actual.dtype == dtype and actual.is_contiguous()
    grads = torch.autograd.grad(actual, leaves, dout)
    close(actual.detach(), expected.detach(), terms=4, what="product")
    # As in PyTorch, 1 - sigmoid keeps few bits where gates are large.
    parts = (dout.double() * wide[1].detach()).abs() * (1 + wide[0].detach().abs())
    close(grads[0], dgate, terms=4, what="dgate", summed=parts)
    close(grads[1], dup, terms=4, what="dup")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["dense", "halves", "mixed", "gaps"])
def test_plain(layout: str, dtype: torch.dtype) -> None:
    for shape in ((3, 5, 8), (4, 33), (7,), (2, 0, 8), (0,)):
        _check(shape, dtype, new_seed(), layout)


def test_gradcheck() -> None:
    make = torch.Generator().manual_seed(new_seed())
    gate, up = (torch.randn(3, 5, generator=make, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))


def test_opcheck() -> None:
    gate, up = torch.randn(2, 4, 8), torch.randn(2, 4, 16)[..., 8:]
    torch.library.opcheck(torch.ops.galvatron.swiglu, (gate.requires_grad_(), up.requires_grad_()))


def test_large_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    assert swiglu(gate, torch.ones(5)).tolist() == [0, 0, 0, 100, 1e4]


def test_mixed_dtypes() -> None:
    gate, up = torch.ones(3, dtype=torch.bfloat16).requires_grad_(), torch.ones(3).requires_grad_()
    out = swiglu(gate, up)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert gate.grad.dtype == torch.bfloat16 and up.grad.dtype == torch.float32


def test_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="they must agree"):
        swiglu(torch.ones(2, 8), torch.ones(8))


def test_traced_with_a_symbolic_batch() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))

    leaves = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    graph = make_fx(step, tracing_mode="symbolic")(*leaves)
    names = [str(node.target) for node in graph.graph.nodes]
    assert "galvatron.swiglu.default" in names and "galvatron.swiglu_backward.default" in names
    others = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    for actual, expected in zip(graph(*others), step(*others), strict=True):
        torch.testing.assert_close(actual, expected)


def _in_interpreter(dtype: torch.dtype, seed: int, changes: dict[str, Any]) -> set[str]:
    with watched(op, *KERNELS, **changes) as counts:
        for shape in ((3, 2, 100), (2, 64)):
            for layout in ("dense", "halves", "mixed", "gaps"):
                _check(shape, dtype, seed, layout)
        large = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
        assert swiglu(large, torch.ones(5)).tolist() == [0, 0, 0, 100, 1e4]
    return launched(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels(interpreted: Any, dtype: torch.dtype) -> None:
    assert interpreted(1).run(_in_interpreter, dtype, new_seed(), {}) == [set(KERNELS)]


def test_several_blocks_a_row(interpreted: Any) -> None:
    arguments = torch.float32, new_seed(), {"BLOCK": 64}
    assert interpreted(1).run(_in_interpreter, *arguments) == [set(KERNELS)]


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """No spills; every access moves 16 bytes a lane."""
    from galvatron_compile.kernels.ahead import compile_ahead

    for kernel, arguments, warps in op.ahead():
        made = compile_ahead(kernel, arguments, capability=capability, num_warps=warps)
        assert made.spilled_bytes == 0
        assert made.num_wide_loads >= 4 and made.num_narrow_loads == 0
        assert made.num_wide_stores == made.count(r"\bSTG\b") >= 2


def test_moved_bytes() -> None:
    assert op.moved_bytes(80, 2) == 2 * 80 * 3
    assert op.moved_bytes(80, 2, backward=True) == 2 * 80 * 5
