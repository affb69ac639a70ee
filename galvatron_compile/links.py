"""What travels between neighbouring pipeline stages of one rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.program import Crossing

_Key = tuple[str, int, int]  # direction, the stage that the cut lies behind, micro-batch


class Links:
    """Sends and receives over the cuts of one rank's stages.

    A cut is named by the stage before it; activations go over it forward, gradients backward.
    Sent tensors are held until they have left; nothing waits for that but :meth:`finish`, so no
    order of actions can make two ranks wait for each other's sends.
    """

    def __init__(self, mesh: Mesh, num_stages: int) -> None:
        self.mesh, self.num_stages = mesh, num_stages
        self._arriving: dict[_Key, list[tuple[Tensor, dist.Work | None]]] = {}
        self._leaving: deque[tuple[Tensor, dist.Work]] = deque()

    def receive(
        self,
        direction: str,
        cut: int,
        micro_batch: int,
        crossings: Sequence[Crossing],
        device: torch.device,
    ) -> None:
        """Make room and start to receive."""
        axis = self.mesh.link(direction, cut)
        source = self._peer(axis, cut if direction == "activations" else cut + 1)
        arriving = []
        for crossing in crossings:
            target = torch.empty(crossing.shape, dtype=crossing.dtype, device=device)
            work = dist.irecv(_bytes(target), src=source, group=axis.group)
            arriving.append((target, work))
        self._arriving[direction, cut, micro_batch] = arriving

    def wait(self, direction: str, cut: int, micro_batch: int) -> list[Tensor]:
        """What was received, in order."""
        found = []
        for target, work in self._arriving.pop((direction, cut, micro_batch)):
            if work is not None:
                work.wait()
            found.append(target)
        return found

    def send(self, direction: str, cut: int, values: Sequence[Tensor]) -> None:
        """Start to send, in order."""
        while self._leaving and self._leaving[0][1].is_completed():
            self._leaving.popleft()
        axis = self.mesh.link(direction, cut)
        target = self._peer(axis, cut + 1 if direction == "activations" else cut)
        for tensor in values:
            value = tensor.detach().contiguous()
            work = dist.isend(_bytes(value), dst=target, group=axis.group)
            if work is not None:
                self._leaving.append((value, work))

    def finish(self) -> None:
        while self._leaving:
            self._leaving.popleft()[1].wait()

    def _peer(self, axis: Axis, stage: int) -> int:
        return axis.ranks[stage % self.mesh.pp]


def _bytes(value: Tensor) -> Tensor:
    """Booleans travel as bytes: not every backend sends them."""
    return value.view(torch.uint8) if value.dtype is torch.bool else value
