"""Models from the user's own code: ``package.module:callable``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from galvatron_compile.errors import ShapeError
from galvatron_compile.models.load import Workable

_RETURNS = "it must return (module, example_inputs) or (module, example_inputs, loss_fn)"


def from_callable(spec: str, seq: int | None) -> Workable:
    """Call the function that ``spec`` names, with every new tensor on the meta device.

    The current directory is on the path meanwhile. Raises ShapeError, naming what is wrong.
    """
    build = _find(spec)
    try:
        with torch.device("meta"):
            made = build()
    except Exception as error:  # the user's code may raise anything, and it is the user's to mend
        raise ShapeError(
            f"{spec} raised {type(error).__name__}: {error}\nit is called without arguments and "
            "with the meta device as default, where tensors have no values"
        ) from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ShapeError(f"{spec} returned {_shown(made)}; {_RETURNS}")
    module, inputs, *rest = made
    loss_fn = rest[0] if rest else None
    if not isinstance(module, nn.Module):
        raise ShapeError(f"{spec} returned {_shown(module)} as the module; {_RETURNS}")
    if not isinstance(inputs, Mapping | tuple):
        raise ShapeError(
            f"{spec} returned {_shown(inputs)} as example inputs; give a dict of keyword arguments "
            "or a tuple of positional ones"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise ShapeError(f"{spec} returned {_shown(loss_fn)} as the loss; give a function or None")
    found = _sequence(spec, inputs)
    if seq is not None and seq != found:
        raise ShapeError(
            f"{spec} makes samples of {found} tokens, so a sequence of {seq} contradicts it; "
            "leave the sequence out, or change the example inputs"
        )
    return Workable(spec, module, inputs, found, loss_fn, origin=f"{type(module).__name__}")


def _find(spec: str) -> Callable[[], Any]:
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ShapeError(f"{spec!r} must read package.module:callable, for example my.model:build")
    try:
        with _current_directory():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if missing == module_name or module_name.startswith(missing + "."):
            raise ShapeError(
                f"{spec}: there is no module {missing}; run in the folder that holds it, or "
                "install it"
            ) from error
        raise ShapeError(f"{spec}: {module_name} needs {missing}; install it") from error
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ShapeError(
            f"{spec}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        build = attrgetter(path)(module)
    except AttributeError as error:
        known = [name for name in vars(module) if callable(getattr(module, name))]
        own = ", ".join(name for name in known if not name.startswith("_")) or "none"
        raise ShapeError(f"{spec}: {module_name} has no {path}; callables there: {own}") from error
    if not callable(build):
        raise ShapeError(f"{spec}: {path} is {_shown(build)}, not callable; give a function")
    return build  # type: ignore[no-any-return]


@contextmanager
def _current_directory() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _sequence(spec: str, inputs: Mapping[str, Any] | tuple[Any, ...]) -> int:
    """Size of dim 1 of the first tensor of whole numbers that has one; 1 if there is none."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ShapeError(f"{spec}: the example inputs hold no tensor; give one batch")
    for tensor in tensors:
        if tensor.dim() >= 2 and not tensor.dtype.is_floating_point:
            return tensor.shape[1]
    return 1


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"an object of type {type(value).__name__}"
