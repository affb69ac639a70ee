"""Which layer graphs to time on this device before planning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import LayeredGraph, noted
from galvatron_compile.layer_timing import LONGEST_RUN_MS, Experiment, FormKey, Forward
from galvatron_compile.lowered_piece import LoweredPiece
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.annotate import Workload, legal_counts
from galvatron_compile.passes.arguments import (
    concrete_shape,
    differentiable_flags,
    make_arguments,
    placeholders,
)
from galvatron_compile.passes.fuse import Wish, fuse_graph
from galvatron_compile.passes.fuse_prices import Prices
from galvatron_compile.passes.layer_estimate import LARGE, Estimator
from galvatron_compile.passes.lower import bound, cut_in_two
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.sharding import localise
from galvatron_compile.passes.tally import Tally
from galvatron_compile.pieces import EagerPiece, Piece, PieceGraph
from galvatron_compile.printer import full_name
from galvatron_compile.strategy import Strategy
from galvatron_compile.torch_private import as_fake

# What any device of the kind reaches. The profile's rates say nothing of the device at hand, which
# may be a laptop that plans for a cluster of GPUs.
_FLOPS_PER_S = {"cpu": 1e10, "cuda": 1e12}
_BYTES_PER_S = {"cpu": 1e9, "cuda": 5e10}
_LONGEST_FIRST_RUN_MS = 10_000.0
_TURNS_BYTES, _MAX_TURNS, _MAX_DEPTH = 64 * 1024**2, 8, 4


def experiments(
    layered: LayeredGraph,
    estimator: Estimator,
    uses: Iterable[tuple[int, Strategy]],
    workload: Workload,
    device: torch.device,
    memory_bytes: int,
    wish: Wish = "auto",
) -> list[Experiment]:
    """Every form that the (class index, strategy) pairs use, at local batches that plans may use,
    with the fused operators that training would have (``wish``).

    Left out are sizes that need more than ``memory_bytes``: a plan with that limit cannot use them
    either, and where it is this device that is too small, times are extrapolated from smaller
    sizes. A form that is too large or too slow at a single sample is left out whole.
    """
    runs = []
    for form, (strategy, batches) in _forms(layered, estimator, uses, workload).items():
        class_index, tp, _ = form
        graph = localise(
            estimator.shardings.get(class_index, strategy), Axis.dry_run(f"tp{tp}", tp)
        )
        retarget_devices(graph, device)
        if wish != "never":
            prices = Prices(device, estimator.cluster, min(batches), wish == "always")
            graph, _ = fuse_graph(graph, prices)
        needed = partial(_needed_bytes, estimator, class_index, strategy, graph)
        _, counted = estimator.tallies_of(class_index, strategy)
        first = _first_size(min(batches), _sample_ms(counted, device))
        if first and needed(first) > memory_bytes:
            first = 1
        if first and needed(first) <= memory_bytes:
            sizes = tuple(size for size in sorted(batches) if needed(size) <= memory_bytes)
            depth = partial(_depth, needed, memory_bytes)
            prepare = _runner(graph, layered, layered.classes[class_index].kinds, device, depth)
            runs.append(Experiment(form, _describe(graph, layered), sizes, first, prepare))
    return runs


def _forms(
    layered: LayeredGraph,
    estimator: Estimator,
    uses: Iterable[tuple[int, Strategy]],
    workload: Workload,
) -> dict[FormKey, tuple[Strategy, set[int]]]:
    """Of every form one strategy that has it, and the local batches that it may run with."""
    wanted: dict[FormKey, tuple[Strategy, set[int]]] = {}
    for class_index, strategy in uses:
        if estimator.shardings.why_not(class_index, strategy) is None:
            counts = legal_counts(strategy, workload, layered)
            sizes = {workload.global_batch_size // (count * strategy.dp) for count in counts}
            if sizes:
                form = (class_index, strategy.tp, strategy.sequence_parallel)
                wanted.setdefault(form, (strategy, set()))[1].update(sizes)
    return dict(sorted(wanted.items()))


def _sample_ms(counted: Tally, device: torch.device) -> float:
    """Forward and backward of one sample, on the slowest device of the kind."""
    work = [*counted.forward, *counted.backward]
    flops_s = sum(count.flops for count in work) / _FLOPS_PER_S[device.type]
    bytes_s = sum(count.num_bytes for count in work) / _BYTES_PER_S[device.type]
    return (flops_s + bytes_s) * 1e3 / LARGE


def _first_size(smallest: int, sample_ms: float) -> int:
    """The smallest local batch if it is quick for sure, else what is; 0 if nothing may be."""
    if smallest * sample_ms <= LONGEST_RUN_MS:
        return smallest
    if sample_ms <= _LONGEST_FIRST_RUN_MS:
        return max(1, int(LONGEST_RUN_MS / sample_ms))
    return 0


def _needed_bytes(
    estimator: Estimator, class_index: int, strategy: Strategy, graph: fx.GraphModule, size: int
) -> int:
    """The arguments, their gradients, and at most what lives in between."""
    arguments_bytes = 0
    for node in placeholders(graph):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = concrete_shape(value, estimator.layered.graph.batch_symbol, size)
            arguments_bytes += math.prod(shape) * value.element_size()
    return 2 * arguments_bytes + estimator.estimate(class_index, strategy, size).peak_bytes


def _describe(graph: fx.GraphModule, layered: LayeredGraph) -> str:
    """The graph and its shapes, with the batch symbol under one name in every process."""
    lines = [
        f"{node.op} {full_name(node.target)} {node.args} {node.kwargs} "
        f"{getattr(node.meta.get('val'), 'shape', '')} {getattr(node.meta.get('val'), 'dtype', '')}"
        for node in graph.graph.nodes
    ]
    text = "\n".join(lines).replace(str(layered.graph.batch_symbol), "batch")
    return f"lowered, in turns, {_MAX_DEPTH} deep\n{text}"


def _depth(needed: Callable[[int], int], memory_bytes: int, size: int) -> int:
    """How many runs' saved activations are there at once; what fits."""
    return max(1, min(_MAX_DEPTH, memory_bytes // max(1, needed(size))))


def _runner(
    graph: fx.GraphModule,
    layered: LayeredGraph,
    kinds: tuple[str, ...],
    device: torch.device,
    depth: Callable[[int], int],
) -> Callable[[int], Forward]:
    """batch size -> a function that runs forward and gives one that runs backward, on arguments
    that live as long as it does. The graphs are those that training would run.

    As in training, parameters and saved activations are cold in the caches (in a step all other
    layers come in between), and gradients are added up: parameters and sums come in turns, of more
    bytes than caches hold, and a backward is that of the forward ``depth - 1`` runs ago.
    """
    flags = differentiable_flags(graph, kinds)
    symbol = layered.graph.batch_symbol

    def prepare(batch_size: int) -> Forward:
        *made, seed = make_arguments(graph, symbol, batch_size, device)
        piece = _piece(graph, kinds, flags, made)
        by_kind = {k: [v for v, own in zip(made, kinds, strict=True) if own == k] for k in kinds}
        values, parameters = by_kind.get("activation", []), by_kind.get("parameter", [])
        num_bytes = 2 * sum(p.numel() * p.element_size() for p in parameters)
        num_turns = max(1, min(_MAX_TURNS, _TURNS_BYTES // max(num_bytes, 1)))
        turns = cycle([_turn(parameters) for _ in range(num_turns)])

        waiting: deque[tuple[Any, ...]] = deque()

        def forward() -> Callable[[], Any]:
            mine, sums = next(turns)
            outputs, kept = piece.forward(values, mine, seed)
            gradients = [torch.ones_like(x) if x.is_floating_point() else None for x in outputs]
            waiting.append((mine, sums, kept, gradients))
            return backward

        def backward() -> None:
            mine, sums, kept, gradients = waiting.popleft()
            _, found = piece.backward(kept, mine, gradients)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total.add_(gradient.to_dense() if gradient.is_sparse else gradient)

        for _ in range(depth(batch_size) - 1):
            forward()
        return forward

    return prepare


def _turn(parameters: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A copy of the parameters, and where their gradients are added up."""
    copies = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters]
    return copies, [torch.zeros_like(p, requires_grad=False) for p in parameters]


def _piece(
    graph: fx.GraphModule, kinds: tuple[str, ...], flags: Sequence[bool], made: Sequence[Any]
) -> Piece:
    """A layer by itself, lowered; under eager autograd where it cannot be traced."""
    names = [node.name for node in placeholders(graph)]
    places = {k: [at for at, own in enumerate(kinds) if own == k] for k in kinds}
    activations, parameters = places.get("activation", []), places.get("parameter", [])
    results: Any = graph.graph.output_node().args[0]
    found = PieceGraph(
        layer=0,
        name="layer",
        module=graph,
        evaluation=graph,
        values=tuple(names[at] for at in activations),
        differentiable=tuple(flags[at] for at in activations),
        parameters=tuple((0, place) for place in range(len(parameters))),
        buffers=tuple(made[at] for at in places.get("buffer", [])),
        outputs=tuple(node.name for node in results),
        returns=tuple(bool(noted(node, "differentiable", False)) for node in results),
        drops=(),
        seed=(0, 0),
        recompute=False,
        has_trained=any(flags[at] for at in parameters),
    )
    eager = EagerPiece(found)
    wanted = [flag and kind != "buffer" for flag, kind in zip(flags, kinds, strict=False)]
    for value, flag in zip(made, wanted, strict=True):
        if flag:
            value.requires_grad_(True)
    if not found.trains:
        return eager
    try:
        recorded, cut = cut_in_two(found, as_fake(made), wanted)
    except UnsupportedError:
        return eager
    axes = {x.name: x for x in vars(graph).values() if isinstance(x, Axis)}
    return LoweredPiece(found, bound(recorded, cut, axes))
