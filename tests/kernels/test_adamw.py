"""AdamW: the operator against float64 and torch.optim.AdamW, the optimizer, machine code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_checks import close, launched, new_seed, watched
from torch import Tensor

from galvatron_compile.kernels import adamw as op
from galvatron_compile.kernels.adamw import FlatAdamW, adamw_reference

# Such that every part counts: decay, bias correction, eps, scale.
SETTINGS: dict[str, Any] = dict(lr=0.05, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.3)
SCALE = 0.37


def _inputs(n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Master, gradient of ``dtype``, exp_avg, exp_avg_sq (float64 all for float64)."""
    make = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    master, gradient, exp_avg, exp_avg_sq = (
        torch.randn(n, generator=make, dtype=wide) for _ in range(4)
    )
    return master, gradient.to(dtype), exp_avg, exp_avg_sq.square()


def _sizes(
    master: Tensor, exp_avg: Tensor, gradient: Tensor, second: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """What the new master and the new exp_avg are sums of, without signs."""
    first = exp_avg.abs() + gradient.abs()
    corrected = first / (1 - SETTINGS["betas"][0] ** step)
    root = (second / (1 - SETTINGS["betas"][1] ** step)).sqrt()
    return master.abs() + SETTINGS["lr"] * corrected / (root + SETTINGS["eps"]), first


def _check(
    n: int, dtype: torch.dtype, seed: int, step: int, copied: torch.dtype | None = None
) -> None:
    master, gradient, exp_avg, exp_avg_sq = _inputs(n, dtype, seed)
    scale = torch.tensor(SCALE, dtype=master.dtype)
    scaled = gradient.double() * scale.double()
    expected = adamw_reference(master, scaled, exp_avg, exp_avg_sq, step, **SETTINGS)
    sizes = *_sizes(master, exp_avg, scaled, expected[2], step), None
    result = None if copied is None else torch.full((n,), float("nan"), dtype=copied)
    kept = gradient.clone()
    op.adamw_(
        master, gradient, exp_avg, exp_avg_sq, result, scale, step,
        SETTINGS["lr"], *SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"],
    )  # fmt: skip
    named = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for (what, actual), wanted, summed in zip(named.items(), expected, sizes, strict=True):
        close(actual, wanted, terms=4, what=what, summed=summed)
    assert torch.equal(gradient, kept)
    if result is not None:
        close(result, master.double(), what="copy")


@pytest.mark.parametrize("n", [1, 33, 4096, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain(n: int, dtype: torch.dtype) -> None:
    seed = new_seed()
    for step in (1, 2, 1000):
        _check(n, dtype, seed, step)
        _check(n, dtype, seed, step, copied=torch.bfloat16)


def _parameters(seed: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=make, dtype=dtype) for size in ((3, 5), (7,), (4, 6), ())]
    values[2] = values[2].t()  # dense but not contiguous
    return [torch.nn.Parameter(value) for value in values]


def _gradients(parameters: list[torch.nn.Parameter], make: torch.Generator) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=make, dtype=p.dtype)


def _optimizers(seed: int, dtype: torch.dtype, **more: Any) -> tuple[Any, Any, Any, Any]:
    """Ours and PyTorch's, with parameters in two groups of their own settings."""
    made: list[Any] = []
    for kind, extra in ((FlatAdamW, more), (torch.optim.AdamW, {})):
        parameters = _parameters(seed, dtype)
        groups = [
            {"params": parameters[:2]},
            {"params": parameters[2:], "lr": 0.01, "weight_decay": 0.0},
        ]
        made += [parameters, kind(groups, **SETTINGS, **extra)]
    return made[0], made[1], made[2], made[3]


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """As values that were drawn around 1 and moved: what happens to lie near 0 does so, too."""
    for a, b in zip(ours, theirs, strict=True):
        close(a.detach(), b.detach().double(), terms=16, summed=torch.ones_like(b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e4])
def test_as_pytorch(dtype: torch.dtype, max_norm: float | None) -> None:
    """Five steps, one of them without one of the gradients; settings change in between."""
    seed = new_seed()
    ours, optimizer, theirs, expected = _optimizers(seed, dtype, max_norm=max_norm)
    for step in range(5):
        for parameters in (ours, theirs):
            _gradients(parameters, torch.Generator().manual_seed(seed + step))
            parameters[1].grad = None if step == 2 else parameters[1].grad
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        expected.step()
        _equal(ours, theirs)
        if max_norm is not None:
            torch.testing.assert_close(optimizer.norm, norm)
        for o in (optimizer, expected):
            o.param_groups[0]["lr"] *= 0.7


def test_a_scale_counts_before_the_norm() -> None:
    seed = new_seed()
    ours, optimizer, theirs, expected = _optimizers(seed, torch.float64, max_norm=0.5)
    for parameters in (ours, theirs):
        _gradients(parameters, torch.Generator().manual_seed(seed))
    for p in theirs:
        p.grad *= SCALE
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.step(scale=torch.tensor(SCALE, dtype=torch.float64))
    expected.step()
    _equal(ours, theirs)
    torch.testing.assert_close(optimizer.norm, norm)


@pytest.mark.parametrize("to_pytorch", [True, False])
def test_state_dicts_are_those_of_pytorch(to_pytorch: bool) -> None:
    """A run goes on with the other optimizer as if it had been that one from the start."""
    seed = new_seed()
    ours, optimizer, theirs, expected = _optimizers(seed, torch.float64)
    for step in range(2):
        for parameters in (ours, theirs):
            _gradients(parameters, torch.Generator().manual_seed(seed + step))
        optimizer.step()
        expected.step()
    saved, loaded = (optimizer, expected) if to_pytorch else (expected, optimizer)
    loaded.state.clear()
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))  # or both would step one state
    for parameters in (ours, theirs):
        _gradients(parameters, torch.Generator().manual_seed(seed + 9))
    optimizer.step()
    expected.step()
    _equal(ours, theirs)
    assert optimizer.state[ours[0]].keys() == expected.state[theirs[0]].keys()


def test_closure_and_learning_rates() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = FlatAdamW([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    scheduler.step()
    before = parameter.detach().clone()
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.05
    # A direction of about 1 at the rate that the scheduler set.
    torch.testing.assert_close(
        before - parameter.detach(), torch.full((3,), 0.05), rtol=0.02, atol=0.0
    )


def test_refusals() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="lr must not be negative"):
        FlatAdamW([parameter], lr=-1.0)
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        FlatAdamW([parameter], max_norm=-1.0)
    with pytest.raises(ValueError, match="betas must lie"):
        FlatAdamW([parameter], betas=(0.9, 1.0))
    other = torch.optim.AdamW([parameter], amsgrad=True)
    with pytest.raises(ValueError, match="no amsgrad"):
        FlatAdamW([parameter]).load_state_dict(other.state_dict())
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        FlatAdamW(embedding.parameters()).step()


def test_opcheck() -> None:
    inputs = _inputs(8, torch.float32, 0)
    for copied in (None, torch.empty(8, dtype=torch.bfloat16)):
        args = *inputs, copied, torch.ones(()), 3, 0.1, 0.9, 0.99, 1e-8, 0.01
        torch.library.opcheck(op.adamw_, args)


def test_traced_with_a_symbolic_size() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(master: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        op.adamw_(
            master, gradient, first, second, None, torch.ones(()), 3, 0.1, 0.9, 0.99, 1e-8, 0.01
        )
        return master + 0

    graph = make_fx(step, tracing_mode="symbolic")(*_inputs(8, torch.float32, 0))
    assert "galvatron.adamw_.default" in [str(node.target) for node in graph.graph.nodes]
    ours, theirs = _inputs(12, torch.float32, 1), _inputs(12, torch.float32, 1)
    torch.testing.assert_close(graph(*ours), step(*theirs))


def _in_interpreter(dtype: torch.dtype, seed: int, block: int) -> None:
    from unittest import mock

    with mock.patch.object(op, "BLOCK", block), watched(op, "adamw_kernel") as counts:
        for n, step, copied in ((300, 1, torch.bfloat16), (128, 7, None), (5, 1000, torch.float16)):
            _check(n, dtype, seed, step, copied)
    assert counts == {"adamw_kernel": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 1024])
def test_kernels(interpreted: Any, dtype: torch.dtype, block: int) -> None:
    interpreted(1).run(_in_interpreter, dtype, new_seed(), block)


def _nothing_outside(seed: int) -> None:
    """The last block ends with the shard: what lies behind stays."""
    around = [torch.full((96,), float("nan")) for _ in range(4)]
    inner = [x[:80] for x in around]
    for x, values in zip(inner, _inputs(80, torch.float32, seed), strict=True):
        x.copy_(values)
    with watched(op, "adamw_kernel") as counts:
        op.adamw_(
            inner[0], inner[1], inner[2], inner[3], None, torch.ones(()),
            1, 0.1, 0.9, 0.99, 1e-8, 0.01,
        )  # fmt: skip
    assert launched(counts) and all(x[80:].isnan().all() for x in around)
    assert all(x.isfinite().all() for x in inner)


def test_nothing_outside_is_written(interpreted: Any) -> None:
    interpreted(1).run(_nothing_outside, new_seed())


def _optimizer_in_interpreter(seed: int) -> None:
    with watched(op, "adamw_kernel") as counts:
        ours, optimizer, theirs, expected = _optimizers(seed, torch.float32, max_norm=0.5)
        for step in range(2):
            for parameters in (ours, theirs):
                _gradients(parameters, torch.Generator().manual_seed(seed + step))
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
            optimizer.step()
            expected.step()
        _equal(ours, theirs)
    assert counts == {"adamw_kernel": 8}


def test_optimizer_launches_kernels(interpreted: Any) -> None:
    interpreted(1).run(_optimizer_in_interpreter, new_seed())


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """No spills; whole blocks move 16 bytes a lane, all but the scale."""
    from galvatron_compile.kernels.ahead import compile_ahead

    for kernel, arguments, warps in op.ahead():
        made = compile_ahead(kernel, arguments, capability=capability, num_warps=warps)
        assert made.spilled_bytes == 0, made.name
        # 8 elements a lane, whole and masked: 2 of each float32 array, 1 of a bfloat16 one.
        assert made.num_wide_loads == 2 * (6 + (1 if arguments["COPIES"] else 2)), made.name
        assert made.num_narrow_loads == 1, made.name
        assert made.num_wide_stores == 2 * (6 + arguments["COPIES"]), made.name


def test_moved_bytes() -> None:
    """As counted by hand for 10 elements."""
    assert op.moved_bytes(10, 2, 2) == 10 * (4 + 2 + 4 + 4 + 4 + 4 + 4 + 2)
    assert op.moved_bytes(10, 4) == 10 * (4 + 4 + 4 + 4 + 4 + 4 + 4)
