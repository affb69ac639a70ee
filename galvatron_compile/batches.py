"""From what a user passes to ``step`` to the tensors of each micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from galvatron_compile.errors import ShapeError
from galvatron_compile.graph import InputSpec
from galvatron_compile.precision import Precision


def flatten_batch(batch: Any, inputs: InputSpec) -> list[torch.Tensor]:
    """The leaves of ``batch`` in the order of ``inputs``.

    A dict is keyword arguments (in any order), a tuple or list positional ones, a tensor the only
    argument. Raises ShapeError where the structure is not that of the example inputs.
    """
    template = pytree.tree_unflatten(list(range(len(inputs.names))), inputs.tree)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = _without_constants(batch, inputs)
    elif template[1] and not template[0]:
        names = sorted(map(str, template[1]))
        raise ShapeError(
            f"batch: expected a dict with the entries {names} of the example inputs, got "
            f"{type(batch).__name__}"
        )
    else:
        args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    found: dict[int, torch.Tensor] = {}
    _match(tuple(template[0]), args, "batch", found)
    _match(dict(template[1]), kwargs, "batch", found)
    return [found[index] for index in range(len(inputs.names))]


def _without_constants(batch: Mapping[str, Any], inputs: InputSpec) -> dict[str, Any]:
    """The entries that vary; ShapeError if one that was captured as a constant has changed."""
    for name, value in inputs.constants:
        if name in batch and batch[name] != value:
            raise ShapeError(
                f"batch[{name!r}] is {batch[name]!r}, but the model was captured with {value!r}; "
                "capture it again with the new value"
            )
    fixed = {name for name, _ in inputs.constants}
    return {name: value for name, value in batch.items() if name not in fixed}


def _match(template: Any, value: Any, path: str, found: dict[int, torch.Tensor]) -> None:
    if type(template) is int:
        if not isinstance(value, torch.Tensor):
            raise ShapeError(f"{path}: expected a tensor, got {type(value).__name__}")
        found[template] = value
    elif isinstance(template, Mapping):
        names, given = set(template), set(value) if isinstance(value, Mapping) else set()
        if names != given:
            raise ShapeError(
                f"{path}: expected the entries {sorted(map(str, names))} of the example inputs, "
                f"got {sorted(map(str, given))}"
            )
        for name, part in template.items():
            _match(part, value[name], f"{path}[{name!r}]", found)
    elif isinstance(template, tuple | list):
        count = len(value) if isinstance(value, tuple | list) else 0
        if count != len(template):
            raise ShapeError(f"{path}: expected {len(template)} entries, got {count}")
        for index, part in enumerate(template):
            _match(part, value[index], f"{path}[{index}]", found)
    elif template is not None:
        leaves, spec = pytree.tree_flatten(template)
        values, given_spec = pytree.tree_flatten(value)
        if spec != given_spec:
            raise ShapeError(f"{path}: expected a {type(template).__name__} like the example's")
        for part, leaf in zip(leaves, values, strict=True):
            _match(part, leaf, path, found)


def check_batch(
    leaves: Sequence[torch.Tensor],
    inputs: InputSpec,
    batch_size: int,
    precision: Precision,
    device: torch.device,
) -> list[torch.Tensor]:
    """The leaves on the device in their compute dtype. ShapeError, by name, if one is wrong."""
    checked = []
    rows = zip(leaves, inputs.names, inputs.batch_dims, inputs.shapes, inputs.dtypes, strict=True)
    for leaf, name, dim, shape, dtype in rows:
        wanted = list(shape)
        if dim is not None:
            wanted[dim] = batch_size
        if list(leaf.shape) != wanted:
            raise ShapeError(
                f"{name}: expected shape {wanted}, got {list(leaf.shape)}; every rank passes its "
                f"share of the global batch ({batch_size} samples, see local_batch); for a last "
                "batch that is smaller use drop_last=True"
            )
        floating = leaf.is_floating_point() and dtype.is_floating_point
        if leaf.dtype != dtype and not (floating and precision.compute is not None):
            raise ShapeError(f"{name}: expected dtype {dtype}, got {leaf.dtype}; convert it")
        checked.append(precision.cast(leaf.to(device, non_blocking=True)))
    return checked


def split_batch(
    leaves: Sequence[torch.Tensor], batch_dims: Sequence[int | None], count: int
) -> list[list[torch.Tensor]]:
    """Contiguous micro-batches; a leaf without a batch dim goes to each whole."""
    columns = [
        [leaf] * count if dim is None else list(leaf.tensor_split(count, dim))
        for leaf, dim in zip(leaves, batch_dims, strict=True)
    ]
    return [[column[number] for column in columns] for number in range(count)]


def take_share(batch: Any, inputs: InputSpec, index: int, count: int) -> Any:
    """Share ``index`` of ``count`` of a global batch, in the structure that it came in."""
    flatten_batch(batch, inputs)  # the structure must fit
    dims = dict(zip(inputs.names, inputs.batch_dims, strict=True))
    template = pytree.tree_unflatten([dims[name] for name in inputs.names], inputs.tree)

    def cut(dim: Any, value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            if dim is None:
                return value
            if value.shape[dim] % count:
                raise ShapeError(
                    f"{path}: a global batch of {value.shape[dim]} does not divide into "
                    f"{count} shares"
                )
            return value.tensor_split(count, dim)[index]
        if isinstance(value, Mapping):
            parts = {
                name: cut(dim.get(name), part, f"{path}[{name!r}]")
                for name, part in value.items()  # constants have no dim and no tensors
            }
            return parts
        if isinstance(value, tuple | list):
            cuts = [cut(dim[k], part, f"{path}[{k}]") for k, part in enumerate(value)]
            return type(value)(cuts) if type(value) in (tuple, list) else type(value)(*cuts)
        return value

    if isinstance(batch, Mapping):
        return cut(template[1], batch, "batch")
    if isinstance(batch, tuple | list):
        return cut(template[0], batch, "batch")
    return cut(template[0][0], batch, "batch")
