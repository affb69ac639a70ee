"""All-gather and reduce-scatter of one flat buffer: one name on every torch version, and on the CPU
ones that copy no more than they must.

gloo gathers into memory of its own and copies from there, and to reduce and scatter it reduces a
whole copy of the buffer on every rank (torch 2.11 to 2.13: half as long again, two to six times as
long as to send the parts, bench/LOG.md). So on the CPU parts go from rank to rank: (n - 1) / n of
the buffer leaves a rank, as in a ring, and sums of 16-bit numbers are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    if part.device.type == "cpu":
        part, parts = part.detach(), output.detach().view(dist.get_world_size(group), -1)
        mine = parts[dist.get_rank(group)]
        if mine.data_ptr() != part.data_ptr():
            mine.copy_(part)
        return _Messages([part] * len(parts), list(parts), group)
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


class _Messages:
    """A message to and one from every other rank of ``group``.

    sent, received: by the other's number in the group, what to send and where to write.

    They are started on a thread of their own: while gloo reads or writes a connection it holds its
    lock, and who starts the next message waits for milliseconds (bench/LOG.md). One thread, so that
    messages of two ranks start in the order in which all ranks ask for them.
    """

    _starter = ThreadPoolExecutor(1, thread_name_prefix="galvatron-messages")

    def __init__(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup | None
    ) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)  # type: ignore[arg-type]
        n, me = len(ranks), dist.get_rank(group)
        others = [(me + step) % n for step in range(1, n)]  # not all to the same one at first

        def start() -> list[dist.Work | None]:
            works = [dist.irecv(received[k], ranks[k], group=group) for k in reversed(others)]
            return works + [dist.isend(sent[k], ranks[k], group=group) for k in others]

        self.started = self._starter.submit(start)

    def wait(self) -> None:
        for work in self.started.result():
            assert work is not None
            work.wait()


class _Exchange:
    """Every rank's part to its rank; the sum, in the order of ranks, is made by who waits.

    By messages: gloo's all-to-all takes half as long again where calls follow each other on a slow
    link (bench/LOG.md).
    """

    def __init__(self, output: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> None:
        n, me = dist.get_world_size(group), dist.get_rank(group)
        parts = whole.detach().view(n, -1)
        self.output = output.view(-1)
        self.everyone = list(whole.new_empty((n - 1, parts.shape[1])))
        self.everyone.insert(me, parts[me])
        self.messages = _Messages(list(parts), self.everyone, group)

    def wait(self) -> None:
        self.messages.wait()
        everyone = self.everyone
        wide = torch.float32 if self.output.dtype.itemsize == 2 else self.output.dtype
        if wide == self.output.dtype:
            torch.add(everyone[0], everyone[1], out=self.output)
            for part in everyone[2:]:
                self.output.add_(part)
        else:  # one rounding for 16-bit numbers
            self.output.copy_(torch.stack(everyone).sum(0, dtype=wide))
        del self.messages, self.everyone
