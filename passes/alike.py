"""Submodules that are alike: same code, same shapes and same settings, but for plain numbers.

This looks at modules before they run. Whether a number in which alike modules differ (a layer
index) decides what they compute is found out when they run, see :mod:`watch`.
"""

from __future__ import annotations

import functools
import types
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Slot = tuple[str, str]  # the path of a module inside a member, the name of its attribute

_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Member:
    """One of several alike submodules. ``numbers``: plain ints by which it may differ."""

    module: nn.Module
    numbers: dict[Slot, int]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Parameters, then buffers: as many, in the same order, for every member of a group."""
        yield from (p for _, p in self.module.named_parameters(remove_duplicate=False))
        yield from (b for _, b in self.module.named_buffers(remove_duplicate=False))


@dataclass(frozen=True, eq=False)
class Group:
    """Alike submodules of one parent, in its order. ``differing``: where their numbers differ."""

    members: tuple[Member, ...]
    differing: tuple[Slot, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = self.members[0].numbers
        differing = (s for s in first if len({m.numbers[s] for m in self.members}) > 1)
        object.__setattr__(self, "differing", tuple(differing))


def alike_groups(model: nn.Module, least: int) -> list[Group]:
    """The outermost groups of at least ``least`` alike children with parameters and children."""
    groups: list[Group] = []
    pending, seen = [model], {id(model)}
    while pending:
        children = [c for c in pending.pop().children() if id(c) not in seen]
        seen.update(map(id, children))
        for members in _alike(children):
            if len(members) >= least:
                groups.append(Group(tuple(members)))
                inside = (sub for member in members for sub in member.module.modules())
                seen.update(map(id, inside))
            else:
                pending.extend(member.module for member in members)
    return groups


def _alike(children: list[nn.Module]) -> list[list[Member]]:
    kinds = Counter(map(type, children))
    alike: dict[Hashable, list[Member]] = {}
    for child in children:
        numbers: dict[Slot, int] = {}
        spelled: Hashable = ("alone", id(child))
        if kinds[type(child)] > 1 and _can_stand_in(child):
            spelled, numbers = spelling(child)
        alike.setdefault(spelled, []).append(Member(child, numbers))
    return list(alike.values())


def spelling(module: nn.Module) -> tuple[Hashable, dict[Slot, int]]:
    """A value that is equal for alike modules, and the plain ints that it leaves out."""
    numbers: dict[Slot, int] = {}
    return _Spelling(module).whole(numbers), numbers


def _can_stand_in(module: nn.Module) -> bool:
    """Worth it, and nothing hooks into what would not run (hooks of ``module`` itself will)."""
    inner = [sub for sub in module.modules() if sub is not module]
    return (
        bool(inner)
        and any(True for _ in module.parameters())
        and "forward" not in module.__dict__
        and type(module).forward is not nn.Module.forward  # a ModuleList is not called
        and not any(sub.__dict__.get(hooks) for sub in inner for hooks in _HOOKS)
        and not any(isinstance(sub, torch.jit.ScriptModule) for sub in module.modules())
    )


class _Spelling:
    """A module written down as a hashable value that is equal for alike modules.

    Anything not understood is spelled by its identity: such modules are alike only if they share
    that very object. Objects outlive the spelling, as they belong to the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.paths: dict[int, str] = {}
        self.subs = list(module.named_modules(remove_duplicate=False))
        for path, sub in self.subs:
            self.paths.setdefault(id(sub), path)
        self.tensors: dict[int, int] = {}
        self.known: dict[int, Hashable] = {}

    def whole(self, numbers: dict[Slot, int]) -> Hashable:
        """All modules of the member; plain ints go to ``numbers`` instead."""
        return tuple(
            (path, self.paths[id(sub)], type(sub), self.held(sub), self.plain(path, sub, numbers))
            for path, sub in self.subs
        )

    def held(self, module: nn.Module) -> Hashable:
        tensors = [*module._parameters.items(), *module._buffers.items()]
        return tuple((name, value is not None and self.tensor(value)) for name, value in tensors)

    def tensor(self, value: torch.Tensor) -> Hashable:
        """Its kind, and which earlier tensor of the member it is tied to.

        The contents do not matter: the exported graph takes parameters and buffers as inputs.
        """
        number = self.tensors.setdefault(id(value), len(self.tensors))
        shape = (tuple(value.shape), value.stride(), value.dtype, str(value.device))
        return (type(value), shape, value.requires_grad, number)

    def plain(self, path: str, module: nn.Module, numbers: dict[Slot, int]) -> Hashable:
        rows: list[Hashable] = []
        for name, value in sorted(module.__dict__.items()):
            if name in _OF_MODULES:
                continue
            if type(value) is int:
                numbers[path, name] = value
                rows.append((name, int))
            else:
                rows.append((name, self.value(value)))
        return tuple(rows)

    def value(self, value: Any) -> Hashable:
        kind = type(value)
        if value is None or kind in (bool, int, str, bytes):
            return (kind, value)
        if kind in (float, complex, torch.device):
            return (kind, repr(value))
        if id(value) in self.paths:
            return ("member", self.paths[id(value)])
        if id(value) not in self.known:
            self.known[id(value)] = ("is", id(value))  # for what refers to itself
            inner = _parts(value)
            if inner is not None:
                fixed, parts = inner
                self.known[id(value)] = (kind, fixed, tuple(map(self.value, parts)))
        return self.known[id(value)]


class _Plain:
    """A class whose instances keep everything in ``__dict__``."""


def _keeps_all_in_dict(value: object) -> bool:
    """Whether ``vars(value)`` is the whole state: no slots, and no base class written in C."""
    sizes = (type(value).__basicsize__, type(value).__itemsize__)
    return hasattr(value, "__dict__") and sizes == (_Plain.__basicsize__, 0)


def _parts(value: Any) -> tuple[tuple[int, ...], list[Any]] | None:
    """Identities and values that make up ``value``; None if only its own identity tells."""
    kind = type(value)
    if kind in (list, tuple, torch.Size):
        return (), list(value)
    if kind in (dict, OrderedDict):
        return (), [part for item in value.items() for part in item]
    if kind is functools.partial:
        return (), [value.func, value.args, value.keywords]
    if kind is types.MethodType:
        return (), [value.__func__, value.__self__]
    if kind is types.FunctionType:
        cells = [cell.cell_contents for cell in value.__closure__ or () if filled(cell)]
        inner = [value.__defaults__, value.__kwdefaults__, value.__dict__, *cells]
        return (id(value.__code__), id(value.__globals__)), inner
    if isinstance(value, (type, nn.Module, torch.Tensor)) or not _keeps_all_in_dict(value):
        return None
    return (), [vars(value)]


def filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is not assigned yet
        return False
