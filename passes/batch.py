"""batch: Graph → Graph, how every value lies on the data axis, and a loss that adds up.

Annotates every node with its placement on the data axis (``data``, text of a
:class:`~galvatron_compile.placement.Placement`) and with ``differentiable``, and rewrites the loss
so that *the sum over ranks and micro-batches of the part losses is the loss of the whole batch*,
however unevenly samples, tokens and ignored labels fall on the parts:

- a mean over the batch becomes a local sum divided by ``denominator_k``, a placeholder that
  carries the sum over all parts of a weight that ``Graph.denominators`` computes from the batch;
- so does every other number that is summed over the batch, does not depend on a parameter, and is
  then used as a whole (``mask.sum().clamp(min=1)``, the batch size as a number);
- what every part would add again (a regulariser) is divided by the number of parts.

An operator that mixes samples in any other way is annotated with ``data_inputs``, the placements
that it wants (``V``: gathered over the data axis), and with a ``remark``; ``splits_batch`` is
False then: such a batch cannot be cut into micro-batches.

On the data axis a value that is not sharded is V if a gradient flows through it (the runtime adds
up parameter gradients over the ranks), and R otherwise.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import Graph, copy_annotated, note, noted
from galvatron_compile.passes.batch_cost import IMPOSSIBLE, ConversionCosts
from galvatron_compile.passes.batch_loss import constant_in_parts, mean_as_sum, scalars_as_sums
from galvatron_compile.passes.blame import line_of_node
from galvatron_compile.passes.denominators import Denominators
from galvatron_compile.passes.sharding.rules import Rule, candidates, tensor_inputs
from galvatron_compile.passes.sharding.rules_base import is_tensor_valued, packet_name
from galvatron_compile.passes.sharding.views import quotient, shape_of, size_of
from galvatron_compile.placement import P, Placement, R, S, V

# What a batch index (arange over the batch) may go through on its way to an indexing operator.
INDEX_KEEPING = frozenset(
    {
        "unsqueeze", "squeeze", "view", "_unsafe_view", "reshape", "slice", "expand", "permute",
        "transpose", "to", "_to_copy", "clone", "contiguous", "alias", "detach",
    }
)  # fmt: skip


class _MixesError(Exception):
    """These operators must see the whole batch; try again with their inputs gathered."""

    def __init__(self, names: set[str], remark: str) -> None:
        super().__init__(remark)
        self.names = names
        self.remark = remark


def batch(graph: Graph) -> Graph:
    """See the module's docstring. Raises UnsupportedError where samples mix beyond repair."""
    if graph.batch_symbol is None:
        raise UnsupportedError(
            "the captured graph has a constant batch size and so cannot be split; capture it with "
            "a symbolic batch (no operator of the model may depend on the batch size's value)"
        )
    gathered: dict[str, str] = {}
    while True:
        try:
            return _Attempt(graph, gathered).run()
        except _MixesError as mixes:
            if mixes.names <= gathered.keys():
                raise UnsupportedError(mixes.remark) from None
            gathered |= dict.fromkeys(mixes.names - gathered.keys(), mixes.remark)


class _Attempt:
    """One forward walk, with the operators named in ``gathered`` working on the whole batch."""

    def __init__(self, source: Graph, gathered: dict[str, str]) -> None:
        self.source = source
        self.gathered = gathered
        self.symbol = source.batch_symbol
        self.module = copy_annotated(source.module)
        self.graph = self.module.graph
        self.denominators = Denominators(self.graph, self.symbol, source.parameters)
        self.costs = ConversionCosts(self.symbol, self.denominators)
        self.origin: dict[fx.Node, str] = {node: node.name for node in self.graph.nodes}
        self.mixed = False

    def run(self) -> Graph:
        batch_dims = iter(self.source.inputs.batch_dims)
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                dim = next(batch_dims)
                self.place(node, R if dim is None else S(dim), False)
            elif node.op == "get_attr":
                trained = self.source.parameters.get(str(node.target))
                differentiable = trained is not None and trained.requires_grad
                self.place(node, V if differentiable else R, differentiable)
            elif node.op == "output":
                self.finish(node)
            else:
                self.call(node)
        denominators = self.denominators.module(self.module)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()
        return dataclasses.replace(
            self.source,
            module=self.module,
            denominators=denominators,
            splits_batch=not self.mixed,
        )

    # Placements ------------------------------------------------------------------------------

    def place(self, node: fx.Node, placement: Placement, differentiable: bool) -> None:
        note(node, data=str(placement), differentiable=differentiable)

    def placement(self, value: fx.Node, user: fx.Node) -> Placement:
        """Of an input; for ``getitem`` that of the element taken."""
        text = noted(value, "data")
        if isinstance(text, list | tuple):
            text = text[user.args[1]] if packet_name(user.target) == "getitem" else text[0]  # type: ignore[index]
        return Placement.parse(text)

    # Operators -------------------------------------------------------------------------------

    def call(self, node: fx.Node) -> None:
        if not is_tensor_valued(node.meta.get("val")):
            note(node, data="R", differentiable=False)
            return
        self.check_sizes(node)
        inputs = tensor_inputs(node)
        note(node, differentiable=_differentiable(node, inputs))
        if self.index_of_batch(node, inputs):
            return
        forced = self.origin[node] in self.gathered
        summed_up = scalars_as_sums(node, self.symbol, self.denominators)
        if summed_up is not None:
            self.place(node, summed_up, False)
            return
        inputs = tensor_inputs(node)  # a number may have become a tensor
        if not forced:
            placed = [self.placement(value, node) for value in inputs]
            if constant_in_parts(node, placed, self.denominators) is not None:
                inputs = tensor_inputs(node)
                placed = [self.placement(value, node) for value in inputs]
            for new in mean_as_sum(node, inputs, placed, self.denominators):
                self.origin[new] = self.origin[node]
                self.call(new)
                note(node, replaced=True)
        if not noted(node, "replaced"):
            self.choose(node, inputs, forced)

    def index_of_batch(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """Handle ``arange(batch)``; check what a batch index is used for."""
        name = packet_name(node.target)
        if name == "arange" and quotient(size_of(node.meta["val"].shape[0]), self.symbol):
            whole = size_of(node.meta["val"].shape[0]) == self.symbol
            from_zero = len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0)
            if not (whole and from_zero):
                self.mix(node, "counts through the batch")
            self.place(node, S(0), False)
            note(node, batch_index=True)
            return True
        using = [value for value in inputs if noted(value, "batch_index")]
        if not using:
            return False
        if name in INDEX_KEEPING:
            self.choose(node, inputs, False)
            note(node, batch_index=True)
            return True
        if name != "index" or using[0] is node.args[0]:
            self.mix(node, "computes with the positions of samples in the batch")
        return False

    def choose(self, node: fx.Node, inputs: list[fx.Node], forced: bool) -> None:
        """Take the rule that needs the fewest conversions, and make them."""
        placed = [self.placement(value, node) for value in inputs]
        has_whole = any(map(self.costs.is_whole, inputs, placed))
        rules = candidates(node, None, self.symbol)
        if forced:
            rules = [rule for rule in rules if rule.name in ("replicate", "same")]
        gathers = forced or has_whole
        costs = [self.costs.of_rule(node, rule, inputs, placed, gathers) for rule in rules]
        best = min(range(len(rules)), key=costs.__getitem__)
        if costs[best] == IMPOSSIBLE:
            if forced:
                self.mix(node, "mixes samples of the batch")
            self.refuse(node, inputs, placed)
        rule = rules[best]
        self.convert(node, rule, inputs, placed)
        differentiable = noted(node, "differentiable")
        value = node.meta["val"]
        outputs = [V if differentiable and out == R else out for out in rule.outputs]
        texts = [str(out) for out in outputs]
        note(node, data=texts if isinstance(value, list | tuple) else texts[0])
        if self.costs.is_whole(node, outputs[0]):
            self.whole_sizes(node, inputs)

    def convert(
        self, node: fx.Node, rule: Rule, inputs: list[fx.Node], placed: list[Placement]
    ) -> None:
        communicates = False
        for value, source, target in zip(inputs, placed, rule.inputs, strict=True):
            if source in (R, V) and target == P:
                node.replace_input_with(value, self.part_of(value, node))
            elif source == P and target in (R, V):
                node.replace_input_with(value, self.denominators.total(value))
            elif source.is_shard != target.is_shard:
                communicates = True
        if communicates:
            self.mixed = True
            reason = self.gathered.get(self.origin[node], "uses a value of the whole batch")
            # Every rank goes on with the whole value, and with a part of its gradient: V, never R.
            wanted = [
                V if place == R and noted(value, "differentiable") else place
                for value, place in zip(inputs, rule.inputs, strict=True)
            ]
            note(node, data_inputs=[str(place) for place in wanted], remark=reason)

    def part_of(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """A value that every part has whole, divided by the number of parts."""
        part = self.denominators.divide(value, self.denominators.parts(), before)
        self.place(part, P, bool(noted(value, "differentiable")))
        self.origin[part] = value.name
        return part

    def whole_sizes(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Sizes given by the rank's share of the batch become those of the gathered input."""
        symbolic = [
            entry
            for entry in node.all_input_nodes
            if not is_tensor_valued(entry.meta.get("val"))
            and quotient(size_of(entry.meta["val"]), self.symbol) is not None
        ]
        for entry in symbolic:
            wanted = size_of(entry.meta["val"])
            for value in inputs:
                shape = shape_of(value.meta["val"])
                if wanted in shape:
                    with self.graph.inserting_before(node):
                        size = self.denominators.size(value, shape.index(wanted))
                    note(size, data_inputs=["V"], data="R", differentiable=False)
                    node.replace_input_with(entry, size)
                    break
            else:
                self.mix(node, "reshapes the gathered batch")

    # Refusals --------------------------------------------------------------------------------

    def refuse(self, node: fx.Node, inputs: list[fx.Node], placed: list[Placement]) -> None:
        """Gather in front of this operator, or of the sums over the batch that it cannot take."""
        sums = {
            self.origin[root]
            for value, place in zip(inputs, placed, strict=True)
            if place == P
            for root in self.summing(value)
        }
        remark = self.describe(node, "mixes samples of the batch")
        raise _MixesError(sums or {self.origin[node]}, remark)

    def summing(self, node: fx.Node) -> set[fx.Node]:
        """Where a partial sum comes from: the operators that made it from shards."""
        parts = [v for v in tensor_inputs(node) if self.placement(v, node) == P]
        if not parts:
            return {node}
        return set().union(*map(self.summing, parts))

    def check_sizes(self, node: fx.Node) -> None:
        """Refuse ``x[mask]`` and the like: no plan can be priced for them."""
        value = node.meta["val"]
        for tensor in value if isinstance(value, list | tuple) else [value]:
            for size in shape_of(tensor):
                if getattr(size, "free_symbols", set()) - {self.symbol}:
                    raise UnsupportedError(
                        self.describe(node, "makes a tensor whose size depends on the data")
                        + "; keep the size fixed: ignore_index of cross_entropy, torch.where, or "
                        "a multiplication by the mask and a division by its sum"
                    )

    def mix(self, node: fx.Node, what: str) -> None:
        raise UnsupportedError(
            self.describe(node, what) + "; change that line so that samples stay apart"
        )

    def describe(self, node: fx.Node, what: str) -> str:
        line = line_of_node(node)
        return f"{packet_name(node.target)} ({node.name}) {what}" + (f" at {line}" if line else "")

    # The loss --------------------------------------------------------------------------------

    def finish(self, output: fx.Node) -> None:
        loss = output.args[0]
        while isinstance(loss, list | tuple):
            loss = loss[0]
        assert isinstance(loss, fx.Node)
        place = self.placement(loss, output)
        if place.is_shard or shape_of(loss.meta["val"]) not in ((), (1,)):
            raise UnsupportedError(
                f"the loss must be one number, got shape {tuple(loss.meta['val'].shape)}; "
                "return its mean or its sum"
            )
        if place != P:
            output.replace_input_with(loss, self.part_of(loss, output))
        note(output, data="P", differentiable=bool(noted(loss, "differentiable")))


def _differentiable(node: fx.Node, inputs: list[fx.Node]) -> bool:
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    floating = any(getattr(v, "dtype", None) and v.dtype.is_floating_point for v in values)
    constant = packet_name(node.target).endswith("_like")
    cut = packet_name(node.target) == "detach" or constant
    return floating and not cut and any(noted(v, "differentiable") for v in inputs)
