"""What a layer graph does, counted without doing it: FLOPs, bytes, saved and peak memory.

The graph runs forward and backward on fake tensors, so that what is counted is what the device
will be asked to run, backward formulas and attention kernels included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = "attention"
MATMUL = "matmul"


@dataclass(frozen=True)
class OperatorCount:
    """One executed ATen operator: FLOPs, bytes read and written, and what kind of work it is."""

    name: str
    kind: str  # "matmul", "attention" or "memory"
    flops: int
    num_bytes: int
    dtype: str


@dataclass(frozen=True)
class Tally:
    """One layer, one micro-batch of a given local size, on one rank.

    saved_bytes: activations kept for backward (differentiable inputs counted here, outputs not).
    peak_bytes: highest new memory during forward and backward, including what is saved.
    input_bytes: differentiable activations that come in, what full recompute keeps instead.
    product_bytes: results of matrix products and attention that stay inside the layer, what
        selective recompute keeps beside the inputs.
    """

    forward: tuple[OperatorCount, ...]
    backward: tuple[OperatorCount, ...]
    by_node: Mapping[str, tuple[OperatorCount, ...]]
    saved_bytes: int
    peak_bytes: int
    input_bytes: int
    product_bytes: int = 0


@dataclass
class _Live:
    """Bytes of the storages that are alive and were made since counting began."""

    now_bytes: int = 0
    peak_bytes: int = 0
    seen: set[int] = field(default_factory=set)

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        num_bytes = storage.nbytes()
        self.seen.add(key)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.now_bytes -= num_bytes


class _Counter(TorchDispatchMode):
    """Counts every operator that reaches the dispatcher, and the memory that it makes."""

    def __init__(self, live: _Live) -> None:
        super().__init__()
        self.live = live
        self.counts: list[OperatorCount] = []
        # Bytes of every storage that a product or attention made, by an address that may be used
        # again: ``made`` tells which of them is there now.
        self.product_bytes = 0
        self.made: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in outputs:
            self.live.hold(tensor)
        if func.namespace == "aten":
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if not _is_alias(func, inputs, outputs):
                self.counts.append(_count(func, args, kwargs, out, inputs, outputs))
                self._note_products(self.counts[-1].kind, outputs)
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


def _count(
    func: Any,
    args: Any,
    kwargs: Any,
    out: Any,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> OperatorCount:
    flops = _flops(func, args, kwargs, out)
    num_bytes = sum(t.numel() * t.element_size() for t in [*inputs, *outputs])
    kind = "memory"
    if flops:
        kind = ATTENTION if "attention" in func.overloadpacket.__name__ else MATMUL
    floats = [t.dtype for t in [*outputs, *inputs] if t.dtype.is_floating_point]
    dtype = str(floats[0] if floats else torch.int64).removeprefix("torch.")
    return OperatorCount(func.overloadpacket.__name__, kind, flops, num_bytes, dtype)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """torch's own formulas; the CPU attention kernel, which has none there, by the same count.

    Causal attention is half of it: kernels skip the blocks above the diagonal.
    """
    name = func.overloadpacket.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        is_causal = bool(args[4] if len(args) > 4 else kwargs.get("is_causal", False))
        return int(sdpa_flop_count(*(t.shape for t in args[:3]))) // (1 + is_causal)
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        is_causal = bool(args[7] if len(args) > 7 else kwargs.get("is_causal", False))
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4]))) // (1 + is_causal)
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


class _ByNode(fx.Interpreter):
    """Runs a graph and remembers which counts each node caused."""

    def __init__(self, graph: fx.GraphModule, counter: _Counter) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.counter = counter
        self.by_node: dict[str, tuple[OperatorCount, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = len(self.counter.counts)
        result = super().run_node(n)
        self.by_node[n.name] = tuple(self.counter.counts[before:])
        return result


def tally(
    graph: fx.GraphModule,
    make_arguments: Callable[[], list[Any]],
    differentiable: Sequence[bool],
    activations: Sequence[bool],
) -> Tally:
    """Run ``graph`` forward and backward on fake tensors and count.

    make_arguments: called under the fake mode; gives the placeholders' values in order.
    differentiable, activations: per placeholder, whether it needs a gradient and whether it is an
        activation rather than a parameter or buffer.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = _require_grad(make_arguments(), differentiable)
        live = _Live()
        counter = _Counter(live)
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
        saved = _Saved()
        with counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            interpreter = _ByNode(graph, counter)
            outputs = interpreter.run(*arguments)
        forward = tuple(counter.counts)
        saved_bytes = saved.total_bytes(arguments, inputs, outputs)
        leaving = {t.untyped_storage()._cdata for t in tree_leaves(outputs)}
        product_bytes = counter.product_bytes - sum(counter.made.get(key, 0) for key in leaving)
        counter.counts.clear()
        with counter:
            _backward(outputs)
    return Tally(
        forward=forward,
        backward=tuple(counter.counts),
        by_node=interpreter.by_node,
        saved_bytes=saved_bytes,
        peak_bytes=live.peak_bytes,
        input_bytes=sum(_num_bytes(value) for value in inputs),
        product_bytes=product_bytes,
    )


class _Saved:
    """Storages that autograd keeps for backward, by identity."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def total_bytes(self, arguments: list[Any], inputs: list[Any], outputs: Any) -> int:
        """Kept bytes: not parameters, buffers or what other layers count (see Tally)."""
        counted = {value.untyped_storage()._cdata for value in inputs}
        others = {
            value.untyped_storage()._cdata
            for value in [*arguments, *tree_leaves(outputs)]
            if isinstance(value, torch.Tensor)
        } - counted
        saved = sum(s.nbytes() for key, s in self.storages.items() if key not in others)
        constants = [t for t in tree_leaves(outputs) if not t.requires_grad]
        return saved + sum(_num_bytes(t) for t in constants)


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


def _backward(outputs: Any) -> None:
    differentiable = [t for t in tree_leaves(outputs) if t.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.ones_like(t) for t in differentiable])


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
