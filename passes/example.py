"""The example batch, and the module from a batch's tensors to the loss that is exported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from galvatron_compile.errors import CaptureError, UnsupportedError
from galvatron_compile.passes.blame import BatchWatch
from galvatron_compile.torch_private import flatten_tree, tree_paths, unflatten_tree

LossFunction = Callable[[Any, Any], torch.Tensor]

MODEL = "model"  # the model's attribute in the wrapper that is exported


@dataclass(frozen=True)
class Example:
    """The example batch, flat. ``tree`` puts ``tensors`` back into (args, kwargs)."""

    tree: Any
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    batch_size: int
    constants: dict[str, Any]
    container: Literal["mapping", "sequence", "tensor"]

    @staticmethod
    def of(model: nn.Module, example_inputs: Any) -> Example:
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
        return Example(
            tree, tuple(tensors), names, tuple(dims), size, constants, container
        )


def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """``(args, kwargs, constants)`` of a batch; constants are the entries without a tensor."""
    if not isinstance(batch, Mapping):
        return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}, {}
    kwargs: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for key, value in batch.items():
        held = any(isinstance(leaf, torch.Tensor) for leaf in flatten_tree(value)[0])
        (kwargs if held else constants)[str(key)] = value
    return (), kwargs, constants


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


class LossModule(nn.Module):
    """What is exported: from the batch's tensors to the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None, example: Example) -> None:
        super().__init__()
        if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
            raise UnsupportedError(
                "loss_fn has parameters of its own; make it a part of the model so that they are "
                "trained, and return the loss from the model"
            )
        setattr(self, MODEL, model)
        self.training = model.training
        # In a tuple, so that a loss module does not become a submodule with names of its own.
        self._loss = (loss_fn,)
        self._example = example
        self.watch: Callable[[torch.Tensor], BatchWatch] | None = None

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
        model: nn.Module = getattr(self, MODEL)
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
