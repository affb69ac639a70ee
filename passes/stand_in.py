"""While a model is traced, alike submodules run a few times for real; stand-ins replace the rest.

A call that ran for real leaves a node :data:`RESULT` behind its results, a call that did not is
such a node alone. Its arguments say what the call took and gave, so that the pass
:mod:`capture_once` can compare the real ones and put copies of them where the stand-ins are.
The code around the submodules runs as it is: loops, slices, skip connections, collected values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from galvatron_compile.passes.alike import Group, Member, Slot, spelling
from galvatron_compile.passes.watch import Snapshot, watching_numbers
from galvatron_compile.torch_private import flatten_tree, size_expression, unflatten_tree

# Calls that run for real before stand-ins take over; so does the last member of a group.
REAL_CALLS = 2

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@torch.library.custom_op("galvatron_compile::member_result", mutates_args=())
def _member_result(
    call: int, inputs: Sequence[Tensor], own: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Tensor]:
    raise AssertionError("this operator marks nodes of a trace and never runs")


@_member_result.register_fake
def _(
    call: int, inputs: Sequence[Tensor], own: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Tensor]:
    """New tensors like ``outputs``, which of a stand-in are those of a call that ran."""
    return [
        torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device=o.device) for o in outputs
    ]


RESULT = torch.ops.galvatron_compile.member_result.default


@dataclass(frozen=True)
class _Results:
    """How a call's results are put together: per leaf ``(source, k)``, ``(None, constant)``."""

    spec: Any
    leaves: tuple[tuple[str | None, Any], ...]

    def build(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        from_where = {"input": inputs, "output": outputs}
        values = [from_where[source][k] if source else k for source, k in self.leaves]
        return unflatten_tree(values, self.spec)


@dataclass(eq=False)
class Kind:
    """Calls of one group with alike arguments. ``real``: the numbers of those that ran.

    state: what the last of them could reach when it was called.
    """

    group: Group
    state: Snapshot | None = None
    real: list[int] = field(default_factory=list)
    results: _Results | None = None
    outputs: Sequence[Tensor] = ()


class Recorder:
    """Context in which the members of ``groups`` are replaced after a few calls.

    calls: the kind of each numbered call. unlike: the groups that turned out to do what stand-ins
    cannot: side effects, inputs or results that are not tensors. They run for real from then on.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.calls: list[Kind] = []
        self.unlike: set[Group] = set()
        self.replaced: set[Group] = set()
        self._kinds: dict[Hashable, Kind] = {}
        self._looked: dict[Group, set[Slot]] = {group: set() for group in groups}
        self._running: set[int] = set()
        # Found again by their __dict__: the exporter calls proxies that share it.
        self._members = {
            id(member.module.__dict__): (group, member)
            for group in groups
            for member in group.members
        }
        self._replaced_forwards: list[tuple[type, Any]] = []

    def __enter__(self) -> Recorder:
        for kind in {type(member.module) for _, member in self._members.values()}:
            self._replaced_forwards.append((kind, vars(kind).get("forward")))
            kind.forward = self._redirecting(kind.forward)  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        for kind, own in self._replaced_forwards:
            if own is None:
                del kind.forward  # type: ignore[attr-defined]
            else:
                kind.forward = own  # type: ignore[attr-defined]

    def _redirecting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def redirected(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = self._members.get(id(module.__dict__))
            run = functools.partial(forward, module)
            if found is None or id(module.__dict__) in self._running:
                return run(*args, **kwargs)
            self._running.add(id(module.__dict__))
            try:
                return self._call(*found, run, args, kwargs)
            finally:
                self._running.discard(id(module.__dict__))

        return redirected

    def _call(
        self,
        group: Group,
        member: Member,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        leaves, spec = flatten_tree((args, kwargs))
        if group in self.unlike or (arguments := _spelled(leaves)) is None:
            return run(*args, **kwargs)
        settings, numbers = spelling(member.module)  # again: the model may have changed them
        looked = tuple((slot, numbers[slot]) for slot in sorted(self._looked[group]))
        key = (group, settings, looked, str(spec), arguments, torch.is_grad_enabled())
        kind = self._kinds.setdefault(key, Kind(group))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        enough = len(kind.real) >= REAL_CALLS and member is not group.members[-1]
        if not enough or kind.state is None or kind.state.is_changed():
            return self._real(kind, member, run, args, kwargs, inputs)
        self.replaced.add(group)
        outputs = self._mark(kind, member, inputs, kind.outputs)
        assert kind.results is not None
        return kind.results.build(inputs, outputs)

    def _mark(
        self, kind: Kind, member: Member, inputs: list[Tensor], outputs: Sequence[Tensor]
    ) -> list[Tensor]:
        self.calls.append(kind)
        return RESULT(len(self.calls) - 1, inputs, list(member.tensors()), list(outputs))

    def _real(
        self,
        kind: Kind,
        member: Member,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
    ) -> Any:
        group = kind.group
        looked: set[Slot] = set()
        versions = [tensor._version for tensor in inputs]
        kind.state = before = Snapshot(member.module, (args, kwargs))
        try:
            with watching_numbers(member.module, group.differing, looked.add):
                returned = run(*args, **kwargs)
        except Exception:
            self.unlike.add(group)  # perhaps an operator that takes no watched number
            raise
        pure = not before.is_changed() and versions == [tensor._version for tensor in inputs]
        new = looked - self._looked[group]
        self._looked[group] |= new
        leaves, spec = flatten_tree(returned)
        outputs = _fresh(leaves, inputs)
        results = _results(leaves, spec, inputs, outputs)
        if not pure or results is None or (new and group in self.replaced):
            self.unlike.add(group)
            return returned
        marked = self._mark(kind, member, inputs, outputs)
        if [t.requires_grad for t in marked] != [t.requires_grad for t in outputs] or (
            kind.results not in (None, results)
        ):
            self.unlike.add(group)
            return returned
        kind.real.append(len(self.calls) - 1)
        kind.results, kind.outputs = results, marked
        return results.build(inputs, marked)


def _spelled(leaves: Sequence[Any]) -> Hashable | None:
    """Arguments as a value that is equal for alike ones; None if one may hide anything."""
    tensors: dict[int, int] = {}
    spelled: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            number = tensors.setdefault(id(leaf), len(tensors))
            sizes = tuple(map(size_expression, (*leaf.shape, *leaf.stride())))
            kind = (leaf.dtype, str(leaf.device), leaf.requires_grad)
            spelled.append((number, sizes, kind))
        elif isinstance(leaf, torch.SymInt):
            spelled.append(size_expression(leaf))
        elif type(leaf) in _PLAIN:
            spelled.append((type(leaf), repr(leaf)))
        else:
            return None
    return tuple(spelled)


def _fresh(leaves: Sequence[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors among results that are not inputs handed through, each once."""
    found: dict[int, Tensor] = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    for tensor in inputs:
        found.pop(id(tensor), None)
    return list(found.values())


def _results(
    leaves: Sequence[Any], spec: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> _Results | None:
    """None if something else than tensors and constants is returned, or views of each other:
    writing to one would have to show in the other."""
    storages = [StorageWeakRef(t.untyped_storage()) for t in (*inputs, *outputs)]
    new = storages[len(inputs) :]
    if not outputs or any(storages.count(storage) > 1 for storage in new):
        return None
    places = {id(t): ("input", k) for k, t in enumerate(inputs)}
    places |= {id(t): ("output", k) for k, t in enumerate(outputs)}
    found: list[tuple[str | None, Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(places[id(leaf)])
        elif type(leaf) in _PLAIN:
            found.append((None, leaf))
        else:
            return None
    return _Results(spec, tuple(found))
