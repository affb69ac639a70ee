"""What a call of a module does besides computing its result: the numbers it reads, the state it
leaves behind."""

from __future__ import annotations

import collections
import functools
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from galvatron_compile.passes.alike import Slot, filled

_NUMBERS = (bool, int, float, complex, str, bytes)
_CONTAINERS = (list, tuple, dict, set, collections.deque)


class WatchedNumber:
    """Computes like the int that it hides, and tells whenever anybody looks at it.

    Not a subclass of int: C code reads the value of one without asking. ``isinstance(x, int)``
    holds all the same.
    """

    __slots__ = ("_looked", "_value")

    def __init__(self, value: int, looked: Callable[[], None]) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_looked", looked)

    def __getattribute__(self, name: str) -> Any:
        return int if name == "__class__" else getattr(look(self), name)


def look(value: Any) -> Any:
    """The int behind a watched number, which is told; anything else as it is."""
    if type(value) is not WatchedNumber:
        return value
    object.__getattribute__(value, "_looked")()
    return object.__getattribute__(value, "_value")


def _plain(name: str) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        return getattr(int, name)(look(self), *map(look, others))

    return method


def _binary(compute: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    """An operator whose other side, a tensor for one, may be what knows how to compute it."""

    def method(self: Any, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        return compute(look(left), look(right))

    return method


def _define_operators() -> None:
    for name in vars(int).keys() - {"__new__", "__getattribute__", "__doc__", "__getnewargs__"}:
        if name.startswith("__"):
            setattr(WatchedNumber, name, _plain(name))
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or",
        "xor",
    ):  # fmt: skip
        compute = getattr(operator, f"__{name}__")
        setattr(WatchedNumber, f"__{name}__", _binary(compute, reflected=False))
        setattr(WatchedNumber, f"__r{name}__", _binary(compute, reflected=True))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(WatchedNumber, f"__{name}__", _binary(getattr(operator, name), reflected=False))


_define_operators()


@contextmanager
def watching_numbers(
    module: nn.Module, slots: Iterable[Slot], looked: Callable[[Slot], None]
) -> Iterator[None]:
    """Inside, reading one of ``slots`` (plain ints of ``module``'s submodules) is reported."""
    put: list[tuple[dict[str, Any], str, int, Any]] = []
    for slot in slots:
        held, name = module.get_submodule(slot[0]).__dict__, slot[1]
        number = WatchedNumber(held[name], lambda slot=slot: looked(slot))  # type: ignore[misc]
        put.append((held, name, held[name], number))
        held[name] = number
    try:
        yield
    finally:
        for held, name, value, number in put:
            if held.get(name) is number:  # else the module has written to it
                held[name] = value


class Snapshot:
    """What a call can reach and write to: attributes, containers, closures, classes, globals.

    Remembers the contents of all of it when made. Tensors are not looked into: what is written
    to one shows in its version.
    """

    def __init__(self, module: nn.Module, arguments: Any) -> None:
        self._random = random.getstate()
        self._held: list[tuple[object, list[Any]]] = []
        seen: set[int] = set()
        pending: list[Any] = [module, arguments]
        while pending:
            value = pending.pop()
            if id(value) in seen or (contents := _contents(value)) is None:
                continue
            seen.add(id(value))
            self._held.append((value, contents))
            pending.extend(contents)

    def is_changed(self) -> bool:
        return random.getstate() != self._random or any(
            _differ(contents, _contents(value)) for value, contents in self._held
        )


def _differ(before: list[Any], after: list[Any] | None) -> bool:
    return (
        after is None
        or len(before) != len(after)
        or not all(a is b or _equal(a, b) for a, b in zip(before, after, strict=True))
    )


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, _NUMBERS) and a == b


def _contents(value: Any) -> list[Any] | None:
    """What ``value`` refers to and may replace; None for what cannot change or is not looked into.

    A module stands for its class too, and a class for the globals of the file that it is in.
    """
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, (*_NUMBERS, torch.Tensor)) or value is None:
        return None
    if isinstance(value, types.ModuleType):
        return _of_file(value)
    if isinstance(value, nn.Module):
        return [*vars(value).values(), type(value)]
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if filled(c)]
        return [value.__dict__, *cells] if cells or value.__dict__ else None
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, type):
        file = sys.modules.get(value.__module__)
        return None if _foreign(value) else [*vars(value).values(), *value.__bases__, file]
    if _foreign(type(value)) and type(value) is not types.SimpleNamespace:
        return None
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    return [getattr(value, "__dict__", None), *(getattr(value, name, None) for name in slots)]


def _of_file(file: types.ModuleType) -> list[Any]:
    """What a model's file keeps in global variables, and its own classes; no other files."""
    return [
        value
        for value in vars(file).values()
        if not isinstance(value, (types.FunctionType, types.ModuleType, types.BuiltinFunctionType))
        and (not isinstance(value, type) or value.__module__ == file.__name__)
    ]


def _foreign(kind: type) -> bool:
    """Classes of PyTorch, of Python and of these passes: a model keeps nothing in them."""
    root = kind.__module__.partition(".")[0]
    ours = kind.__module__.rpartition(".")[0] == __package__
    return ours or root == torch.__name__ or root in sys.stdlib_module_names
