"""All-gather + matmul against float64, with plain collectives, with kernels across processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_checks import EPS, NAME, as_fake, come_late, epochs_of, near, of_all_ranks, poisoned

from galvatron_compile.kernels import all_gather_matmul as tested


def check(
    seed: int, sizes: tuple[int, int, int], dtype: torch.dtype, odd_strides: bool, kernels: bool
) -> None:
    with poisoned() as peers:
        compare(peers, seed, sizes, dtype, odd_strides, kernels)


def compare(
    peers: Any, seed: int, sizes: Any, dtype: torch.dtype, odd_strides: bool, kernels: bool
) -> None:
    m, k, out = sizes
    rank, size = peers.rank, peers.size
    xs = of_all_ranks(seed, (m, k), dtype)
    weights = of_all_ranks(seed + 1, (out, k), dtype)
    dys = of_all_ranks(seed + 2, (size * m, out), dtype)
    dgathered = of_all_ranks(seed + 3, (size * m, k), dtype)
    x, weight = xs[rank].clone(), weights[rank].clone()
    if odd_strides:
        x, weight = x.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0]
    x.requires_grad_(), weight.requires_grad_()
    found: list[torch.Tensor] = []
    come_late(peers, seed)

    def run() -> None:
        y, gathered = tested.all_gather_matmul(x, weight, size, NAME)
        both = torch.autograd.grad((y, gathered), (x, weight), (dys[rank], dgathered[rank]))
        found.extend((y, gathered, *both))
        as_fake(tested.all_gather_matmul, (x, weight, size, NAME), (y, gathered))

    # Forward, its mirror, and the scatter of the gradient of what was gathered.
    assert not kernels or epochs_of(peers, run) == 3
    if not kernels:
        run()
    y, gathered, dx, dweight = found
    assert torch.equal(gathered, torch.cat(xs))
    near(y, tested.all_gather_matmul_reference(xs, weights)[rank], k)
    each = zip(dys, weights, dgathered, strict=True)
    full_dx = sum(dy.double() @ w.double() + more.double() for dy, w, more in each)
    assert isinstance(full_dx, torch.Tensor)
    # Partial sums are rounded to the dtype before they are added.
    near(dx, full_dx.chunk(size)[rank], size * out, roundings=size + 3)
    near(dweight, dys[rank].double().t() @ torch.cat(xs).double(), size * m)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_collectives_equal_the_float64_reference(
    ranks: Any, size: int, dtype: torch.dtype, seed: int
) -> None:
    ranks(size).run(check, seed, (5, 7, 3), dtype, True, False)


@pytest.mark.parametrize(
    ("size", "sizes", "dtype", "odd_strides"),
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
    interpreted: Any, size: int, sizes: Any, dtype: torch.dtype, odd_strides: bool, seed: int
) -> None:
    interpreted(size).run(check, seed, sizes, dtype, odd_strides, True)


def at_the_edges() -> None:
    """Sizes of zero; more than the memory or its flags take."""
    with poisoned(capacity_bytes=4096, num_slots=2) as peers:
        n, rank = peers.size, peers.rank
        for m, k, out, epochs in ((3, 4, 0, 1), (3, 0, 4, 0), (0, 4, 3, 0), (64, 16, 3, 1),
                                  (64, 17, 3, 0), (65, 2, 3, 0)):  # fmt: skip
            x, found = torch.full((m, k), float(rank)), []

            def run(x: torch.Tensor = x, out: int = out, found: list[Any] = found) -> None:
                weight = torch.ones(out, x.shape[1])
                found.extend(tested.all_gather_matmul(x, weight, n, NAME))

            assert epochs_of(peers, run) == epochs, (m, k, out)
            rows = torch.arange(n).float().repeat_interleave(m)[:, None]
            assert torch.equal(found[0], k * rows.expand(n * m, out))
            assert torch.equal(found[1], rows.expand(n * m, k))


def test_empty_tensors_and_those_that_do_not_fit(interpreted: Any) -> None:
    interpreted(2).run(at_the_edges)


def without_producers() -> None:
    """What multiplies waits for what fetches, also where it happens to run later anyway."""
    with poisoned() as peers, pytest.MonkeyPatch.context() as patch:
        assert peers.memory is not None
        peers.memory.max_polls = 20
        patch.setattr(tested, "_produce", lambda *_: None)
        x, y, gathered = torch.ones(4, 4), torch.zeros(8, 4), torch.ones(8, 4)
        with pytest.raises(RuntimeError, match=f"waited in vain for rank {1 - peers.rank}: "):
            tested.launch(x, torch.eye(4), y, gathered, peers)
        mine = slice(4 * peers.rank, 4 * peers.rank + 4)
        assert torch.equal(y[mine], x) and int(y.isnan().sum()) == 16


def test_products_wait_for_what_is_fetched(interpreted: Any) -> None:
    interpreted(2).run(without_producers)


def test_alone() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    y, gathered = tested.all_gather_matmul(x, weight, 1, "nobody")
    assert torch.equal(gathered, x) and gathered.data_ptr() != x.data_ptr()
    near(y, tested.all_gather_matmul_reference([x], [weight])[0], 3)
