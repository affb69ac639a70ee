"""An optimizer's state under the parameters' names, whatever plan it was made under.

Per parameter an optimizer may hold tensors of the parameter's shape, which are sharded as the
parameter is, and numbers (also as tensors with no dims), which go into the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from galvatron_compile.checkpoint_manifest import SavedGroup, SavedOptimizer, SavedState
from galvatron_compile.checkpoint_ranks import Ranks
from galvatron_compile.contents import listed
from galvatron_compile.entry import Entry
from galvatron_compile.errors import CheckpointError
from galvatron_compile.states import States

HOW_IT_RUNS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
"""Options of a parameter group that belong to the running process, not to what it has learnt."""

Described = tuple[list[SavedGroup], dict[str, dict[str, SavedState]]]


def kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def describe(optimizer: torch.optim.Optimizer, states: States, ranks: Ranks) -> SavedOptimizer:
    """What all ranks together hold; collective. CheckpointError for a state that has no place."""

    def describe_mine() -> Described | None:
        mine = _described(optimizer, states)
        # The other ranks of a pipeline group hold the same parameters.
        return mine if states.rank % states.group_size == 0 else None

    each = [found for found in ranks.each(describe_mine) if found is not None]
    counts = {len(groups) for groups, _ in each}
    if len(counts) > 1:
        found = " or ".join(map(str, sorted(counts)))
        raise CheckpointError(
            f"the optimizer has {found} parameter groups, depending on the rank; make the same "
            "groups everywhere, empty ones too"
        )
    by_number = zip(*(groups for groups, _ in each), strict=True)
    groups = [_merged(n, list(found), list(states.layouts)) for n, found in enumerate(by_number)]
    saved = {}
    for name, (owner, _) in states.layouts.items():
        if state := each[owner][1].get(name):
            saved[name] = state
    return SavedOptimizer(kind(optimizer), tuple(groups), saved)


def _described(optimizer: torch.optim.Optimizer, states: States) -> Described:
    names = _names(optimizer, states)
    # What has no dims for any larger parameter is a number for scalar parameters too.
    numbers = {"step"} | {
        key
        for entry in states.entries
        for key, value in optimizer.state.get(entry.master, {}).items()
        if entry.master.dim() and isinstance(value, torch.Tensor) and not value.dim()
    }
    groups, found = [], {}
    for number, group in enumerate(optimizer.param_groups):
        options = {k: _plain(k, v) for k, v in group.items() if k not in HOW_IT_RUNS}
        groups.append(SavedGroup(tuple(names[number]), options))
        for name in names[number]:
            entry = states.by_name[name]
            state = optimizer.state.get(entry.master, {})
            found[name] = {
                key: _saved(optimizer, entry, key, value, key in numbers)
                for key, value in state.items()
                if value is not None
            }
    return groups, found


def _names(optimizer: torch.optim.Optimizer, states: States) -> list[list[str]]:
    """Of the parameters in every group."""
    by_id = {id(entry.master): entry.name for entry in states.entries}
    held = [  # without what stands in for the parameters of a stage that has none
        [p for p in group["params"] if id(p) in by_id or p.numel()]
        for group in optimizer.param_groups
    ]
    if not all(id(p) in by_id for group in held for p in group):
        raise CheckpointError(
            "the optimizer holds a tensor that is not among parallel.parameters(); make it from "
            "these"
        )
    return [[by_id[id(p)] for p in group] for group in held]


def _saved(
    optimizer: torch.optim.Optimizer, entry: Entry, key: str, value: Any, is_number: bool
) -> SavedState:
    if isinstance(value, (int, float)):
        return SavedState("int" if isinstance(value, int) else "float", value)
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if not value.dim() and is_number:
            return SavedState(dtype, value.item())
        if value.shape == entry.master.shape:
            return SavedState(dtype)
    what = f"a tensor of {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise CheckpointError(
        f"{type(optimizer).__name__}'s state {key!r} of {entry.name} is {what}: only numbers and "
        "tensors of the parameter's shape can be saved for any plan; use another optimizer, or "
        "save without it"
    )


def _plain(key: str, value: Any) -> Any:
    """An option of a group as JSON; the inverse is :func:`_option`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_plain(key, item) for item in value]}
    if isinstance(value, torch.Tensor) and not value.dim():
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise CheckpointError(
        f"the optimizer's option {key!r} is {value!r}: only numbers, texts and tuples can be saved"
    )


def _option(value: Any, current: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        device = current.device if isinstance(current, torch.Tensor) else None
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device)
    ((name, items),) = value.items()
    inner = [_option(item, None) for item in items]
    return tuple(inner) if name == "tuple" else inner


def _merged(number: int, groups: list[SavedGroup], order: list[str]) -> SavedGroup:
    """One parameter group, from what every pipeline group has of it."""
    used = [group for group in groups if group.names] or groups[:1]
    if any(group.options != used[0].options for group in used):
        raise CheckpointError(f"the optimizer's group {number} has other options on other ranks")
    names = {name for group in used for name in group.names}
    return SavedGroup(tuple(name for name in order if name in names), used[0].options)


def tensors_to_save(
    optimizer: torch.optim.Optimizer, states: States, saved: SavedOptimizer
) -> dict[str, torch.Tensor]:
    """What this rank writes; collective within its pipeline group."""
    return {
        _key(name, key): states.parts.encode(entry, optimizer.state[entry.master][key])
        for name, entry, key, _ in _tensors(states, saved, {})
        if states.owns(name)
    }


def _key(name: str, key: str) -> str:
    return f"optimizer.{name}.{key}"


def _tensors(
    states: States, saved: SavedOptimizer, names: Mapping[str, str]
) -> list[tuple[str, Entry, str, SavedState]]:
    """(stored name, parameter, key, state) of every tensor of a parameter held here, in order."""
    return [
        (names.get(name, name), states.by_name[name], key, state)
        for name in states.layouts
        if name in states.by_name
        for key, state in saved.states.get(names.get(name, name), {}).items()
        if state.value is None
    ]


class OptimizerLoad:
    """An optimizer that takes over a saved state, in three steps: check, read, apply.

    names: the model's name of every parameter -> the name it is stored under.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        states: States,
        saved: SavedOptimizer,
        names: Mapping[str, str],
    ) -> None:
        self.optimizer, self.states, self.saved, self.names = optimizer, states, saved, names
        self.group_of = {
            name: number for number, group in enumerate(saved.groups) for name in group.names
        }

    def check(self) -> None:
        """CheckpointError if the optimizer is another one, or trains other parameters."""
        if kind(self.optimizer) != self.saved.kind:
            raise CheckpointError(
                f"the checkpoint is of {self.saved.kind}, the optimizer given is "
                f"{kind(self.optimizer)}; give the same, or load without an optimizer"
            )
        local = _names(self.optimizer, self.states)
        mine = {name for names in local for name in names}
        problems = []
        if new := [name for name in mine if self.names.get(name) not in self.group_of]:
            problems.append(f"the checkpoint's did not train {listed(new)}")
        here = [entry.name for entry in self.states.entries]
        if gone := [n for n in here if n not in mine and self.names.get(n) in self.group_of]:
            problems.append(f"the checkpoint's also trained {listed(gone)}")
        for number, names in enumerate(local):
            saved = {self.group_of.get(self.names.get(name, name)) for name in names}
            if len(saved - {None}) > 1:
                problems.append(f"its group {number} is several groups in the checkpoint")
        if problems:
            raise CheckpointError("the optimizer does not fit; " + "; ".join(problems))

    def targets(self) -> dict[str, torch.Tensor]:
        """What this rank reads: over the optimizer's own tensors, where it has them already."""
        self._parts = {}
        result = {}
        for stored, entry, key, state in _tensors(self.states, self.saved, self.names):
            dtype = getattr(torch, state.dtype)
            current = self.optimizer.state.get(entry.master, {}).get(key)
            if not _like(current, entry.master, dtype):
                current = torch.empty_like(entry.master, dtype=dtype, requires_grad=False)
            self._parts[entry.name, key] = current
            result[_key(stored, key)] = self.states.parts.encode(entry, current, empty=True)
        return result

    def apply(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what has been read, and the options; collective in a pipeline group."""
        for stored, entry, key, _ in _tensors(self.states, self.saved, self.names):
            local = self.states.parts.decode(entry, tensors[_key(stored, key)])
            part = self._parts[entry.name, key]
            if local.data_ptr() != part.data_ptr():
                part.copy_(local)
        new: dict[int, dict[str, Any]] = {}
        groups, index = [], 0
        for number, names in enumerate(_names(self.optimizer, self.states)):
            for place, name in enumerate(names, index):
                if saved := self.saved.states.get(self.names[name]):
                    new[place] = {key: self._value(name, key, saved[key]) for key in saved}
            count = len(self.optimizer.param_groups[number]["params"])  # a stand-in has no name
            indices = list(range(index, index := index + count))
            groups.append({**self._options(number, names), "params": indices})
        self.optimizer.load_state_dict({"state": new, "param_groups": groups})
        self._restore_dtypes(new)

    def _value(self, name: str, key: str, state: SavedState) -> Any:
        if state.value is None:
            return self._parts[name, key]
        if state.dtype in ("int", "float"):
            return state.value
        return torch.tensor(state.value, dtype=getattr(torch, state.dtype))

    def _options(self, number: int, names: list[str]) -> dict[str, Any]:
        current = self.optimizer.param_groups[number]
        known = {key: value for key, value in current.items() if key != "params"}
        if not names and len(self.saved.groups) != len(self.optimizer.param_groups):
            return known
        found = self.group_of[self.names[names[0]]] if names else number
        saved = self.saved.groups[found].options
        return known | {key: _option(value, known.get(key)) for key, value in saved.items()}

    def _restore_dtypes(self, new: Mapping[int, Mapping[str, Any]]) -> None:
        """``load_state_dict`` casts to the parameter's dtype; a state was what it was."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for place, values in new.items():
            state = self.optimizer.state[parameters[place]]
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and state[key].dtype != value.dtype:
                    state[key] = value.to(state[key].device)


def _like(current: Any, master: torch.Tensor, dtype: torch.dtype) -> bool:
    if not isinstance(current, torch.Tensor) or current.shape != master.shape:
        return False
    contiguous = current.is_contiguous() and math.prod(current.shape) > 0
    return contiguous and current.dtype == dtype and current.device == master.device
