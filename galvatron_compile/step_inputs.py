"""From the batch that a rank is given to what its program reads in a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from galvatron_compile.batches import check_batch, flatten_batch, split_batch
from galvatron_compile.errors import PeerError
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageProgram


class StepInputs:
    """Checks a rank's share of a batch, cuts it into micro-batches, and weighs them."""

    def __init__(self, program: StageProgram, precision: Precision) -> None:
        self.program, self.precision, self.mesh = program, precision, program.mesh
        self.share_ranks = program.mesh.group_size // program.plan.data_size

    def read(self, batch: Any) -> list[dict[str, torch.Tensor]]:
        """Micro-batches by name, and the loss's weights summed over them and the data axis.

        The sum also tells every rank whether all batches were good.
        """
        micro_batches: list[list[torch.Tensor]] = []
        local: list[torch.Tensor] = []
        error: Exception | None = None
        try:
            micro_batches = self._micro_batches(batch)
            local = self._local_denominators(micro_batches)
        except Exception as caught:  # raised again once the other ranks know
            error = caught
        count = self._num_denominators()
        size, device = count + self.mesh.world_size, self.program.device
        sums = torch.zeros(size, dtype=torch.float64, device=device)
        if error is not None:
            sums[count + self.mesh.rank] = 1
        elif local and self.mesh.group == 0 and self.mesh.position % self.share_ranks == 0:
            sums[:count] = torch.stack([value.double() for value in local])
        if self.mesh.world_size > 1:
            dist.all_reduce(sums)
        self._raise_together(error, sums[count:])
        names = self.program.inputs.names
        weights = {
            f"denominator_{index}": sums[index].to(value.dtype) for index, value in enumerate(local)
        }
        # Contiguous, as layers were traced: a cut along another dim than the first is not.
        whole = [[leaf.contiguous() for leaf in leaves] for leaves in micro_batches]
        return [dict(zip(names, leaves, strict=True)) | weights for leaves in whole]

    def _micro_batches(self, batch: Any) -> list[list[torch.Tensor]]:
        inputs, plan = self.program.inputs, self.program.plan
        leaves = check_batch(
            flatten_batch(batch, inputs),
            inputs,
            plan.global_batch_size // plan.data_size,
            self.precision,
            self.program.device,
        )
        return split_batch(leaves, inputs.batch_dims, plan.num_micro_batches)

    def _num_denominators(self) -> int:
        if self.program.denominators is None:
            return 0
        (output,) = self.program.denominators.graph.find_nodes(op="output")
        return len(output.args[0])

    @torch.no_grad()
    def _local_denominators(self, micro_batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if self.program.denominators is None:
            return []
        each = [self.program.denominators(*leaves) for leaves in micro_batches]
        return [torch.stack(list(values)).sum(0) for values in zip(*each, strict=True)]

    def _raise_together(self, error: Exception | None, flags: torch.Tensor) -> None:
        failed = torch.nonzero(flags).flatten().tolist()
        if not failed:
            return
        message = [f"{type(error).__name__}: {error}"]
        if self.mesh.world_size > 1:
            dist.broadcast_object_list(message, src=failed[0], device=self.program.device)
        if error is not None:
            raise error
        raise PeerError(f"rank {failed[0]} failed: {message[0]}")
