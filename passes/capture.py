"""From an ``nn.Module`` and an example batch to a :class:`Graph`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from galvatron_compile.errors import CaptureError, GalvatronError, UnsupportedError
from galvatron_compile.graph import Graph, InputSpec
from galvatron_compile.passes import blame
from galvatron_compile.passes.example import MODEL, Example, LossFunction, LossModule
from galvatron_compile.passes.normalise import Normaliser
from galvatron_compile.torch_private import export_without_printing, size_expression

_UNKNOWN = "an unknown line of the model or of loss_fn(outputs, batch)"


def capture(model: nn.Module, example_inputs: Any, loss_fn: LossFunction | None = None) -> Graph:
    """The training graph of ``model``, from the batch's tensors to the scalar loss.

    example_inputs: a tuple (positional arguments) or a mapping (keyword arguments) of tensors,
        possibly nested; dim 0 of the first tensor is the batch size, and every tensor with that
        leading size is batched. The model is traced in its present mode (train or eval).
    loss_fn: ``loss_fn(outputs, batch)``; without it the model returns its loss (``.loss``, an
        entry "loss", a first element that is a scalar, or a scalar).

    Parameters keep their names and stay the very tensors of ``model``. Raises CaptureError if the
    model cannot be traced with a free batch size, UnsupportedError if it does what no plan can run.
    """
    example = Example.of(model, example_inputs)
    wrapper = LossModule(model, loss_fn, example)
    program = _export(wrapper, example)
    _refuse_running_statistics(program)
    symbol = _batch_symbol(program, wrapper, example)
    return _assemble(model, program, example, symbol)


def _export(wrapper: LossModule, example: Example) -> ExportedProgram:
    dims = tuple({0: Dim.AUTO} if dim == 0 else None for dim in example.batch_dims)
    try:
        with torch.enable_grad(), export_without_printing():
            return export(wrapper, example.tensors, dynamic_shapes=(dims,), strict=False)
    except GalvatronError:
        raise
    except Exception as error:  # whatever the model or the exporter raises is a failed capture
        line = blame.line_of_exception(error) or _UNKNOWN
        raise CaptureError(
            f"{line}: the model cannot be captured\n{blame.cause_in_two_lines(error)}"
        ) from error


def _batch_symbol(program: ExportedProgram, wrapper: LossModule, example: Example) -> Any:
    """The symbol of the batch size; CaptureError if the model allows some batch sizes only."""
    values = _user_values(program)
    batched = [v for v, dim in zip(values, example.batch_dims, strict=True) if dim == 0]
    size = size_expression(batched[0].shape[0])
    restriction = blame.first_restriction(batched[0])
    if restriction is None and getattr(size, "is_Symbol", False):
        return size
    line = restriction[1] if restriction else None
    if line is None:
        line = _line_that_fixes(wrapper, example)
    reason = f"it works only where {restriction[0]}" if restriction else f"it fixes it to {size}"
    raise CaptureError(
        f"{line or 'a line of the model'}: the batch size must be free, but {reason}\n"
        "replace the constant in this line by the batch's own size, for example x.shape[0]; or "
        "use an example batch of another size, if an input without a batch dimension only happens "
        "to be as long as the batch"
    )


def _line_that_fixes(wrapper: LossModule, example: Example) -> str | None:
    """Trace again and watch after which operator the batch size is no longer free."""

    watches: list[blame.BatchWatch] = []  # export undoes what forward writes to the wrapper

    def watch(batch: torch.Tensor) -> blame.BatchWatch:
        def is_free() -> bool:
            size = size_expression(batch.shape[0])
            return getattr(size, "is_Symbol", False) and blame.first_restriction(batch) is None

        watches.append(blame.BatchWatch(is_free))
        return watches[-1]

    wrapper.watch = watch
    _export(wrapper, example)
    wrapper.watch = None
    return next((found.line for found in watches if found.line is not None), None)


def _user_values(program: ExportedProgram) -> list[torch.Tensor]:
    wanted = [
        spec.arg.name for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]  # fmt: skip
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    return [nodes[name].meta["val"] for name in wanted]


def _refuse_running_statistics(program: ExportedProgram) -> None:
    aten = torch.ops.aten
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.target in (aten.batch_norm.default, aten.instance_norm.default):
            running, updates = node.args[3], node.args[5]
            if running is not None and updates:
                name = str(targets.get(running.name, running.name)).removeprefix(f"{MODEL}.")
                raise UnsupportedError(
                    f"{blame.where(node)}: buffer {name!r} is updated in forward, which no plan "
                    "supports yet; put that module in eval mode, build it with "
                    "track_running_stats=False, or use LayerNorm or GroupNorm"
                )


def _assemble(model: nn.Module, program: ExportedProgram, example: Example, symbol: Any) -> Graph:
    """Normalise the exported program and give its inputs their names back."""
    graph = fx.Graph()
    sources = _Sources.of(model, program)
    env: dict[fx.Node, Any] = {}
    specs = program.graph_signature.input_specs
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    names = iter(example.names)
    for place, spec in zip(places, specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            env[place] = graph.placeholder(next(names))
            env[place].target = env[place].name
            env[place].meta["val"] = place.meta["val"]
    normaliser = Normaliser(graph, MODEL)
    held: dict[str, fx.Node] = {}
    for place, spec in zip(places, specs, strict=True):
        if spec.kind is not InputKind.USER_INPUT:
            name = sources.names[place.name]
            if name not in held:
                held[name] = graph.get_attr(name)
                held[name].meta["val"] = place.meta["val"]
            env[place] = held[name]
            if getattr(sources.tensors[name], "requires_grad", False):
                normaliser.differentiable.add(held[name])
    protected = {p: sources.kinds[p.name] for p in places if p.name in sources.kinds}
    (loss,) = normaliser.run(program.graph_module, env, protected)
    graph.output(loss).meta["val"] = loss.meta["val"]
    return _finish(model, graph, sources, example, symbol)


@dataclass(frozen=True)
class _Sources:
    """Where the exported graph's tensors live in the model. Keys are placeholder names."""

    names: dict[str, str]
    kinds: dict[str, str]
    tensors: dict[str, torch.Tensor]
    tied: dict[str, str]

    @staticmethod
    def of(model: nn.Module, program: ExportedProgram) -> _Sources:
        first = {id(p): name for name, p in model.named_parameters()}
        every = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        names: dict[str, str] = {}
        kinds: dict[str, str] = {}
        tensors: dict[str, torch.Tensor] = {}
        kept: str
        tensor: torch.Tensor
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                continue
            target = str(spec.target).removeprefix(f"{MODEL}.")
            if spec.kind is InputKind.PARAMETER:
                kept, tensor = first[id(every[target])], every[target]
            elif spec.kind is InputKind.BUFFER:
                kept, tensor = target, buffers[target]
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                kept, tensor = target, program.constants[str(spec.target)]
            else:
                raise UnsupportedError(f"the model holds {target}, which is not a tensor")
            names[spec.arg.name], tensors[kept] = kept, tensor
            kinds[spec.arg.name] = f"{spec.kind.name.lower().replace('_', ' ')} {kept!r}"
        tied = {name: first[id(p)] for name, p in every.items() if first[id(p)] != name}
        return _Sources(names, kinds, tensors, tied)


def _finish(
    model: nn.Module, graph: fx.Graph, sources: _Sources, example: Example, symbol: Any
) -> Graph:
    graph.eliminate_dead_code()
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    used = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    module = fx.GraphModule({name: sources.tensors[name] for name in used}, graph)
    module.graph.lint()
    parameters = dict(model.named_parameters())
    placeholders = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    inputs = InputSpec(
        tree=example.tree,
        names=placeholders,
        batch_dims=example.batch_dims,
        shapes=tuple(tuple(t.shape) for t in example.tensors),
        dtypes=tuple(t.dtype for t in example.tensors),
        constants=tuple(example.constants.items()),
    )
    return Graph(
        module=module,
        inputs=inputs,
        parameters={name: p for name, p in parameters.items() if name in used},
        buffers={name: sources.tensors[name] for name in used if name not in parameters},
        tied={alias: name for alias, name in sources.tied.items() if name in used},
        batch_symbol=symbol,
        example_batch_size=example.batch_size,
    )
