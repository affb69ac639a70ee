"""What a user trains: a stage program, the batch it is given, and the gradients that come out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from galvatron_compile.batches import check_batch, flatten_batch, split_batch, take_share
from galvatron_compile.errors import NonFiniteLossError, PeerError
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.seeds import mix
from galvatron_compile.states import States
from galvatron_compile.unit_schedule import UnitSchedule

if TYPE_CHECKING:
    from galvatron_compile.contents import Contents
    from galvatron_compile.program import StageProgram
    from galvatron_compile.search_report import SearchReport


class ParallelModel:
    """One rank's part of a model that trains on ``plan.world_size`` ranks.

    program: what this rank runs.
    precision: as the program's units were made.
    device: where batches go; None: where the units are.
    seed: of all random operators; the same on every rank.
    search: what the searcher found, printable; None if the plan was given.
    contents: names of the model's own state dict, and what its forward does not use of it.
    """

    def __init__(
        self,
        program: StageProgram,
        precision: Precision,
        *,
        device: torch.device | None = None,
        seed: int = 0,
        search: SearchReport | None = None,
        contents: Contents | None = None,
    ) -> None:
        self._program, self._precision, self._seed = program, precision, seed
        self.search = search
        plan = program.plan
        self._world_size, self._rank = program.mesh.world_size, program.mesh.rank
        self._share_ranks = self._world_size // plan.data_size  # ranks that hold one share
        self._loss_tp = plan.strategies[-1].tp
        found = program.units[0].device if program.units else torch.device("cpu")
        self._device = device or found
        self._schedule = UnitSchedule(program.units)
        self._contents = contents
        held = (program.units, program.buffers, program.tied, contents)
        self._states = States(*held, unloaded=program.unloaded, device=self._device)
        self.num_steps = 0  # done so far; part of the seed of random operators

    # The batch.

    @property
    def plan(self) -> Plan:
        return self._program.plan

    @property
    def data_size(self) -> int:
        """In how many shares a global batch is loaded; for samplers."""
        return self.plan.data_size

    @property
    def data_rank(self) -> int:
        """Which share this rank loads; tensor-parallel peers load the same one."""
        return self._rank // self._share_ranks

    def local_batch(self, global_batch: Any) -> Any:
        """This rank's share of a batch that every rank holds whole, in the same structure."""
        return take_share(global_batch, self._program.inputs, self.data_rank, self.data_size)

    # Training.

    def step(self, batch: Any) -> torch.Tensor:
        """Forward, backward and gradient synchronisation of this rank's share of a batch.

        Returns the mean loss of the global batch, a scalar equal on every rank. Gradients are
        added to what ``parameters()`` already hold. Every rank must call it.

        Raises:
            ShapeError: the batch does not fit; the other ranks raise PeerError.
            NonFiniteLossError: on every rank; gradients of this step are dropped.
            GalvatronError: parameters or buffers were never given values.
        """
        self._states.check_loaded()
        micro_batches, denominators = self._prepare(batch)
        schedule = self._schedule
        schedule.begin()
        total: torch.Tensor | None = None
        work: dist.Work | None = None
        for number, leaves in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            schedule.begin_micro_batch(last=last)
            seed = mix(self._seed, self.num_steps, number)
            (loss,) = self._program.module(*leaves, *denominators, seed)
            total = self._add(total, loss)
            if last:  # travels while backward runs
                work = self._launch_sum(total)
            if loss.requires_grad:
                loss.backward()
            schedule.end_micro_batch()
        schedule.finish()
        assert total is not None
        if work is not None:
            work.wait()
        self.num_steps += 1
        value = total.item()
        if not math.isfinite(value):
            schedule.drop()
            raise NonFiniteLossError(
                f"the loss of step {self.num_steps} is {value}; its gradients were dropped, "
                "parameters and optimizer state are untouched. Lower the learning rate, or look "
                "at this batch"
            )
        schedule.commit()
        return total.to(loss.dtype)

    @torch.no_grad()
    def evaluate(self, batch: Any) -> torch.Tensor:
        """The mean loss of the global batch, without dropout and without gradients."""
        self._states.check_loaded()
        micro_batches, denominators = self._prepare(batch)
        self._schedule.begin()
        total: torch.Tensor | None = None
        for leaves in micro_batches:
            (loss,) = self._program.evaluation(*leaves, *denominators, 0)
            total = self._add(total, loss)
        self._schedule.release()
        assert total is not None
        work = self._launch_sum(total)
        if work is not None:
            work.wait()
        return total.to(loss.dtype)

    def _add(self, total: torch.Tensor | None, loss: torch.Tensor) -> torch.Tensor:
        """Sum of local losses in float64; ranks along the tensor axis count once."""
        local = loss.detach().double()
        if self._rank % self._loss_tp:
            local = torch.zeros_like(local)
        return local.clone() if total is None else total + local

    def _launch_sum(self, total: torch.Tensor) -> dist.Work | None:
        return dist.all_reduce(total, async_op=True) if self._world_size > 1 else None

    def _prepare(self, batch: Any) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
        """Micro-batches, and the loss's weights summed over them and over the data axis.

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
        sums = torch.zeros(count + self._world_size, dtype=torch.float64, device=self._device)
        if error is not None:
            sums[count + self._rank] = 1
        elif local and self._rank % self._share_ranks == 0:
            sums[:count] = torch.stack([value.double() for value in local])
        if self._world_size > 1:
            dist.all_reduce(sums)
        self._raise_together(error, sums[count:])
        return micro_batches, [sums[index].to(value.dtype) for index, value in enumerate(local)]

    def _micro_batches(self, batch: Any) -> list[list[torch.Tensor]]:
        inputs, plan = self._program.inputs, self.plan
        leaves = check_batch(
            flatten_batch(batch, inputs),
            inputs,
            plan.global_batch_size // plan.data_size,
            self._precision,
            self._device,
        )
        return split_batch(leaves, inputs.batch_dims, plan.num_micro_batches)

    def _num_denominators(self) -> int:
        if self._program.denominators is None:
            return 0
        (output,) = self._program.denominators.graph.find_nodes(op="output")
        return len(output.args[0])

    @torch.no_grad()
    def _local_denominators(self, micro_batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if self._program.denominators is None:
            return []
        each = [self._program.denominators(*leaves) for leaves in micro_batches]
        return [torch.stack(list(values)).sum(0) for values in zip(*each, strict=True)]

    def _raise_together(self, error: Exception | None, flags: torch.Tensor) -> None:
        failed = torch.nonzero(flags).flatten().tolist()
        if not failed:
            return
        message = [f"{type(error).__name__}: {error}"]
        if self._world_size > 1:
            dist.broadcast_object_list(message, src=failed[0], device=self._device)
        if error is not None:
            raise error
        raise PeerError(f"rank {failed[0]} failed: {message[0]}")

    # Parameters and gradients.

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parts of the parameters under their original names, tied ones once."""
        for entry in self._states.entries:
            yield entry.name, entry.master

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """What an optimizer takes: fp32 masters under mixed precision, shards under ZeRO."""
        for _, master in self.named_parameters():
            yield master

    def zero_grad(self, set_to_none: bool = True) -> None:
        for master in self.parameters():
            if set_to_none:
                master.grad = None
            elif master.grad is not None:
                master.grad.zero_()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their global 2-norm is at most ``max_norm``.

        Returns the norm before, equal on every rank. Every element counts once, however many
        ranks hold it. As ``torch.nn.utils.clip_grad_norm_``.
        """
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        gradients = []
        for entry in self._states.entries:
            gradient = entry.master.grad
            if gradient is None:
                continue
            gradients.append(gradient)
            if entry.layout.is_owner(self._rank) and gradient.numel():
                square += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        if self._world_size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    # Checkpoints.

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For torch.distributed.checkpoint: DTensors and buffers under the original names.

        Plain tensors in a job of one process. Collective where a layout must be converted.
        """
        return self._states.sharded()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a dict from :meth:`state_dict` that a checkpoint filled. GalvatronError by name.

        It may hold buffers besides that the model's state dict leaves out, the same on every rank.
        """
        self._states.load_sharded(state)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's own state dict, on the CPU of rank 0; {} elsewhere. Every rank calls it."""
        return self._states.full()

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by name, on the CPU of rank 0; {} elsewhere. Every rank calls it."""
        return self._states.full_gradients()

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Take whole tensors from rank 0 (what other ranks pass is not read); all ranks call it.

        state: all of the model's own state dict, and any of the buffers that it leaves out.

        Raises GalvatronError on every rank, by name, if something is missing, unexpected, of
        another shape, or tied and unequal.
        """
        self._states.load_full(state)

    # Texts.

    def report(self) -> str:
        """The candidates if there was a search, the plan, what was not split, what not trained."""
        parts = [str(self.search)] if self.search is not None else []
        remarks = (*self._program.remarks, *(self._contents.remarks if self._contents else ()))
        parts += [str(self.plan), *(f"remark: {text}" for text in remarks)]
        return "\n\n".join(parts)

    def print_program(self) -> None:
        """Print what this rank runs: every node with its collectives."""
        print(self._program)
