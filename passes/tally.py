"""What a layer graph does, counted without doing it: FLOPs, bytes, saved and peak memory.

The graph runs forward and backward on fake tensors, so that what is counted is what the device
will be asked to run, backward formulas and attention kernels included. The fake device is the CPU;
with ``cuda`` what CUDA runs otherwise is counted as CUDA runs it (see passes.cuda_kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from galvatron_compile.passes.cuda_kernels import KERNELS, bytes_read
from galvatron_compile.passes.tally_memory import Live, Saved, num_bytes_of

ATTENTION = "attention"
MATMUL = "matmul"
ACCUMULATE = "accumulate"
"""The operator that adds a gradient to the sum over micro-batches."""


View = tuple[int, int, int]
"""A tensor that an operator touched: number of its storage, a hash of its view of it, bytes."""


@dataclass(frozen=True)
class OperatorCount:
    """One executed ATen operator: FLOPs, bytes read and written, and what kind of work it is.

    reads, writes: the tensors; a storage keeps its number through forward and backward.
    product: of a matrix product, (batch, m, n, k).
    """

    name: str
    kind: str  # "matmul", "attention" or "memory"
    flops: int
    num_bytes: int
    dtype: str
    reads: tuple[View, ...] = ()
    writes: tuple[View, ...] = ()
    product: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Tally:
    """One layer, one micro-batch of a given local size, on one rank.

    saved_bytes: activations kept for backward (differentiable inputs counted here, outputs not).
    peak_bytes: highest new memory during forward and backward, including what is saved.
    input_bytes: differentiable activations that come in, what full recompute keeps instead.
    product_bytes: results of matrix products and attention that stay inside the layer, what
        selective recompute keeps beside the inputs.
    leaving: numbers of the storages of what the layer gives on.
    dropped: of products' results that selective recompute does not keep after all; none here.
    """

    forward: tuple[OperatorCount, ...]
    backward: tuple[OperatorCount, ...]
    by_node: Mapping[str, tuple[OperatorCount, ...]]
    saved_bytes: int
    peak_bytes: int
    input_bytes: int
    product_bytes: int = 0
    leaving: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()


class _Counter(TorchDispatchMode):
    """Counts every operator that reaches the dispatcher, and the memory that it makes."""

    def __init__(self, live: Live, cuda: bool) -> None:
        super().__init__()
        self.live, self.cuda = live, cuda
        self.counts: list[OperatorCount] = []
        # Bytes of every storage that a product or attention made, by an address that may be used
        # again: ``made`` tells which of them is there now.
        self.product_bytes = 0
        self.made: dict[int, int] = {}
        self.is_quiet = False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, operators make memory but are not counted."""
        before, self.is_quiet = self.is_quiet, True
        try:
            yield
        finally:
            self.is_quiet = before

    def record(
        self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Count one operator that moves these tensors and computes little."""
        self._add(name, "memory", 0, reads, writes)

    def _add(
        self,
        name: str,
        kind: str,
        flops: int,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
    ) -> None:
        floats = [t.dtype for t in [*writes, *reads] if t.dtype.is_floating_point]
        dtype = str(floats[0] if floats else torch.int64).removeprefix("torch.")
        written = [self._view(tensor, num_bytes_of(tensor)) for tensor in writes]
        sizes = [num_bytes_of(tensor) for tensor in reads]
        if self.cuda:
            sizes = bytes_read(name, reads, sum(num_bytes for _, _, num_bytes in written))
        read = [self._view(tensor, size) for tensor, size in zip(reads, sizes, strict=True)]
        num_bytes = sum(size for _, _, size in [*read, *written])
        product = _product(reads, writes) if kind == MATMUL else None
        self.counts.append(
            OperatorCount(name, kind, flops, num_bytes, dtype, tuple(read), tuple(written), product)
        )
        self._note_products(kind, writes)

    def _view(self, tensor: torch.Tensor, num_bytes: int) -> View:
        view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return self.live.number(tensor.untyped_storage()), hash(view), num_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in outputs:
            self.live.hold(tensor)
        if func.namespace == "aten" and not self.is_quiet:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if not _is_alias(func, inputs, outputs):
                flops = _flops(func, args, kwargs, out)
                name = func.overloadpacket.__name__
                self._add(name, _kind(name, flops), flops, inputs, outputs)
        return out

    def _note_products(self, kind: str, outputs: Sequence[torch.Tensor]) -> None:
        for storage in [tensor.untyped_storage() for tensor in outputs]:
            self.made[storage._cdata] = storage.nbytes() if kind != "memory" else 0
            self.product_bytes += self.made[storage._cdata]


def _is_alias(
    func: Any, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> bool:
    """Nothing moves: a view, also one that its schema does not call so (``_unsafe_view``)."""
    if func.is_view:
        return True
    held = {tensor.untyped_storage()._cdata for tensor in inputs}
    shared = all(tensor.untyped_storage()._cdata in held for tensor in outputs)
    return bool(outputs) and shared and not func._schema.is_mutable


def _kind(name: str, flops: int) -> str:
    if not flops:
        return "memory"
    return ATTENTION if "attention" in name else MATMUL


def _product(
    reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
) -> tuple[int, int, int, int] | None:
    """Of ``mm``, ``bmm`` and their like with an addend in front; None for other products."""
    if len(reads) < 2 or len(writes) != 1 or writes[0].dim() not in (2, 3):
        return None
    batch, m, n = (1, *writes[0].shape)[-3:]
    return batch, m, n, reads[-2].shape[-1]


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """torch's own formulas; the CPU attention kernel, which has none there, by the same count.

    Causal attention is half of it: kernels skip the blocks above the diagonal.
    """
    name = func.overloadpacket.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        is_causal = bool(args[4] if len(args) > 4 else kwargs.get("is_causal", False))
        return int(sdpa_flop_count(*_alike(args[:3]))) // (1 + is_causal)
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        is_causal = bool(args[7] if len(args) > 7 else kwargs.get("is_causal", False))
        return int(sdpa_backward_flop_count(*_alike(args[:4]))) // (1 + is_causal)
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _alike(tensors: Sequence[torch.Tensor]) -> list[torch.Size]:
    """Shapes with the heads of the first: a key head works once for every query head of its
    group, and torch 2.11 counts only equal numbers of heads."""
    heads = tensors[0].shape[1]
    return [torch.Size((t.shape[0], heads, *t.shape[2:])) for t in tensors]


class _ByNode(fx.Interpreter):
    """Runs a graph, as the counter's device would, and remembers what each node caused."""

    def __init__(self, graph: fx.GraphModule, counter: _Counter) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.counter = counter
        self.by_node: dict[str, tuple[OperatorCount, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = len(self.counter.counts)
        result = super().run_node(n)
        self.by_node[n.name] = tuple(self.counter.counts[before:])
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kernel = KERNELS.get(target) if self.counter.cuda else None
        if kernel is not None:
            return kernel(self.counter, *args, **kwargs)
        return super().call_function(target, args, kwargs)


def tally(
    graph: fx.GraphModule,
    make_arguments: Callable[[], list[Any]],
    differentiable: Sequence[bool],
    activations: Sequence[bool],
    cuda: bool = False,
) -> Tally:
    """Run ``graph`` forward and backward on fake tensors and count.

    make_arguments: called under the fake mode; gives the placeholders' values in order.
    differentiable, activations: per placeholder, whether it needs a gradient and whether it is an
        activation rather than a parameter or buffer.
    cuda: count what CUDA would run, and in backward the sum of each parameter's gradients over
        micro-batches; not the gradient that backward starts from, which the next layer makes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        live = Live()
        counter = _Counter(live, cuda)
        arguments = _require_grad(make_arguments(), differentiable)
        if cuda:
            for value, wanted, inside in zip(arguments, differentiable, activations, strict=True):
                if wanted and not inside:
                    value.register_hook(partial(_accumulate, counter))
        inputs = [
            value
            for value, is_grad, is_activation in zip(
                arguments, differentiable, activations, strict=True
            )
            if is_grad and is_activation
        ]
        live.seen |= {
            value.untyped_storage()._cdata for value in arguments if isinstance(value, torch.Tensor)
        }
        saved = Saved()
        with counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            interpreter = _ByNode(graph, counter)
            outputs = interpreter.run(*arguments)
        forward = tuple(counter.counts)
        saved_bytes = saved.total_bytes(arguments, inputs, outputs)
        leaving = {t.untyped_storage()._cdata for t in tree_leaves(outputs)}
        product_bytes = counter.product_bytes - sum(counter.made.get(key, 0) for key in leaving)
        numbers = frozenset(live.number(t.untyped_storage()) for t in tree_leaves(outputs))
        counter.counts.clear()
        with counter:
            _backward(outputs, counter)
    return Tally(
        forward=forward,
        backward=tuple(counter.counts),
        by_node=interpreter.by_node,
        saved_bytes=saved_bytes,
        peak_bytes=live.peak_bytes,
        input_bytes=sum(num_bytes_of(value) for value in inputs),
        product_bytes=product_bytes,
        leaving=numbers,
    )


def _require_grad(arguments: list[Any], differentiable: Sequence[bool]) -> list[Any]:
    made = []
    for value, wanted in zip(arguments, differentiable, strict=True):
        if wanted:
            value.requires_grad_(True)
            # The runtime takes each gradient away as soon as it is made; so does the count.
            value.register_post_accumulate_grad_hook(_drop_grad)
        made.append(value)
    return made


def _drop_grad(value: torch.Tensor) -> None:
    value.grad = None


def _accumulate(counter: _Counter, gradient: torch.Tensor) -> None:
    """One more operator: a gradient is added to a sum, which is as large as it is."""
    counter.record(ACCUMULATE, [gradient, gradient], [gradient])


def _backward(outputs: Any, counter: _Counter) -> None:
    differentiable = [t for t in tree_leaves(outputs) if t.requires_grad]
    if differentiable:
        with counter.quiet() if counter.cuda else nullcontext():
            seeds = [torch.ones_like(t) for t in differentiable]
        torch.autograd.backward(differentiable, seeds)
