"""The parameters of a layer, and the two modules that stand around a layer in a stage program."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from galvatron_compile.flat import FlatBucket, Slot
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis
from galvatron_compile.precision import Precision
from galvatron_compile.unit_schedule import UnitSchedule


class ParameterUnit(torch.nn.Module):
    """All parameters of one layer: gathered together, reduced together.

    Calling it gives the *working* tensors (compute dtype, tensor-local shape, in the order of
    ``layouts``), which are autograd leaves and the same objects every time. ``masters`` are what
    the optimizer updates: the tensor-local tensors without ZeRO, this rank's rows under ZeRO.
    Neither is registered as a parameter of the module.

    values: the whole parameters; a tensor on the meta device leaves its name in ``unloaded``.
    shared: other layers call the unit too, so it stays gathered from its first use to the end of
        the step.
    A unit used by itself schedules itself; the parts of a program get one :class:`UnitSchedule`.
    """

    def __init__(
        self,
        name: str,
        layouts: Sequence[ParameterLayout],
        values: Sequence[torch.Tensor],
        *,
        data: Axis,
        tensor: Axis,
        precision: Precision,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if len({layout.zero for layout in layouts}) > 1:
            raise ValueError(f"unit {name}: one ZeRO stage for all parameters")
        self.name, self.layouts, self.shared = name, tuple(layouts), shared
        self.data, self.tensor, self.device = data, tensor, device
        self.zero = layouts[0].zero if layouts else 0
        self.rank = data.index * tensor.size + tensor.index
        groups: dict[tuple[torch.dtype, bool], list[tuple[int, ParameterLayout, torch.Tensor]]]
        groups = {}
        for index, (layout, value) in enumerate(zip(layouts, values, strict=True)):
            key = (value.dtype, layout.requires_grad)
            groups.setdefault(key, []).append((index, layout, value))
        self.buckets = [
            FlatBucket(members, data=data, tensor=tensor, precision=precision, device=device)
            for members in groups.values()
        ]
        self.places: dict[int, tuple[FlatBucket, Slot]] = {
            slot.index: (bucket, slot) for bucket in self.buckets for slot in bucket.slots
        }
        ordered = [self._found(index) for index in range(len(layouts))]
        self.masters: list[torch.nn.Parameter] = [master for master, _ in ordered]
        self.working: list[torch.Tensor] = [working for _, working in ordered]
        self.unloaded: set[str] = {
            layout.name for layout, v in zip(layouts, values, strict=True) if v.is_meta
        }
        self.schedule = UnitSchedule([self])
        for index, working in enumerate(self.working):
            if working.requires_grad:
                # Weak: the collector cannot see through a tensor's hooks, so a unit that its own
                # tensors hold on to would never be freed, nor the process groups it uses.
                hook = functools.partial(_gradient_hook, weakref.ref(self), index)
                working.register_post_accumulate_grad_hook(hook)

    def describe(self) -> str:
        """One line for the printed program: whose parameters, how many, and what a call does."""
        count = sum(math.prod(layout.tensor_shape) for layout in self.layouts)
        does = {
            0: "summed over" if self.data.size > 1 else "",
            1: "ZeRO-1 over",
            2: "ZeRO-2 over",
            3: "gathered, ZeRO-3 over",
        }[self.zero]
        where = f", {does} {self.data}" if does else ""
        tensors = "1 tensor" if len(self.layouts) == 1 else f"{len(self.layouts)} tensors"
        return f"of {self.name}: {tensors}, {count:,} elements{where}"

    def _found(self, index: int) -> tuple[torch.nn.Parameter, torch.Tensor]:
        bucket, slot = self.places[index]
        place = bucket.slots.index(slot)
        return bucket.masters[place], bucket.working[place]

    @property
    def num_trainable(self) -> int:
        return sum(layout.requires_grad for layout in self.layouts)

    @property
    def is_freed(self) -> bool:
        """Whether no working tensor takes memory (ZeRO-3 between uses)."""
        return all(bucket.is_freed for bucket in self.buckets)

    def forward(self) -> tuple[torch.Tensor, ...]:
        self.schedule.before_use(self)
        return tuple(self.working)

    def load(self, index: int, full: torch.Tensor) -> None:
        """Take this rank's part of whole parameter ``index`` (any dtype or device)."""
        bucket, slot = self.places[index]
        bucket.load(slot, full)
        self.unloaded.discard(slot.layout.name)

    def take_gradient(self, index: int, working: torch.Tensor) -> None:
        """Move the gradient of working tensor ``index`` to where it is summed over ranks."""
        bucket, slot = self.places[index]
        gradient, working.grad = working.grad, None
        assert gradient is not None
        bucket.add(slot, gradient)
        self.schedule.gradient_arrived(self)

    def extra_repr(self) -> str:
        kind = "shared, " if self.shared else ""
        return f"{self.name}: {kind}{len(self.layouts)} parameters, zero {self.zero}"


def _gradient_hook(
    unit: weakref.ref[ParameterUnit], index: int, working: torch.Tensor
) -> None:
    found = unit()
    assert found is not None, "a program was dropped while its backward ran"
    found.take_gradient(index, working)


class BackwardFence(torch.nn.Module):
    """Identity on a layer's outputs that knows when the layer's parameters are needed.

    When forward passes, the layer is done and its ZeRO-3 units are freed; when backward passes
    (once per micro-batch, after the gradients of all outputs have come), they are gathered again.
    """

    def __init__(self, units: ParameterUnit | Sequence[ParameterUnit]) -> None:
        super().__init__()
        # A tuple, not submodules: the units are already submodules of the program.
        self._units = (units,) if isinstance(units, ParameterUnit) else tuple(units)

    def forward(self, *outputs: Any) -> tuple[Any, ...]:
        tracked = [
            index
            for index, output in enumerate(outputs)
            if isinstance(output, torch.Tensor) and output.requires_grad
        ]
        passed = list(outputs)
        if tracked:
            fenced = _Fence.apply(self, *(outputs[index] for index in tracked))
            for index, output in zip(tracked, fenced, strict=True):
                passed[index] = output
        for unit in self._units:
            unit.schedule.after_forward(unit)
        return tuple(passed)

    def enter_backward(self) -> None:
        for unit in self._units[:1]:
            unit.schedule.before_backward(self._units)


class _Fence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fence: BackwardFence, *tensors: torch.Tensor) -> Any:
        ctx.fence = fence
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.fence.enter_backward()
        return (None, *gradients)


class Recompute(torch.nn.Module):
    """Keep only the inputs of ``module`` and run its forward again in backward.

    No random state is saved: random operators of a program compute from explicit seeds.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.module(*args)
        return checkpoint(self.module, *args, use_reentrant=False, preserve_rng_state=False)
