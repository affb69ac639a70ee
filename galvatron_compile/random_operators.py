"""Random operators whose masks depend on where and when they run, and on nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.mesh import Axis
from galvatron_compile.seeds import mix
from galvatron_compile.torch_private import is_faking, schema_arguments

_TRAIN = ("train", "training")
_PROBABILITY = ("dropout_p", "p", "dropout")
_NUM_STREAM_ARGUMENTS = 4  # op, seed, offset, coordinate


def seeded(
    op: Callable[..., Any],
    seed: int,
    offset: int,
    coordinate: int | Axis,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``op(*args, **kwargs)`` with random numbers that (seed, offset, coordinate) determine.

    The default generator of the tensors' device is seeded with a hash of the three and put back
    afterwards, also when ``op`` raises: equal triples give equal masks, so recompute repeats
    them, and nothing else notices. The CPU generator uses 32 bits of the hash, CUDA's all 63.

    Args:
        seed: what differs from step to step, micro-batch to micro-batch, layer to layer.
        offset: the place of the operator in its graph.
        coordinate: the rank's place among the ranks that must draw different numbers (an axis
            stands for its index), and 0 where all must draw equal ones.
    """
    if is_faking((args, kwargs)):
        return op(*args, **kwargs)
    place = coordinate.index if isinstance(coordinate, Axis) else coordinate
    with _generator_seeded(_device(args, kwargs), mix(seed, offset, place)):
        return op(*args, **kwargs)


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers, by its operator's tag and its arguments.

    False for dropout in evaluation mode or of literal probability 0; wrapped nodes are looked
    into.
    """
    op, args, kwargs = _call(node)
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    bound = _bind(op, args, kwargs)
    if any(bound.get(name) is False for name in _TRAIN):
        return False
    return not any(_is_zero(bound.get(name)) for name in _dropout_names(bound))


def without_dropout(module: fx.GraphModule) -> fx.GraphModule:
    """The evaluation version of one graph: dropout off, attributes and submodules shared.

    Operators with a ``train`` or ``training`` argument get False, those with a ``dropout_p``
    (attention) get 0, and :func:`seeded` around them goes. Other random operators (``bernoulli``,
    ``rand_like``) stay random: the graph does not say what evaluation would do in their place;
    :func:`is_random` finds them. Inputs stay the same, though a seed may go unused.
    """
    graph = copy.deepcopy(module.graph)  # nodes are new, attributes (axes, parameters) are not
    for node in graph.nodes:
        if is_random(node):
            _switch_off(node)
    graph.lint()
    evaluation = fx.GraphModule(module, graph, type(module).__name__)
    evaluation.meta.update(module.meta)
    return evaluation


def _switch_off(node: fx.Node) -> None:
    op, args, kwargs = _call(node)
    bound = _bind(op, args, kwargs)
    off: dict[str, object] = {name: False for name in _TRAIN if name in bound}
    if "dropout_p" in bound:
        off["dropout_p"] = 0.0
    if not off:
        return
    names = [name for name, _ in schema_arguments(op)]
    positional = list(args)
    keywords = dict(kwargs)
    for name, value in off.items():
        place = names.index(name)
        if place < len(positional):
            positional[place] = value
        else:
            keywords[name] = value
    node.target, node.args, node.kwargs = op, tuple(positional), keywords


def _call(node: fx.Node) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """Operator and arguments of a node, out of :func:`seeded` if it is wrapped."""
    if node.target is seeded:
        return node.args[0], node.args[_NUM_STREAM_ARGUMENTS:], node.kwargs
    return node.target, node.args, node.kwargs


def _bind(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of the operator's schema by name, defaults included."""
    schema = schema_arguments(op)
    bound = dict(schema)
    bound.update(zip((name for name, _ in schema), args, strict=False))
    bound.update(kwargs)
    return bound


def _dropout_names(bound: Mapping[str, Any]) -> list[str]:
    """Arguments that are dropout probabilities; a bare ``p`` is one only beside ``train``."""
    trains = any(name in bound for name in _TRAIN)
    return [name for name in _PROBABILITY if name in bound and (trains or name == "dropout_p")]


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and value == 0


@contextmanager
def _generator_seeded(device: torch.device, seed: int) -> Iterator[None]:
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    generators = getattr(module, "default_generators", None)
    if generators is None:
        raise UnsupportedError(
            f"random operators on {device.type} cannot be seeded one by one; "
            "use cpu or cuda, or a model without dropout"
        )
    index = module.current_device() if device.index is None else device.index
    return generators[index]


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            return leaf.device
    return torch.device(kwargs.get("device") or "cpu")
