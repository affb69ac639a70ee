"""Every conversion moves the value and its gradient as the two placements say."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode

from galvatron_compile import collectives, gather_scatter
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.placement import P, Placement, R, S, V

PAIRS = ["RV", "PR", "SV", "SR", "RS", "VS", "PS", "SS", "RP", "VR"]
GROUPS = {"tp2": [(0, 1), (2, 3)], "dp2": [(0, 2), (1, 3)], "tp4": [(0, 1, 2, 3)]}


def held(x: Tensor, placement: Placement, n: int, rank: int) -> Tensor:
    """Which entries rank holds, by the definition: entry i of the dim is in block i // b % n."""
    if not placement.is_shard:
        return x
    assert isinstance(placement.outer, int)
    size = x.shape[placement.dim]
    block = size // (placement.outer * n)
    mine = [i for i in range(size) if i // block % n == rank]
    return x.index_select(placement.dim, torch.tensor(mine))


def scattered(x: Tensor, placement: Placement, n: int, *, gradient: bool = False) -> list[Tensor]:
    """Local values (or gradients) of all ranks that ``x`` may have under the placement."""
    if placement.kind == ("V" if gradient else "P"):
        parts = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for _ in range(n - 1)]
        return [*parts, x - sum(parts)]
    return [held(x, placement, n, rank) for rank in range(n)]


def assert_is(locals_: list[Tensor], x: Tensor, placement: Placement, *, gradient: bool) -> None:
    n = len(locals_)
    if placement.kind == ("V" if gradient else "P"):
        torch.testing.assert_close(sum(locals_), x)
        return
    for rank, local in enumerate(locals_):
        torch.testing.assert_close(local, held(x, placement, n, rank))
    if not placement.is_shard:
        assert all(torch.equal(local, locals_[0]) for local in locals_)


def random_case(pair: str, n: int, rng: random.Random) -> tuple[Placement, Placement, list[int]]:
    """Random shape, dims and outers; S to S in another place."""
    shape = [rng.randint(1, 3) for _ in range(rng.randint(1, 4))]
    placements: list[Placement] = []
    for kind in pair:
        if kind != "S":
            placements.append(Placement(kind))  # type: ignore[arg-type]
            continue
        placement = S(rng.randrange(len(shape)), rng.choice([1, 1, 2, 3]))
        placements.append(placement)
    if placements[0] == placements[1]:
        placements[1] = S(placements[0].dim, placements[0].outer + 1)  # type: ignore[operator]
    for dim in range(len(shape)):
        for placement in placements:
            if placement.dim == dim:
                shape[dim] *= placement.outer * n  # type: ignore[operator]
    return placements[0], placements[1], shape


def convert(
    source: Placement, target: Placement, axis_name: str, values: list[Tensor], grads: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """One rank's converted value and gradient of its input; also checks manners."""
    axis = Mesh.create(dist.get_world_size(), dist.get_rank(), [1, 2, 4]).axes[axis_name]
    found = collectives.conversion(source, target)
    assert found is not None
    x = values[axis.index].clone().requires_grad_()
    before = x.detach().clone()
    y = found.function(x, *found.arguments, axis)
    gradient = grads[axis.index].clone()
    y.backward(gradient)
    assert torch.equal(x, before) and torch.equal(gradient, grads[axis.index]), "input changed"
    assert y.is_contiguous() and x.grad is not None and x.grad.is_contiguous()
    assert y.dtype == x.dtype
    if found.forward != "none":
        assert y.untyped_storage().nbytes() == y.nbytes, "keeps more than itself alive"
    return y.detach(), x.grad


@pytest.mark.parametrize("axis_name", GROUPS)
@pytest.mark.parametrize("pair", PAIRS)
def test_value_and_gradient_have_the_types_of_the_table(ranks, pair: str, axis_name: str) -> None:
    n = len(GROUPS[axis_name][0])
    rng = random.Random(f"{pair}{axis_name}")
    torch.manual_seed(rng.randrange(1 << 30))
    cases = []
    for _ in range(8):
        source, target, shape = random_case(pair, n, rng)
        x, g = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        locals_ = scattered(x, source, n), scattered(g, target, n, gradient=True)
        cases.append((source, target, x, g, *locals_))
    inputs = [(s, t, axis_name, values, grads) for s, t, _, _, values, grads in cases]
    answers = ranks(4).run(lambda: [(i, *convert(*item)) for i, item in enumerate(inputs)])
    for group in GROUPS[axis_name]:
        for i, (source, target, x, g, _, _) in enumerate(cases):
            assert_is([answers[rank][i][1] for rank in group], x, target, gradient=False)
            assert_is([answers[rank][i][2] for rank in group], g, source, gradient=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_travels(ranks, dtype: torch.dtype) -> None:
    x = torch.randint(-8, 8, (4, 8)).to(dtype)  # small integers: every sum is exact
    for source, target in [(P, R), (R, V), (S(1), V), (S(1), R), (P, S(0)), (S(0), S(1, 2))]:
        n = 4
        parts = [torch.ones_like(x)] * (n - 1)
        values = [*parts, x - sum(parts)] if source == P else scattered(x, source, n)
        grads = [held(x, target, n, rank) for rank in range(n)]
        answers = ranks(4).run(convert, source, target, "tp4", values, grads)
        assert_is([value for value, _ in answers], x, target, gradient=False)
        if target != V:
            assert_is([gradient for _, gradient in answers], x, source, gradient=True)
        else:  # the same partial gradient on all four ranks
            assert_is([gradient for _, gradient in answers], 4 * x, source, gradient=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_values_without_gradient_are_gathered_sharded_and_exchanged(ranks, dtype) -> None:
    x = torch.randint(0, 2, (4, 6, 8)).to(dtype)

    def there_and_back() -> bool:
        axis = Mesh.create(4, dist.get_rank(), [4]).tensor(4)
        blocks = collectives.shard(x, 2, 2, axis)
        rows = collectives.all_to_all(blocks, 2, 2, 0, 1, axis)
        same = torch.equal(rows, x[axis.index : axis.index + 1])
        outer = collectives.all_to_all(blocks, 2, 2, 2, 1, axis)
        same &= torch.equal(collectives.all_gather(outer, 2, 1, axis), x)
        return same and torch.equal(collectives.all_gather_replicated(rows, 0, 1, axis), x)

    assert ranks(4).run(there_and_back) == [True] * 4


def test_inputs_and_gradients_may_be_strided(ranks) -> None:
    x = torch.randn(8, 4, dtype=torch.float64)

    def strided() -> list[Tensor]:
        axis = Mesh.create(2, dist.get_rank(), [2]).tensor(2)
        leaf = x.clone().requires_grad_()
        local = collectives.shard(leaf.t(), 1, 2, axis)
        y = collectives.all_gather_replicated(local.t(), 0, 2, axis)
        y.sum().backward()  # an expanded gradient of stride 0
        return [y.detach(), leaf.grad]

    for y, gradient in ranks(2).run(strided):
        assert torch.equal(y, x) and torch.equal(gradient, torch.ones_like(x))


def recorded(source: Placement, target: Placement, shape: tuple[int, ...]) -> list[list[object]]:
    """[(collective, payload bytes)] that forward and backward really call."""
    axis = Mesh.create(4, dist.get_rank(), [4]).tensor(4)
    calls: list[object] = []

    def spy(kind: str, real):
        def call(first, *args, **kwargs):
            second = args[0] if args and isinstance(args[0], Tensor) else first
            calls.append((kind, max(first.nbytes, second.nbytes)))
            return real(first, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "reduce_scatter"):
            patch.setattr(gather_scatter, name, spy(name, getattr(gather_scatter, name)))
        patch.setattr(dist, "all_reduce", spy("all_reduce", dist.all_reduce))
        patch.setattr(dist, "all_to_all_single", spy("all_to_all", dist.all_to_all_single))
        found = collectives.conversion(source, target)
        x = held(torch.randn(shape), source, 4, axis.index).requires_grad_()
        y = found.function(x, *found.arguments, axis)
        forward = list(calls)
        calls.clear()
        y.backward(torch.ones_like(y))
    expected = []
    for kind, size in [
        (found.forward, found.forward_bytes(x.nbytes, 4)),
        (found.backward, found.backward_bytes(x.nbytes, 4)),
    ]:
        expected.append([] if kind in ("none", "local") else [(kind, size)])
        assert size > 0 or not expected[-1]
    return [forward, calls, *expected]


@pytest.mark.parametrize("pair", PAIRS)
def test_table_names_the_collectives_that_run_and_their_payload(ranks, pair: str) -> None:
    places = {"R": R, "V": V, "P": P}
    source, target = places.get(pair[0], S(0)), places.get(pair[1], S(1, 2))
    for forward, backward, told_forward, told_backward in ranks(4).run(
        recorded, source, target, (8, 16)
    ):
        assert forward == told_forward
        assert backward == told_backward


def test_column_then_row_parallel_mlp_equals_one_device(ranks) -> None:
    x, a, b, bias = (torch.randn(s, dtype=torch.float64) for s in [(8, 6), (6, 12), (12, 6), (6,)])

    def forward(x, a, b, bias, axis, sequence):
        enter = collectives.all_gather if sequence else collectives.all_reduce_gradient
        leave = collectives.reduce_scatter if sequence else collectives.all_reduce
        where = (0, 1, axis) if sequence else (axis,)
        y = (enter(x, *where) @ a).tanh() @ b + collectives.split_sum(bias, axis)
        return leave(y, *where).square()

    def one_rank(sequence: bool) -> list[Tensor]:
        axis = Mesh.create(2, dist.get_rank(), [2]).tensor(2)
        locals_ = [held(x, S(0), 2, axis.index) if sequence else x]
        locals_ += [held(a, S(1), 2, axis.index), held(b, S(0), 2, axis.index), bias]
        leaves = [value.clone().requires_grad_() for value in locals_]
        forward(*leaves, axis, sequence).sum().backward()
        return [leaf.grad for leaf in leaves]

    leaves = [value.clone().requires_grad_() for value in (x, a, b, bias)]
    (((leaves[0] @ leaves[1]).tanh() @ leaves[2] + leaves[3]).square()).sum().backward()
    whole = [leaf.grad for leaf in leaves]
    for sequence in (False, True):
        answers = ranks(2).run(one_rank, sequence)
        places = [S(0) if sequence else R, S(1), S(0), R]
        for k, place in enumerate(places):
            assert_is([answer[k] for answer in answers], whole[k], place, gradient=True)


@pytest.mark.parametrize("pair", PAIRS)
def test_dry_axis_gives_real_and_fake_tensors_the_right_shapes(pair: str) -> None:
    n = 4
    rng = random.Random(pair)
    axis = Axis.dry_run("tp4", n, 1)
    for _ in range(5):
        source, target, shape = random_case(pair, n, rng)
        x = torch.randn(shape)
        found = collectives.conversion(source, target)
        assert found is not None
        local = held(x, source, n, 1)
        for mode in (None, FakeTensorMode()):
            value = local if mode is None else mode.from_tensor(local)
            value = value.detach().requires_grad_()
            y = found.function(value, *found.arguments, axis)
            y.sum().backward()
            assert y.shape == held(x, target, n, 1).shape
            assert value.grad is not None and value.grad.shape == local.shape
            assert y.is_contiguous() and type(y) is (Tensor if mode is None else type(value))
