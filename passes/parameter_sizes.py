"""Bytes of a layer's parameters on one rank, before ZeRO divides them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.precision import Precision


@dataclass(frozen=True)
class ParameterBytes:
    """Parameters that are divided alike.

    working, master, gradient: in the dtypes that compute, that the optimizer updates, and that
    gradients are summed in. partial: gradients that are also summed over the tensor axis.
    mixed: whether working and master weights are different tensors.
    """

    working: int = 0
    master: int = 0
    gradient: int = 0
    partial: int = 0
    mixed: bool = False

    def divided(self, parts: int) -> ParameterBytes:
        """One of ``parts`` equal shares, as experts are divided over expert-parallel ranks."""
        return ParameterBytes(
            -(-self.working // parts),
            -(-self.master // parts),
            -(-self.gradient // parts),
            -(-self.partial // parts),
            self.mixed,
        )


def parameter_bytes(
    layered: LayeredGraph,
    class_index: int,
    sharded: ShardedLayer,
    precision: Precision,
    experts: Collection[int] = (),
    skip: Collection[str] = (),
) -> tuple[ParameterBytes, ParameterBytes]:
    """Sizes of a class's parameters in its sharded form: (those of all tokens, the experts').

    experts: which of the class's parameters, by their order, hold one slice per expert.
    skip: names of parameters that are another layer's.
    """
    layer = next(layer for layer in layered.layers if layer.class_index == class_index)
    sizes: tuple[list[int], list[int]] = ([0] * 4, [0] * 4)
    mixed = [False, False]
    for index, (name, placement) in enumerate(
        zip(layer.parameters, sharded.parameters, strict=True)
    ):
        if name in skip:
            continue
        parameter = layered.graph.parameters[name]
        count = parameter.numel() // (sharded.tp if placement.is_shard else 1)
        dtype = parameter.dtype
        kind = int(index in experts)
        total = sizes[kind]
        total[0] += count * precision.compute_of(dtype).itemsize
        total[1] += count * precision.master_of(dtype).itemsize
        mixed[kind] |= precision.compute_of(dtype) != precision.master_of(dtype)
        if parameter.requires_grad:
            total[2] += count * precision.reduce_of(dtype).itemsize
            if placement.kind == "V" and sharded.tp > 1:
                total[3] += count * precision.reduce_of(dtype).itemsize
    (a, b, c, d), (e, f, g, h) = sizes
    return ParameterBytes(a, b, c, d, mixed[0]), ParameterBytes(e, f, g, h, mixed[1])
