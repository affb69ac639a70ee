"""From an ``nn.Module`` and an example batch to a :class:`Graph`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from galvatron_compile.errors import CaptureError, GalvatronError, UnsupportedError
from galvatron_compile.graph import Graph, InputSpec
from galvatron_compile.passes import blame
from galvatron_compile.passes.normalise import Normaliser
from galvatron_compile.torch_private import (
    flatten_tree,
    size_expression,
    tree_paths,
    unflatten_tree,
)

LossFunction = Callable[[Any, Any], torch.Tensor]

_MODEL = "model"  # the model's attribute in the wrapper that is exported


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
    example = _Example.of(model, example_inputs)
    wrapper = _LossModule(model, loss_fn, example)
    program = _export(wrapper, example)
    _refuse_running_statistics(program)
    symbol = _batch_symbol(program, wrapper, example)
    return _assemble(model, program, example, symbol)


def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """``(args, kwargs, constants)`` of a batch; constants are the entries without a tensor."""
    if not isinstance(batch, Mapping):
        return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}, {}
    kwargs, constants = {}, {}
    for key, value in batch.items():
        held = any(isinstance(leaf, torch.Tensor) for leaf in flatten_tree(value)[0])
        (kwargs if held else constants)[str(key)] = value
    return (), kwargs, constants


@dataclass(frozen=True)
class _Example:
    """The example batch, flat. ``tree`` puts ``tensors`` back into (args, kwargs)."""

    tree: Any
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    batch_size: int
    constants: dict[str, Any]
    container: Literal["mapping", "sequence", "tensor"]

    @staticmethod
    def of(model: nn.Module, example_inputs: Any) -> _Example:
        args, kwargs, constants = _as_call(example_inputs)
        leaves, tree = flatten_tree((args, kwargs))
        paths = tree_paths((args, kwargs))
        names = _names(model, paths)
        for leaf, name in zip(leaves, names, strict=True):
            if not isinstance(leaf, torch.Tensor):
                raise CaptureError(
                    f"example_inputs: {name} is a {type(leaf).__name__} among tensors; pass it as "
                    "an entry of its own in a dict batch, or make it the default of forward"
                )
        batched = [leaf for leaf in leaves if leaf.dim() > 0]
        if not batched:
            raise CaptureError(
                "example_inputs hold no tensor with a batch dimension; give one batch as the "
                "model takes it: a tuple of positional or a dict of keyword arguments"
            )
        size = batched[0].shape[0]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        tensors: list[torch.Tensor] = []
        dims: list[int | None] = []
        for leaf in leaves:
            dims.append(0 if leaf.dim() > 0 and leaf.shape[0] == size else None)
            # A batch of one would be baked into the graph; equal tensors would become one input.
            repeat = size == 1 and dims[-1] == 0
            moved = leaf.detach().to(device)
            tensors.append(torch.cat([moved, moved]) if repeat else moved.clone())
        container: Literal["mapping", "sequence", "tensor"] = "tensor"
        if not isinstance(example_inputs, torch.Tensor):
            container = "mapping" if isinstance(example_inputs, Mapping) else "sequence"
        return _Example(
            tree, tuple(tensors), names, tuple(dims), max(size, 2), constants, container
        )


def _names(model: nn.Module, paths: list[tuple[object, ...]]) -> tuple[str, ...]:
    """A readable, unique identifier per leaf: its key, or the name of forward's parameter."""
    positional = [name for name, _ in _positional(model)]
    names: list[str] = []
    for part, first, *rest in paths:
        if part == 0 and isinstance(first, int):
            first = positional[first] if first < len(positional) else f"batch_{first}"
        name = re.sub(r"\W", "_", "_".join(str(step) for step in (first, *rest)))
        name = name if re.match(r"[A-Za-z]", name) else f"batch_{name}"
        while name in names:
            name += "_"
        names.append(name)
    return tuple(names)


def _positional(model: nn.Module) -> list[tuple[str, inspect.Parameter]]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        (name, p) for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in kinds
    ]  # fmt: skip


class _LossModule(nn.Module):
    """What is exported: from the batch's tensors to the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None, example: _Example) -> None:
        super().__init__()
        if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
            raise UnsupportedError(
                "loss_fn has parameters of its own; make it a part of the model so that they are "
                "trained, and return the loss from the model"
            )
        setattr(self, _MODEL, model)
        self.training = model.training
        # In a tuple, so that a loss module does not become a submodule with names of its own.
        self._loss = (loss_fn,)
        self._example = example
        self.watch: Callable[[torch.Tensor], blame.BatchWatch] | None = None

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        batched = [t for t, dim in zip(tensors, self._example.batch_dims, strict=True) if dim == 0]
        for other in batched[1:]:  # one symbol for all of them
            torch._check(other.shape[0] == batched[0].shape[0])
        if self.watch is None:
            return self.loss(tensors)
        with self.watch(batched[0]):
            return self.loss(tensors)

    def loss(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        args, kwargs = unflatten_tree(tensors, self._example.tree)
        kwargs = {**kwargs, **self._example.constants}
        model: nn.Module = getattr(self, _MODEL)
        (loss_fn,) = self._loss
        taken_args, taken_kwargs = _accepted(model, args, kwargs, loss_fn is not None)
        outputs = model(*taken_args, **taken_kwargs)
        if loss_fn is None:
            return _scalar(_loss_of(outputs), "the model's loss")
        batch = {"mapping": kwargs, "sequence": args, "tensor": args[0] if args else None}
        return _scalar(loss_fn(outputs, batch[self._example.container]), "the result of loss_fn")


def _accepted(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], has_loss_fn: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The part of a batch that the model's forward takes; the rest is for loss_fn alone."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    taken = dict(kwargs)
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        taken = {key: value for key, value in kwargs.items() if key in parameters}
    count = len(args)
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        count = min(count, len(_positional(model)))
    left = [*(f"number {at}" for at in range(count, len(args))), *(kwargs.keys() - taken.keys())]
    if left and not has_loss_fn:
        raise CaptureError(
            f"{type(model).__name__}.forward does not take batch entry {left[0]}; "
            "remove it from example_inputs, or give a loss_fn(outputs, batch) that uses it"
        )
    return args[:count], taken


def _loss_of(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        return outputs["loss"]
    if not isinstance(outputs, (Mapping, tuple, list)) and hasattr(outputs, "loss"):
        if outputs.loss is not None:
            return outputs.loss
    elif isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], torch.Tensor):
        return outputs[0]
    raise CaptureError(
        f"the model returned {type(outputs).__name__} without a loss; "
        "put the labels into example_inputs, or give loss_fn(outputs, batch)"
    )


def _scalar(loss: Any, what: str) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"{what} is a {type(loss).__name__}, not a tensor")
    if loss.dim() != 0 or not loss.dtype.is_floating_point:
        raise CaptureError(
            f"{what} has shape {list(loss.shape)} and type {loss.dtype}, but must be one floating "
            "point number; reduce it, or give loss_fn(outputs, batch)"
        )
    return loss


def _export(wrapper: _LossModule, example: _Example) -> ExportedProgram:
    dims = tuple({0: Dim.AUTO} if dim == 0 else None for dim in example.batch_dims)
    try:
        with torch.enable_grad():
            return export(wrapper, example.tensors, dynamic_shapes=(dims,), strict=False)
    except GalvatronError:
        raise
    except Exception as error:  # whatever the model or the exporter raises is a failed capture
        line = blame.line_of_exception(error) or "an unknown line of the model"
        raise CaptureError(
            f"{line}: the model cannot be captured\n{blame.cause_in_two_lines(error)}"
        ) from error


def _batch_symbol(program: ExportedProgram, wrapper: _LossModule, example: _Example) -> Any:
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
        "replace the constant in this line by the batch's own size, for example x.shape[0]"
    )


def _line_that_fixes(wrapper: _LossModule, example: _Example) -> str | None:
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
                name = str(targets.get(running.name, running.name)).removeprefix(f"{_MODEL}.")
                raise UnsupportedError(
                    f"{blame.where(node)}: buffer {name!r} is updated in forward, which no plan "
                    "supports yet; put that module in eval mode, build it with "
                    "track_running_stats=False, or use LayerNorm or GroupNorm"
                )


def _assemble(model: nn.Module, program: ExportedProgram, example: _Example, symbol: Any) -> Graph:
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
    normaliser = Normaliser(graph, _MODEL)
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
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                continue
            target = str(spec.target).removeprefix(f"{_MODEL}.")
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
    model: nn.Module, graph: fx.Graph, sources: _Sources, example: _Example, symbol: Any
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
