"""The processes that train together, and how they fail together."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

from galvatron_compile.errors import PeerError, PlanError
from galvatron_compile.seats import Seat, shared_cores
from galvatron_compile.work import Cores

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """This process's place in the training job, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @staticmethod
    def current(model: torch.nn.Module) -> Job:
        """The default process group if there is one, else a job of one process.

        Under torchrun the group is made if it is not there yet, see :func:`join`.
        """
        device = join()
        if not dist.is_initialized():
            return Job(0, 1, _device_of(model))
        return Job(dist.get_rank(), dist.get_world_size(), device)

    def together(self, step: Callable[[], T], *, same: Callable[[T], str] | None = None) -> T:
        """Run ``step`` on every rank; if it fails on any, raise on all.

        ``step`` must not communicate. The failing rank raises its own error, the others PeerError.
        ``same`` gives a text that must be equal on all ranks, for what would otherwise diverge in
        silence; PlanError if it is not.
        """
        results: list[T] = []

        def run() -> str | None:
            results.append(step())
            return same(results[0]) if same else None

        self._check_same(self.everyone(run))
        return results[0]

    def everyone(self, step: Callable[[], T]) -> list[T]:
        """What ``step`` gave on every rank, on every rank; if it fails on any, raise on all."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = step()
        except Exception as caught:  # raised again once the other ranks know
            error = caught
        outcomes = self.gather((f"{type(error).__name__}: {error}" if error else None, result))
        if error is not None:
            raise error
        for rank, (failure, _) in enumerate(outcomes):
            if failure is not None:
                raise PeerError(f"rank {rank} failed: {failure}")
        return [value for _, value in outcomes]  # type: ignore[misc]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def cores(self) -> tuple[Cores, ...]:
        """Of every rank the cores it uses; () on GPUs and where none has to share. Collective."""
        if self.device.type != "cpu" or self.world_size == 1:
            return ()
        return shared_cores(self.everyone(Seat.own))

    def _check_same(self, texts: list[str | None]) -> None:
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise PlanError(
                    f"rank {rank} differs from rank 0: {text!r} against {texts[0]!r}; give every "
                    "rank the same model, example shapes, cluster profile and arguments"
                )


def join() -> torch.device:
    """Be in the default process group, if this is a job of several processes; the rank's device.

    Under torchrun without ``init_process_group`` the group is made here: NCCL where every rank
    has a GPU, gloo otherwise. It then stays until the process ends. Made, destroyed and made
    again, it would find the addresses of the first in torchrun's store, where both go by the same
    name, and now and then connect to a socket that is gone: an error, or a wait without end.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local
    if dist.is_initialized():
        use_gpu = "nccl" in str(dist.get_backend())
    device = torch.device("cpu")
    if use_gpu:
        index = os.environ.get("LOCAL_RANK", torch.cuda.current_device())
        device = torch.device("cuda", int(index))
        torch.cuda.set_device(device)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if use_gpu else "gloo")
        atexit.register(_leave)
    if dist.is_initialized():
        _settle_at_exit()
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _settle_at_exit() -> None:
    """Give gloo's threads a moment before the interpreter ends.

    A thread that has just finished a collective may still have to drop Python objects that autograd
    gave it. Asking for the interpreter's lock once that is shutting down, it aborts the process
    (torch 2.13, one short run in eight); while the main thread sleeps, it gets the lock.
    """
    atexit.register(time.sleep, 0.1)


def _device_of(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None or first.device.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return first.device
