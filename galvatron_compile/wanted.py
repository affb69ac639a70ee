"""The arguments of ``compile``, checked before anything is done with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.errors import (
    GalvatronError,
    InfeasibleError,
    PlanError,
    ProfileError,
    ShapeError,
)
from galvatron_compile.job import Job
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision


@dataclass(frozen=True)
class Wanted:
    """What was passed to ``compile``; ``str()`` shows what must be the same on every rank.

    Nothing is of the type that it should have before :meth:`check`.
    """

    model: object = field(repr=False)
    cluster_profile: object = field(repr=False)
    plan: object = field(repr=False)
    loss_fn: object = field(repr=False)
    global_batch_size: object
    memory_bytes: object
    precision: str | None
    measure: bool
    fuse: object
    seed: object

    def __str__(self) -> str:
        has_plan = self.plan is not None
        return f"{self!r}"[:-1] + f", {has_plan=})"

    def job(self) -> Job:
        """The job, also where the model is none: every rank must be there to be told."""
        none = torch.nn.Module()
        return Job.current(self.model if isinstance(self.model, torch.nn.Module) else none)

    def check(self) -> None:
        """GalvatronError that says what to pass instead."""
        self._check_model()
        self._check_profile()
        self._check_plan()
        self._check_loss()
        self._check_numbers()
        Precision.parse(self.precision)

    def _check_model(self) -> None:
        if not isinstance(self.model, torch.nn.Module):
            raise GalvatronError(
                f"the model is {_shown(self.model)}; pass an instance of torch.nn.Module that "
                "returns its loss, or its outputs with a loss_fn(outputs, batch) beside"
            )

    def _check_profile(self) -> None:
        given = self.cluster_profile
        if isinstance(given, ClusterProfile):
            return
        is_file = isinstance(given, Path) or (isinstance(given, str) and given.endswith(".json"))
        call = "preset('8xH100')"
        if isinstance(given, str | Path):
            call = f"load({str(given)!r})" if is_file else f"preset({given!r})"
        raise ProfileError(
            f"cluster_profile is {_shown(given)}, not a ClusterProfile; pass "
            f"ClusterProfile.{call}, or load a file that `galvatron-compile profile` wrote"
        )

    def _check_plan(self) -> None:
        if self.plan is not None and not isinstance(self.plan, Plan | str | Path):
            raise PlanError(
                f"plan is {_shown(self.plan)}; pass a Plan, the path of a saved one, or notation "
                "such as 'tp2.dp2.zero3', or leave it out to search one"
            )

    def _check_loss(self) -> None:
        if self.loss_fn is None:
            return
        if not callable(self.loss_fn):
            raise GalvatronError(
                f"loss_fn is {_shown(self.loss_fn)}; pass a function loss_fn(outputs, batch) that "
                "returns a scalar tensor"
            )
        called: Callable[..., object] = self.loss_fn
        if isinstance(called, torch.nn.Module):
            called = called.forward
        try:
            signature = inspect.signature(called)
        except ValueError:  # written in C, without a signature: the call will tell
            return
        try:
            signature.bind("outputs", "batch")
        except TypeError as error:
            raise GalvatronError(
                f"loss_fn takes {signature}, but is called loss_fn(outputs, batch) with what the "
                f"model returns and the whole batch ({error}); wrap it in a function of these two"
            ) from error

    def _check_numbers(self) -> None:
        if self.fuse not in ("auto", "always", "never"):
            raise GalvatronError(f"fuse is {_shown(self.fuse)}; pass 'auto', 'always' or 'never'")
        if not isinstance(self.seed, int):
            raise GalvatronError(f"seed is {_shown(self.seed)}; pass a whole number")
        size = self.global_batch_size
        if size is not None and (not _is_whole(size) or size < 1):
            raise ShapeError(
                f"global_batch_size is {_shown(size)}; give the number of samples of one optimizer "
                "step over all ranks, a whole number of at least 1"
            )
        limit = self.memory_bytes
        if limit is not None and (not _is_whole(limit) or limit < 1):
            raise InfeasibleError(
                f"memory_bytes is {_shown(limit)}; give the bytes that a rank may use as a whole "
                "number, or leave it out to use the memory of the profile's device"
            )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A number or a text as it is written, a class by its name, of anything else the type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, int | float | str | Path):
        return repr(value)
    return f"a {type(value).__name__}"
