"""What the ranks do together: time steps, train for a while, compare with one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.demo.data import Text
from galvatron_compile.demo.memory import peak_bytes
from galvatron_compile.demo.model import Deviation, deviation
from galvatron_compile.parallel_model import ParallelModel

NUM_WARM_UP = 3
NUM_PROBED = 5


@dataclass(frozen=True)
class Task:
    """What is trained on: windows of ``length`` bytes, ``batch_size`` of them in a global batch."""

    text: Text
    batch_size: int
    length: int
    learning_rate: float = 2e-3

    def batch(self, step: int) -> dict[str, Tensor]:
        return self.text.batch(step, self.batch_size, self.length)


@dataclass
class Trainer:
    """One rank's training run. losses: the global mean loss of every step; times_ms: its time."""

    parallel: ParallelModel
    task: Task
    losses: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.parallel.parameters(), lr=self.task.learning_rate, weight_decay=0.01
        )

    def step(self) -> float:
        """One optimizer step on the next batch; the time leaves out making the batch."""
        batch = self.parallel.local_batch(self.task.batch(len(self.losses)))
        start = time.perf_counter()
        loss = float(self.parallel.step(batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times_ms.append((time.perf_counter() - start) * 1e3)
        self.losses.append(loss)
        return loss

    def train(self, seconds: float, on_step: Callable[[int, int, float], None]) -> None:
        """About ``seconds`` of steps; ``on_step(done, total, loss)`` after each."""
        for _ in range(NUM_WARM_UP + NUM_PROBED):
            on_step(0, 0, self.step())
        total = self.num_steps(seconds)
        while len(self.losses) < total:
            on_step(len(self.losses), total, self.step())

    def num_steps(self, seconds: float) -> int:
        """Steps that ``seconds`` allow, as the slowest rank sees it: all ranks must agree."""
        slowest = torch.tensor([self.step_ms])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return max(len(self.losses), int(seconds * 1e3 / float(slowest)))

    @property
    def step_ms(self) -> float:
        """Median over the steps after warm-up."""
        return statistics.median(self.times_ms[NUM_WARM_UP:] or self.times_ms)

    def peak_bytes(self) -> int:
        """The most bytes of tensors that any rank holds during a step."""
        peak = torch.tensor([peak_bytes(self.step, exclude=[self.task.text.tokens])])
        self.times_ms.pop()  # counting storages makes this step slow
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return int(peak)

    def deviation(self, *, first: bool) -> Deviation | None:
        """Loss and gradients of one batch against one process with the same weights, on rank 0.

        ``first``: the weights are still those that the model was made with.
        """
        batch = self.task.batch(1_000_000)
        state = None if first else self.parallel.full_state_dict()
        loss = float(self.parallel.step(self.parallel.local_batch(batch)))
        gradients = self.parallel.full_gradients()
        self.optimizer.zero_grad()
        found = None
        if dist.get_rank() == 0:
            found = deviation(state, batch, loss, gradients)
        dist.barrier()  # the reference takes the cores: nobody measures meanwhile
        return found


def measure_step_ms(parallel: ParallelModel, task: Task, num_steps: int = 8) -> float:
    """Median time of a step of another plan, optimizer included."""
    trainer = Trainer(parallel, task)
    for _ in range(NUM_WARM_UP + num_steps):
        trainer.step()
    return trainer.step_ms
