"""capture_once: what :mod:`capture` does, with every repeated layer exported a few times only.

Export takes most of the time of planning a deep model, and repeats itself layer by layer. Here
alike submodules (:mod:`alike`) run for real twice and, for the last of them, once more; the other
calls are stand-ins (:mod:`stand_in`). In the captured graph the real ones are compared operator
by operator. Where they are equal, copies of them replace the stand-ins, with the stand-ins' own
inputs, parameters and names: the graph is the one that a full capture gives. Where they are not,
or a submodule does what a stand-in cannot do, the model is captured with more of it run for real,
in the end all of it.

What could make a submodule differ from its like and is looked for: settings, shapes, ties and
hooks before it runs; reading a number in which they differ (``layer_idx % 2``), attributes,
containers, closures, class attributes and globals that it changes, arguments that it writes to,
and values that enter or leave otherwise than as arguments and results. Not seen is state outside
of Python and of the model's own files, such as a counter kept by another package.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from galvatron_compile.errors import GalvatronError
from galvatron_compile.graph import Graph, LayeredGraph
from galvatron_compile.passes.alike import Group, alike_groups
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.cut import is_scalar, users_through_scalars
from galvatron_compile.passes.example import LossFunction
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.stand_in import REAL_CALLS, RESULT, Recorder
from galvatron_compile.printer import format_type, full_name, short_name
from galvatron_compile.torch_private import size_expression

aten = torch.ops.aten

_LEAST_MEMBERS = REAL_CALLS + 2  # the last one is real too
_LARGEST_CONSTANT = 4096  # elements that are compared by value


def understand_once(
    model: nn.Module, example_inputs: Any, loss_fn: LossFunction | None = None
) -> LayeredGraph:
    """``find_layers(batch(capture(…)))`` in a time that hardly depends on the number of layers."""
    return find_layers(batch(capture_once(model, example_inputs, loss_fn)))


def capture_once(
    model: nn.Module, example_inputs: Any, loss_fn: LossFunction | None = None
) -> Graph:
    """The graph that :func:`capture` gives, up to the names of nodes; the same errors too."""
    groups = alike_groups(model, _LEAST_MEMBERS)
    while groups:
        recorder = Recorder(groups)
        try:
            with recorder:
                graph = capture(model, example_inputs, loss_fn)
        except GalvatronError:
            if not recorder.unlike:
                break  # the full capture says why
            groups = [group for group in groups if group not in recorder.unlike]
            continue
        members = _members(graph, recorder)
        unlike = (recorder.unlike & recorder.replaced) | _unlike(graph, recorder, members)
        if not unlike:
            return _Expansion(graph, recorder, members).run()
        groups = [group for group in groups if group not in unlike | recorder.unlike]
    return capture(model, example_inputs, loss_fn)


# --- verification -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Member:
    """One call that ran: its node :data:`RESULT`, and the nodes that compute it, in order.

    body: None if values enter or leave otherwise than as arguments and results.
    """

    result: fx.Node
    body: tuple[fx.Node, ...] | None


def _given(result: fx.Node) -> list[fx.Node]:
    """Inputs, then parameters and buffers."""
    return [*result.args[1], *result.args[2]]  # type: ignore[misc]


def _outputs(result: fx.Node) -> list[fx.Node]:
    return list(result.args[3])  # type: ignore[arg-type]


def _members(graph: Graph, recorder: Recorder) -> dict[int, _Member]:
    """The calls that ran, by number."""
    ran = {number for kind in recorder.calls for number in kind.real}
    nodes = list(graph.module.graph.nodes)
    found = [node for node in nodes if node.target is RESULT and node.args[0] in ran]
    owners = {_stack(node): node for node in found}
    lengths = sorted({len(stack) for stack in owners})
    inside: dict[fx.Node, list[fx.Node]] = {node: [] for node in found}
    for node in nodes:
        stack = _stack(node)
        for length in lengths:
            if length <= len(stack) and (owner := owners.get(stack[:length])) is not None:
                inside[owner].append(node)
    return {node.args[0]: _Member(node, _body(graph, node, inside[node])) for node in found}


def _stack(node: fx.Node) -> tuple[Any, ...]:
    """The calls of modules that the node was computed in, outermost first."""
    if node.target is aten.detach.default and node.users:
        node = next(iter(node.users))  # the normaliser gives it the place of what is detached
    return tuple(node.meta.get("nn_module_stack", {}).items())


def _body(graph: Graph, result: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, ...] | None:
    """The nodes from what the call was given to its outputs, if nothing else goes in or out.

    Sizes are left out: they belong to the batch, not to a layer.
    """
    given, outputs, markers = set(_given(result)), set(_outputs(result)), {result, *result.users}
    body = [n for n in inside if n not in markers and n not in given and not is_scalar(n)]
    held = set(body)
    known = held | given | _constants(graph)
    for node in body:
        sources = [s for s in node.all_input_nodes if not (is_scalar(s) and _is_size(s))]
        leaving = users_through_scalars(node) - held - ({result} if node in outputs else set())
        if node.target is RESULT or leaving or not known.issuperset(sources):
            return None
    return tuple(body) if outputs <= held | given else None


def _constants(graph: Graph) -> set[fx.Node]:
    """Tensors written down in the code: neither parameters nor registered buffers."""
    return {
        node
        for node in graph.module.graph.find_nodes(op="get_attr")
        if node.target not in graph.parameters
        and str(node.target).rpartition(".")[2].startswith("lifted_tensor")
    }


def _is_size(node: fx.Node) -> bool:
    """A number computed from sizes alone, not from the contents of a tensor."""
    if node.target is aten.sym_size.int:
        return True
    return bool(node.all_input_nodes) and all(
        is_scalar(source) and _is_size(source) for source in node.all_input_nodes
    )


def _unlike(graph: Graph, recorder: Recorder, members: dict[int, _Member]) -> set[Group]:
    """Groups with stand-ins whose real calls did not all compute the same."""
    unlike: set[Group] = set()
    for kind in dict.fromkeys(recorder.calls):
        if kind.group in recorder.replaced:
            spelled = {_spelled(graph, members[n]) for n in kind.real if n in members}
            if len(spelled) > 1 or None in spelled:
                unlike.add(kind.group)
    return unlike


def _spelled(graph: Graph, member: _Member) -> str | None:
    """The call's operators, constants, connections, shapes and notes; no names."""
    if member.body is None:
        return None
    number: dict[fx.Node, str] = {}
    for at, node in enumerate((*_given(member.result), *member.body)):
        number.setdefault(node, f"%{at}")

    def spell(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            if argument in number:
                return number[argument]
            if argument.op == "get_attr":
                return _contents(graph.buffers[str(argument.target)])
            return f"size {size_expression(argument.meta['val'])}"
        if isinstance(argument, (tuple, list)):
            return "[" + ",".join(map(spell, argument)) + "]"
        if isinstance(argument, dict):
            return "{" + ",".join(f"{k}:{spell(v)}" for k, v in sorted(argument.items())) + "}"
        return repr(argument)

    lines = [
        f"{full_name(node.target)} {spell(node.args)} {spell(dict(node.kwargs))} "
        f"{format_type(node.meta['val'])} {node.meta.get('custom')}"
        for node in member.body
    ]
    return "\n".join([*lines, spell(_outputs(member.result))])


def _contents(value: torch.Tensor) -> str:
    if value.is_meta or value.numel() > _LARGEST_CONSTANT:
        return f"{format_type(value)} at {id(value)}"
    return f"{format_type(value)} {value.tolist()}"


# --- expansion ----------------------------------------------------------------------------------


class _Expansion:
    """Writes the graph again, with a copy of a call that ran in the place of every stand-in."""

    def __init__(self, graph: Graph, recorder: Recorder, members: dict[int, _Member]) -> None:
        self.graph = graph
        self.kinds = recorder.calls
        self.members = members
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.results: dict[fx.Node, list[fx.Node]] = {}

    def run(self) -> Graph:
        for node in self.graph.module.graph.nodes:
            if node.target is RESULT:
                self.results[node] = list(self.outputs(node))
            elif node.target is operator.getitem and node.args[0] in self.results:
                self.env[node] = self.results[node.args[0]][node.args[1]]
            else:
                self.env[node] = self.copy(node, self.env)
        return self.finish()

    def outputs(self, result: fx.Node) -> Iterator[fx.Node]:
        """The new nodes of a call's outputs."""
        number: Any = result.args[0]
        real = self.kinds[number].real
        if number in real:
            yield from (self.env[node] for node in _outputs(result))
            return
        member = self.members[real[REAL_CALLS - 1]]  # in front of every stand-in
        assert member.body is not None
        given = zip(_given(member.result), _given(result), strict=True)
        env = {theirs: self.env[ours] for theirs, ours in given}
        for node in member.body:
            env[node] = self.copy(node, env)
            if node.target is not aten.detach.default:
                env[node].meta["nn_module_stack"] = _moved(node, member.result, result)
        yield from (env[node] for node in _outputs(member.result))

    def copy(self, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        """``node`` with the inputs that ``env`` says, or the same ones for want of others."""
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: env[n] if n in env else self.env[n]
        )
        name = short_name(node.target) if node.op == "call_function" else node.name
        new = self.new.create_node(node.op, node.target, args, kwargs, name)
        new.meta = dict(node.meta)
        if "custom" in new.meta:
            new.meta["custom"] = {key: dict(facts) for key, facts in new.meta["custom"].items()}
        if node.target is aten.detach.default:
            _place_as(new, new.all_input_nodes[0])
        return new

    def finish(self) -> Graph:
        self.new.eliminate_dead_code()
        for node in self.new.find_nodes(op="get_attr"):
            if not node.users:
                self.new.erase_node(node)
        self.new.lint()
        tensors = {**self.graph.parameters, **self.graph.buffers}
        used = {str(node.target) for node in self.new.find_nodes(op="get_attr")}
        return dataclasses.replace(
            self.graph,
            module=fx.GraphModule({n: t for n, t in tensors.items() if n in used}, self.new),
            parameters={n: p for n, p in self.graph.parameters.items() if n in used},
            buffers={n: b for n, b in self.graph.buffers.items() if n in used},
            tied={alias: n for alias, n in self.graph.tied.items() if n in used},
        )


def _place_as(new: fx.Node, source: fx.Node) -> None:
    """The normaliser says that ``detach`` was called where its input was computed."""
    for key in ("nn_module_stack", "stack_trace"):
        new.meta.pop(key, None)
        if key in source.meta:
            new.meta[key] = source.meta[key]


def _moved(node: fx.Node, source: fx.Node, target: fx.Node) -> dict[str, tuple[str, Any]]:
    """The calls of modules around ``node`` when it is computed in the call of ``target``."""
    outer = target.meta["nn_module_stack"]
    depth = len(source.meta["nn_module_stack"])
    (*_, (old, _)), (*_, (new, _)) = source.meta["nn_module_stack"].values(), outer.values()
    inner = list(node.meta["nn_module_stack"].items())[depth:]
    moved = [(new + path.removeprefix(old), kind) for _, (path, kind) in inner]
    keys = [f"{list(outer)[-1]}{path.removeprefix(new)}" for path, _ in moved]
    return {**outer, **dict(zip(keys, moved, strict=True))}
