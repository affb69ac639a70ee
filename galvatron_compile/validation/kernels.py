"""What a run's software makes of the counted operators of a layer: fused, unfused, slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from galvatron_compile.passes.fusion import fuse
from galvatron_compile.passes.tally import MATMUL, OperatorCount, Tally
from galvatron_compile.validation.software import Software

HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Kernels:
    """Called with the counts of a layer.

    eager_softmax: scores are converted, scaled, masked and normalised one after the other.
    vocab: entries of the vocabulary, by which the head is known.
    """

    software: Software
    eager_softmax: bool
    vocab: int

    def __call__(self, found: Tally) -> Tally:
        found = _dropping(found, self.software.kept_products)
        if self.eager_softmax:
            found = _spelled_out(found, _softmax)
        if self.software.composite_norm:
            found = _spelled_out(found, _norm)
        fused = fuse(found, self.software.fused)
        products = [count.product for count in fused.forward if count.product is not None]
        if self.software.whole_head == 1.0 or all(n != self.vocab for _, _, n, _ in products):
            return fused
        slower = partial(_slower, factor=self.software.whole_head)
        return replace(
            fused,
            forward=tuple(map(slower, fused.forward)),
            backward=tuple(map(slower, fused.backward)),
        )


def _dropping(found: Tally, kept_products: int) -> Tally:
    """Selective recompute keeps the first of every ``kept_products`` products, by their order."""
    results = [count.writes[0] for count in found.forward if count.kind == MATMUL]
    dropped = [view for i, view in enumerate(results) if i % kept_products]
    inside = sum(size for number, _, size in dropped if number not in found.leaving)
    numbers = frozenset(number for number, _, _ in dropped)
    return replace(found, product_bytes=found.product_bytes - inside, dropped=numbers)


def _spelled_out(
    found: Tally, spell: Callable[[OperatorCount], Iterator[OperatorCount]]
) -> Tally:
    return replace(
        found,
        forward=tuple(each for count in found.forward for each in spell(count)),
        backward=tuple(each for count in found.backward for each in spell(count)),
    )


def _norm(count: OperatorCount) -> Iterator[OperatorCount]:
    """What torch made of RMS norm before it had a kernel; bytes by element of the input.

    Forward: convert, square, mean, two products, convert back. Backward: the derivatives of these,
    as autograd runs them (counted with passes.tally on the CPU, which still runs the composite).
    """
    steps = {
        "_fused_rms_norm": (6, 8, 4, 8, 8, 6),
        "_fused_rms_norm_backward": (6, 12, 8, 4, 12, 8, 4, 8, 8, 8, 12, 12, 6),
    }.get(count.name)
    if steps is None:
        yield count
        return
    elements = count.writes[0][2] // HALF
    for element_bytes in steps:
        name = f"part of {count.name}"
        yield replace(count, name=name, num_bytes=elements * element_bytes, reads=(), writes=())


def _softmax(count: OperatorCount) -> Iterator[OperatorCount]:
    """In float32 between two conversions, the scale an operator of its own; others as they are."""
    if count.name not in ("_softmax", "_softmax_backward_data"):
        yield count
        return
    tensors = 2 if count.name == "_softmax" else 3  # read or written, equally large
    elements = count.num_bytes // (tensors * HALF)
    steps = {
        "convert": HALF + SINGLE,
        "scale": 2 * SINGLE,
        f"{count.name} in float32": tensors * SINGLE,
        "convert back": HALF + SINGLE,
    }
    for name, element_bytes in steps.items():
        num_bytes = elements * element_bytes
        yield replace(count, name=name, num_bytes=num_bytes, reads=(), writes=())


def _slower(count: OperatorCount, factor: float) -> OperatorCount:
    flops, num_bytes = round(count.flops * factor), round(count.num_bytes * factor)
    return replace(count, flops=flops, num_bytes=num_bytes)
