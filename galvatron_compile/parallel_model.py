"""What a user trains: a stage program, the batch it is given, and the gradients that come out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from galvatron_compile.batches import take_share
from galvatron_compile.errors import NonFiniteLossError
from galvatron_compile.executor import Executor, Recorder, run_plainly
from galvatron_compile.fusions import Fusions
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.lost_peers import lost_peers
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.seeds import mix
from galvatron_compile.states import States
from galvatron_compile.step_inputs import StepInputs
from galvatron_compile.symmetric import look_at_peers

if TYPE_CHECKING:
    from galvatron_compile.contents import Contents
    from galvatron_compile.lowered import LoweredProgram
    from galvatron_compile.recordings import Recordings
    from galvatron_compile.search_report import SearchReport


class ParallelModel:
    """One rank's part of a model that trains on ``plan.world_size`` ranks.

    lowered: what this rank runs, and the list of actions that it obeys.
    precision: as the program's units were made.
    device: where batches go; None: where the units are.
    seed: of all random operators; the same on every rank.
    search: what the searcher found, printable; None if the plan was given.
    contents: names of the model's own state dict, and what its forward does not use of it.
    fusions: what the fuse pass replaced and what it declined, printable.
    """

    def __init__(
        self,
        lowered: LoweredProgram,
        precision: Precision,
        *,
        seed: int = 0,
        search: SearchReport | None = None,
        contents: Contents | None = None,
        fusions: Fusions | None = None,
    ) -> None:
        self._lowered, self._program = lowered, lowered.program
        self._precision, self.seed = precision, seed
        self.search, self.fusions = search, fusions or Fusions()
        program, plan, mesh = lowered.program, lowered.program.plan, lowered.program.mesh
        self._world_size, self._rank = mesh.world_size, mesh.rank
        self._position, self._group = mesh.position, mesh.group
        self._share_ranks = mesh.group_size // plan.data_size  # ranks that hold one share
        self._loss_tp = plan.strategies[-1].tp
        self._device = program.device
        self._executor = Executor(program, lowered.pieces)
        self._inputs = StepInputs(program, precision)
        self._contents = contents
        held = (program.units, program.buffers, program.tied, contents)
        self.states = States(
            *held,
            unloaded=program.unloaded,
            device=self._device,
            layouts=program.layouts,
            num_groups=plan.pp,
        )
        self._nothing = torch.nn.Parameter(torch.empty(0, device=self._device))
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
        """Which share this rank loads; tensor-parallel peers and other stages load the same one."""
        return self._position // self._share_ranks

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
        PeerError: another rank died or hangs; raised when its connection closes, or after the
            process group's timeout.
            GalvatronError: parameters or buffers were never given values.
        """
        return self.step_recorded(batch, run_plainly)

    def step_recorded(self, batch: Any, recorder: Recorder) -> torch.Tensor:
        """:meth:`step` whose actions are run by ``recorder(action, run)``."""
        self.states.check_loaded()
        with lost_peers(f"step {self.num_steps + 1}"):
            look_at_peers(self._program.mesh)
            return self._step(batch, recorder)

    def _step(self, batch: Any, recorder: Recorder) -> torch.Tensor:
        inputs = self._inputs.read(batch)
        seeds = [mix(self.seed, self.num_steps, number) for number in range(len(inputs))]
        sums: list[dist.Work | None] = []
        total = torch.zeros((), dtype=torch.float64, device=self._device)

        def travels(losses: list[torch.Tensor]) -> None:
            """The sum over ranks starts as soon as all losses are known, while backward runs."""
            total.add_(self._counted(losses))
            sums.append(self._launch_sum(total))

        self._executor.train(self._lowered.training, inputs, seeds, recorder, travels)
        if not sums:
            sums.append(self._launch_sum(total))
        for work in sums:
            if work is not None:
                work.wait()
        self.num_steps += 1
        value = total.item()
        if not math.isfinite(value):
            for unit in self._program.units:
                unit.drop()
            raise NonFiniteLossError(
                f"the loss of step {self.num_steps} is {value}; its gradients were dropped, "
                "parameters and optimizer state are untouched. Lower the learning rate, or look "
                "at this batch"
            )
        for unit in self._program.units:
            unit.commit()
        return total.to(self._lowered.loss_dtype)

    @torch.no_grad()
    def evaluate(self, batch: Any) -> torch.Tensor:
        """The mean loss of the global batch, without dropout and without gradients."""
        self.states.check_loaded()
        with lost_peers("evaluation"):
            losses = self._executor.evaluate(self._lowered.evaluation, self._inputs.read(batch))
            total = self._counted(losses)
            work = self._launch_sum(total)
            if work is not None:
                work.wait()
        return total.to(self._lowered.loss_dtype)

    def profile(
        self,
        batch: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        warm_up: int = 2,
        repetitions: int = 3,
    ) -> Recordings:
        """Time and memory of every action of a real step on all ranks; every rank must call it.

        See :func:`galvatron_compile.recording.profile`; ``galvatron-compile explain --trace`` lays
        what it gives beside what was predicted.
        """
        from galvatron_compile.recording import profile

        return profile(
            self, batch, optimizer=optimizer, warm_up=warm_up, repetitions=repetitions
        )

    def _counted(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Sum of local losses in float64; ranks along the tensor axis count once."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        if self._position % self._loss_tp == 0:
            for loss in losses:
                total += loss.double()
        return total

    def _launch_sum(self, total: torch.Tensor) -> dist.Work | None:
        return dist.all_reduce(total, async_op=True) if self._world_size > 1 else None

    # Parameters and gradients.

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parts of the parameters under their original names, tied ones once."""
        for entry in self.states.entries:
            yield entry.name, entry.master

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """What an optimizer takes: fp32 masters under mixed precision, shards under ZeRO.

        On ranks whose stage has no parameters one without elements, so that an optimizer can be
        made on every rank.
        """
        masters = [master for _, master in self.named_parameters()]
        yield from masters or [self._nothing]

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
        for entry in self.states.entries:
            gradient = entry.master.grad
            if gradient is None:
                continue
            gradients.append(gradient)
            if self._counts(entry.name, entry.layout) and gradient.numel():
                square += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        if self._world_size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    def _counts(self, name: str, layout: ParameterLayout) -> bool:
        """Whether this rank is the one of all that hold an element that counts it."""
        return self._program.layouts[name][0] == self._group and layout.is_owner(self._position)

    # Checkpoints.

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For torch.distributed.checkpoint: DTensors and buffers under the original names.

        Plain tensors in a job of one process. Collective where a layout must be converted.
        """
        return self.states.sharded()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a dict from :meth:`state_dict` that a checkpoint filled. GalvatronError by name.

        It may hold buffers besides that the model's state dict leaves out, the same on every rank.
        """
        self.states.load_sharded(state)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's own state dict, on the CPU of rank 0; {} elsewhere. Every rank calls it."""
        return self.states.full()

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by name, on the CPU of rank 0; {} elsewhere. Every rank calls it."""
        return self.states.full_gradients()

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Take whole tensors from rank 0 (what other ranks pass is not read); all ranks call it.

        state: all of the model's own state dict, and any of the buffers that it leaves out.

        Raises GalvatronError on every rank, by name, if something is missing, unexpected, of
        another shape, or tied and unequal.
        """
        self.states.load_full(state)

    # Texts.

    def report(self) -> str:
        """The candidates if there was a search, the plan, what was not split, what not trained."""
        parts = [str(self.search)] if self.search is not None else []
        remarks = (*self._program.remarks, *self._lowered.remarks)
        if self._contents is not None:
            remarks += self._contents.remarks
        parts += [str(self.plan), *(f"remark: {text}" for text in remarks)]
        return "\n\n".join(parts)

    def print_program(self) -> None:
        """Print what this rank runs: every node with its collectives, then its list of actions."""
        print(self._lowered)
