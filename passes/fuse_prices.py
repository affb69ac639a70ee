"""Whether a fused operator pays: bytes that a streaming kernel does not move, communication that an
overlapped product hides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile import collectives, operators
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.errors import GalvatronError
from galvatron_compile.kernels.base import HAS_TRITON, KERNEL_DTYPES
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.fuse_match import Match, Node, inputs, is_call, is_op, val
from galvatron_compile.program import StageProgram
from galvatron_compile.torch_private import size_expression

# Of what the separate operators take; less is within what predictions miss. And at least a launch.
LEAST_GAIN = 0.05


# Passes over the logits, besides that which reads them, each of a kernel of its own: the logarithms
# of probabilities written (whole); a maximum, a difference, an exponential and a sum (shards).
_PASSES: dict[Any, int] = {
    operators.cross_entropy_sum: 1,
    operators.cross_entropy_sum_shard: 5,
}


@dataclass(frozen=True)
class Prices:
    """What decides over a match. local_batch: samples of a micro-batch on this rank.

    always: whatever can be replaced is, whether it pays or not.
    """

    device: torch.device
    cluster: ClusterProfile | None
    local_batch: int
    always: bool

    @staticmethod
    def of(program: StageProgram, cluster: ClusterProfile | None, wish: str) -> Prices:
        if wish not in ("auto", "always"):
            raise GalvatronError(f"fuse is {wish!r}; pass 'auto', 'always' or 'never'")
        plan = program.plan
        local = plan.global_batch_size // plan.num_micro_batches // plan.data_size
        return Prices(program.device, cluster, max(1, local), wish == "always")

    def judge(self, match: Match) -> tuple[str, float | None]:
        """(why it is not replaced, empty if it is; ms that it saves)."""
        read = inputs(match)
        floats = {val(x).dtype for x in read if val(x).is_floating_point()}
        results = {val(x).dtype for x in match.outputs}
        if "cross_entropy" not in match.name and (len(floats) > 1 or results != floats):
            shown = ", ".join(sorted(str(d).removeprefix("torch.") for d in floats | results))
            return f"mixes dtypes ({shown})", None
        if self.always:
            return "", None
        if self.device.type != "cuda":
            return f"no kernel runs on the {self.device.type.upper()}", None
        if not HAS_TRITON:
            return "triton is not installed", None
        if unknown := floats - set(KERNEL_DTYPES):
            return f"no kernel for {unknown.pop()}".replace("torch.", ""), None
        axis = next((_axis(x) for x in match.args if _axis(x) is not None), None)
        overlaps = "→" in match.name
        if overlaps and axis is not None and self._spans_nodes(axis):
            return f"axis {axis} spans nodes; symmetric memory reaches one", None
        if self.cluster is None:
            return "", None
        apart_ms, fused_ms = self._overlap_ms(match, axis) if overlaps else self._stream_ms(match)
        saves_ms = apart_ms - fused_ms
        if saves_ms == 0:
            return "it is one kernel already", saves_ms
        if saves_ms < max(LEAST_GAIN * apart_ms, self.cluster.least_ms):
            return f"too small: {apart_ms:.3f} ms apart, {fused_ms:.3f} ms as one", saves_ms
        return "", saves_ms

    def _spans_nodes(self, axis: Axis) -> bool:
        return self.cluster is not None and self.cluster.tier(axis.ranks) != "node"

    def _stream_ms(self, match: Match) -> tuple[float, float]:
        """Every operator reads its inputs and writes its output, against doing so once. What a sum
        over ranks costs it costs either way."""
        assert self.cluster is not None
        apart_ms = 0.0
        for node in match.covers:
            if _moves_nothing(node) or is_call(node, collectives.all_reduce):
                continue
            moved = sum(self.num_bytes(x) for x in [node, *node.all_input_nodes])
            apart_ms += self.cluster.memory_ms(moved) + self._inside_ms(node)
        moved = sum(self.num_bytes(x) for x in [*inputs(match), *match.outputs])
        return apart_ms, self.cluster.memory_ms(moved)

    def _inside_ms(self, node: Node) -> float:
        """Of one operator that is several kernels: what moves besides its inputs and output."""
        assert self.cluster is not None
        if node.target not in _PASSES:
            return 0.0
        logits = node.args[0] if node.args else node.kwargs["logits"]
        num_bytes = self.numel(logits) * max(4, val(logits).dtype.itemsize)
        return _PASSES[node.target] * self.cluster.memory_ms(num_bytes)

    def _overlap_ms(self, match: Match, axis: Axis | None) -> tuple[float, float]:
        """The product and the collective one after the other, against the longer of two roads: the
        product, slowed by the collective beside it; or the collective, before or behind the product
        of one rank's part, which cannot begin earlier or be sent later."""
        assert self.cluster is not None and axis is not None
        value, weights = match.args[0], match.args[1]
        each = weights if isinstance(weights, list) else [weights]
        features = sum(self.size(val(weight).shape[0]) for weight in each)
        gathers = "gather" in match.name.split(" ")[0]
        rows = self.numel(value) // self.size(val(value).shape[-1]) * (axis.size if gathers else 1)
        flops = 2.0 * rows * features * self.size(val(value).shape[-1])
        product_ms = self.cluster.matmul_ms(flops, val(value).dtype)
        if gathers:
            kind, moved = "all_gather", self.num_bytes(value) * axis.size
        else:
            kind, moved = "reduce_scatter", rows * features * val(value).dtype.itemsize
        collective_ms = self.cluster.collective_ms(kind, moved, axis.ranks)
        joining = 2 * sum(map(self.num_bytes, each)) if len(each) > 1 else 0
        slowed_ms = (self.cluster.overlap_slowdown - 1) * min(product_ms, collective_ms)
        fused_ms = max(product_ms + slowed_ms, collective_ms + product_ms / axis.size)
        return product_ms + collective_ms, fused_ms + self.cluster.memory_ms(joining)

    # Sizes.

    def num_bytes(self, node: Node) -> int:
        value = node.meta.get("val")
        return self.numel(node) * value.dtype.itemsize if isinstance(value, Tensor) else 0

    def numel(self, node: Node) -> int:
        return math.prod(self.size(size) for size in val(node).shape)

    def size(self, size: Any) -> int:
        """With this rank's share of a micro-batch for the size of the batch."""
        expression = size_expression(size)
        if isinstance(expression, int):
            return expression
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self.local_batch)))


def _moves_nothing(node: Node) -> bool:
    looks = is_op(node, "slice", "view", "reshape")
    return looks or is_call(node, collectives.all_reduce_gradient)


def _axis(argument: Any) -> Axis | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        found = getattr(argument.graph.owning_module, str(argument.target), None)
        return found if isinstance(found, Axis) else None
    return None
