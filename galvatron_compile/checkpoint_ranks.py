"""The ranks that save or load a checkpoint together, and how they fail together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from galvatron_compile.errors import CheckpointError, PeerError
from galvatron_compile.torch_private import group_timeout

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """All ranks of the job, who talk over ``group`` (None: the default one, or one process)."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of_job() -> Ranks:
        if not dist.is_initialized():
            return Ranks(0, 1)
        return Ranks(dist.get_rank(), dist.get_world_size())

    def with_own_group(self) -> Ranks:
        """The same over a new gloo group, for a thread beside training; collective.

        It waits for a lost rank as long as the default group does.
        """
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=group_timeout())
        return Ranks(self.rank, self.world_size, group)

    def each(self, step: Callable[[], T]) -> list[T]:
        """What ``step`` gave on every rank; if it fails on any, CheckpointError on all."""
        result, error = _attempt(step)
        outcomes: list[Any] = [(_text(error), result)]
        if self.world_size > 1:
            outcomes = [None] * self.world_size
            with peers_alive():
                dist.all_gather_object(outcomes, (_text(error), result), group=self.group)
        _raise([text for text, _ in outcomes], error)
        return [value for _, value in outcomes]

    def own(self, step: Callable[[], T]) -> T:
        """As :meth:`each`, but a rank is given its own result only, which does not travel."""
        results: list[T] = []
        self.each(lambda: results.append(step()))
        return results[0]

    def first(self, step: Callable[[], T]) -> T:
        """What ``step`` gave on rank 0, where alone it runs; if it fails, as :meth:`each`."""
        result, error = _attempt(step) if self.rank == 0 else (None, None)
        message: list[Any] = [_text(error), result]
        if self.world_size > 1:
            with peers_alive():
                dist.broadcast_object_list(message, src=0, group=self.group)
        _raise([message[0]], error)
        return message[1]  # type: ignore[no-any-return]


def _attempt(step: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return step(), None
    except Exception as error:  # raised by _raise, once the other ranks know
        return None, error


def _raise(texts: list[str | None], own: Exception | None) -> None:
    """CheckpointError with what the ranks say, by rank unless they all say the same."""
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if not failed:
        return
    alike = len(failed) == len(texts) and len({text for _, text in failed}) == 1
    described = [text if alike else f"rank {rank}: {text}" for rank, text in failed]
    raise CheckpointError(described[0] if alike else "; ".join(described[:3])) from own


def _text(error: Exception | None) -> str | None:
    if error is None or isinstance(error, CheckpointError):
        return str(error) if error else None
    return f"{type(error).__name__}: {error}"


@contextmanager
def peers_alive() -> Iterator[None]:
    """PeerError where torch.distributed lost a rank, or waited for one too long."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"another rank of the job has ended or does not answer ({_first_line(error)}); no "
            "checkpoint was written or read. Restart the job from the last one"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
