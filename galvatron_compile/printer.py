"""Graphs and layers as text that a person can read: one node, or one range of layers, a line."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from galvatron_compile.torch_private import size_expression

if TYPE_CHECKING:
    from galvatron_compile.graph import Layer, LayeredGraph

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_KEY = "galvatron"
_COST = "cost"  # depends on the cluster, not on the model
_LARGE = 2**62  # stands for "to the end" in slices


def format_graph(module: fx.GraphModule) -> str:
    """The program of ``module``: inputs and tensors with their types, then one node a line.

    Types are like ``f32[b, 16, 64]``, where b is the batch size. Behind ``#`` stand the facts
    that passes noted (placements, layer).
    """
    nodes = list(module.graph.nodes)
    symbol = batch_symbol_of(nodes)
    rows: list[tuple[str, str, str]] = []
    for node in nodes:
        kind = format_type(node.meta.get("val"), symbol)
        if node.op == "placeholder":
            kind = kind if isinstance(node.meta.get("val"), torch.Tensor) else "int"
            rows.append((f"input {node.name}", kind, _notes(node)))
        elif node.op == "get_attr":
            rows.append((f"tensor {node.target}", kind, _notes(node)))
        elif node.op == "output":
            rows.append((f"return {_argument(node.args[0])}", "", ""))
        elif _part(node) is not None:
            continue  # shown where it is used
        elif isinstance(node.meta.get("val"), (int, torch.SymInt)):
            rows.append((f"{node.name} = {_call(node)}", kind, ""))
        else:
            rows.append((f"{node.name} = {_call(node)}", kind, _notes(node)))
    width = min(max(len(left) for left, _, _ in rows), 72)
    kinds = min(max(len(kind) for _, kind, _ in rows), 40)
    return "\n".join(
        f"{left:{width}}  {kind:{kinds}}  {facts}".rstrip() for left, kind, facts in rows
    )


def batch_symbol_of(nodes: Sequence[fx.Node]) -> Any:
    """The first symbol among the sizes of the graph's inputs, None if all sizes are fixed."""
    for node in nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            for size in value.shape:
                symbols = getattr(size_expression(size), "free_symbols", ())
                if symbols:
                    return min(symbols, key=str)
    return None


def format_type(value: Any, symbol: Any = None) -> str:
    """``f32[b, 16]`` for a tensor, the expression for a number, a tuple for several."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, symbol) for size in value.shape)
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(format_type(item, symbol) for item in value) + ")"
    return "" if value is None else _size(value, symbol)


def _size(size: Any, symbol: Any) -> str:
    expression = size_expression(size)
    if symbol is not None and isinstance(expression, sympy.Basic):
        expression = expression.subs(symbol, sympy.Symbol("b"))
    return str(expression)


def _call(node: fx.Node) -> str:
    keywords = (f"{key}={_argument(value)}" for key, value in node.kwargs.items())
    return f"{short_name(node.target)}({', '.join([*_arguments(node.args), *keywords])})"


def _part(node: object) -> tuple[fx.Node, int] | None:
    """``(call, index)`` of one output of a module call, written ``layers_0[1]`` where used."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    call, index = node.args
    if isinstance(call, fx.Node) and call.op == "call_module" and isinstance(index, int):
        return call, index
    return None


def _arguments(values: Sequence[Any]) -> list[str]:
    """Neighbouring parts of one module call stand as one range, ``units_1[0:9]``."""
    texts: list[str] = []
    run: list[tuple[fx.Node, int]] = []
    for value in [*values, None]:
        part = _part(value)
        if run and part is not None and part == (run[0][0], run[-1][1] + 1):
            run.append(part)
            continue
        if run:
            (call, first), (_, last) = run[0], run[-1]
            place = f"{first}" if len(run) == 1 else f"{first}:{last + 1}"
            texts.append(f"{call.name}[{place}]")
            run = []
        if part is not None:
            run = [part]
        else:
            texts.append(_argument(value))
    return texts[:-1]  # the closing None


def short_name(target: Any) -> str:
    """``linear`` for ``torch.ops.aten.linear.default``; a function's own name."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def full_name(target: Any) -> str:
    """A name that is the same in every process, which ``str`` of a function is not."""
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_arguments(value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, torch.dtype):
        return _SHORT.get(value, str(value))
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > _LARGE:
        return "end"
    return repr(value)


def _notes(node: fx.Node) -> str:
    facts: dict[str, Any] = dict(node.meta.get("custom", {}).get(_KEY, {}))
    words = ["no gradient"] if facts.pop("differentiable", True) is False else []
    words += [f"{key} {value}" for key, value in facts.items() if value is not None]
    return "# " + ", ".join(words) if words else ""


# --- layers -------------------------------------------------------------------------------------


def format_layers(layered: LayeredGraph) -> str:
    """A table of layers: name, class, parameter elements, inputs → outputs.

    Neighbours of one class are one line; its inputs and outputs are those of the first of them.
    """
    nodes = {node.name: node for node in layered.graph.module.graph.nodes}
    symbol = layered.graph.batch_symbol
    rows = [("layers", "class", "parameters", "inputs → outputs")]
    for run in _runs(layered.layers):
        first = run[0]
        name = first.name if len(run) == 1 else f"{first.name} … {run[-1].name} ({len(run)})"
        count = sum(layered.graph.parameters[p].numel() for p in first.parameters)
        each = " each" if len(run) > 1 else ""
        sides = [
            ", ".join(f"{value} {format_type(nodes[value].meta['val'], symbol)}" for value in names)
            for names in (first.inputs, first.outputs)
        ]
        rows.append((name, str(first.class_index), f"{count:,}{each}", " → ".join(sides)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )


def _runs(layers: Sequence[Layer]) -> list[list[Layer]]:
    runs: list[list[Layer]] = []
    for layer in layers:
        if not runs or runs[-1][-1].class_index != layer.class_index:
            runs.append([])
        runs[-1].append(layer)
    return runs


def fingerprint(layered: LayeredGraph) -> str:
    """Twelve hex digits that depend on the layers' structure and order, and on no name.

    Two models with the same fingerprint can run each other's plans.
    """
    keys = [
        structural_key(c.graph.graph, c.kinds, layered.graph.batch_symbol) for c in layered.classes
    ]
    text = "\n".join([*keys, *_wiring(layered)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _wiring(layered: LayeredGraph) -> list[str]:
    """Per layer: its class, and numbers for the values and parameters it is connected to."""
    numbers: dict[tuple[str, str], int] = {}

    def number(kind: str, names: Sequence[str]) -> list[int]:
        return [numbers.setdefault((kind, name), len(numbers)) for name in names]

    return [
        f"{layer.class_index} {number('value', layer.inputs)} {number('value', layer.outputs)} "
        f"{number('parameter', layer.parameters)}"
        for layer in layered.layers
    ]


def structural_key(graph: fx.Graph, kinds: Sequence[str], symbol: Any) -> str:
    """A hash of operators, constants, connections, shapes, dtypes and notes; of no names."""
    number = {node: at for at, node in enumerate(graph.nodes)}

    def spelled(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return f"%{number[argument]}"
        if isinstance(argument, (tuple, list)):
            return "[" + ",".join(map(spelled, argument)) + "]"
        if isinstance(argument, dict):
            return "{" + ",".join(f"{k}:{spelled(v)}" for k, v in sorted(argument.items())) + "}"
        if isinstance(argument, torch.device):  # ranks have different ones, a laptop has none
            return "device"
        return repr(argument)

    lines = [",".join(kinds)]
    for node in graph.nodes:
        noted = node.meta.get("custom", {}).get(_KEY, {})
        facts = sorted((k, str(v)) for k, v in noted.items() if k != _COST)
        call = ""
        if node.op != "placeholder":
            call = f"{full_name(node.target)} {spelled(node.args)} {spelled(dict(node.kwargs))}"
        lines.append(f"{node.op} {call} {format_type(node.meta['val'], symbol)} {facts}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
