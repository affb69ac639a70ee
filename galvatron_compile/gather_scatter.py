"""All-gather and reduce-scatter of one flat buffer: one name on every torch version, and on the CPU
a reduce-scatter that moves no more than it must.

gloo reduces a whole copy of the buffer on every rank and hands out a part (torch 2.11 to 2.13:
two to six times as long as to send the parts, bench/LOG.md). So on the CPU the parts are exchanged
and every rank sums its own: (n - 1) / n of the buffer leaves a rank, as in a ring, and sums of
16-bit numbers are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two and warns at every call of the old names.
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Waitable(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


def all_gather(output: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> Waitable:
    """Start to write every rank's ``part``, ``[k]``, one behind the other to ``output``, ``[n k]``.

    The caller keeps both, and leaves them alone, until it has waited.
    """
    return _gather(output, part, group=group, async_op=True)  # type: ignore[no-any-return]


def reduce_scatter(output: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> Waitable:
    """Start to write the SUM over ranks of this rank's part of ``whole``, ``[n k]``, to ``output``,
    ``[k]``. What is returned keeps ``whole`` until it has been waited for."""
    if whole.device.type == "cpu":
        return _Exchange(output, whole, group)
    work: dist.Work = _scatter(output, whole, group=group, async_op=True)
    return _Kept(work, whole)


class _Kept:
    """A reduce-scatter of the backend's own, and its input."""

    def __init__(self, work: dist.Work, whole: Tensor) -> None:
        self.work, self.whole = work, whole

    def wait(self) -> None:
        self.work.wait()
        del self.whole


class _Exchange:
    """Every rank's part to its rank; the sum is made by who waits.

    By sends and receives: gloo's all-to-all takes half as long again where calls follow each other
    on a slow link (bench/LOG.md).
    """

    def __init__(self, output: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)  # type: ignore[arg-type]
        n, me = len(ranks), dist.get_rank(group)
        parts = whole.view(n, -1)
        self.output, self.parts, self.me = output.view(-1), parts, me
        self.received = whole.new_empty((n - 1, parts.shape[1]))
        self.works: list[dist.Work | None] = []
        for step in range(1, n):
            source = ranks[(me - step) % n]
            self.works.append(dist.irecv(self.received[step - 1], source, group=group))
        for step in range(1, n):
            target = (me + step) % n
            self.works.append(dist.isend(parts[target], ranks[target], group=group))

    def wait(self) -> None:
        for work in self.works:
            assert work is not None
            work.wait()
        everyone = [self.parts[self.me], *self.received]  # one rounding for 16-bit numbers
        wide = torch.float32 if self.output.dtype.itemsize == 2 else self.output.dtype
        if wide == self.output.dtype:
            torch.add(everyone[0], everyone[1], out=self.output)
            for part in everyone[2:]:
                self.output.add_(part)
        else:
            self.output.copy_(torch.stack(everyone).sum(0, dtype=wide))
        del self.works, self.parts, self.received
