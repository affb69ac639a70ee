"""One measured training run, and what it says in our terms: a shape, a cluster and a plan."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

from galvatron_compile import notation
from galvatron_compile.errors import PlanError
from galvatron_compile.models.shape import DecoderShape
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.presets import GPUS
from galvatron_compile.strategy import RECOMPUTE, Recompute, Strategy

Dtype = Literal["bf16", "fp16"]
FAMILIES = ("gpt", "llama")
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""What is tried where a table does not tell the micro-batch: the runs' authors took the best."""

Workload = tuple[str, str, int, int, int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Prediction:
    """What a model expects of a run. memory_bytes: of the fullest rank, None if not predicted."""

    step_ms: float
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Run:
    """One row of a table of measured runs; PlanError, naming the row, if it contradicts itself.

    row: its line in the file, the header being line 1. micro_batch: samples per micro-batch and
    data-parallel rank, None where not reported. memory_bytes: peak of a rank, None likewise.
    sequence_parallel: None for what was usual: Megatron's came with selective recompute
    (Korthikanti et al. 2022), and frameworks that train in bf16 are younger than that.
    """

    row: int
    source: str
    model: str
    gpu: str
    num_gpus: int
    gpus_per_node: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    global_batch: int
    micro_batch: int | None
    tp: int
    pp: int
    dp: int
    cp: int
    zero: int
    recompute: Recompute
    dtype: Dtype
    step_ms: float
    memory_bytes: float | None = None
    notes: str = ""
    sequence_parallel: bool | None = None
    schedule: str = "1f1b"
    virtual: int = 1

    def __post_init__(self) -> None:
        ranks = self.tp * self.pp * self.dp * self.cp
        if ranks != self.num_gpus:
            self.fail(
                f"tp{self.tp} x pp{self.pp} x dp{self.dp} x cp{self.cp} are {ranks} GPUs, but "
                f"num_gpus is {self.num_gpus}; correct one of them"
            )
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            self.fail(f"{self.num_gpus} GPUs do not fill nodes of {self.gpus_per_node}")
        if self.recompute not in RECOMPUTE:
            self.fail(f"recompute must be {' or '.join(RECOMPUTE)}, got {self.recompute!r}")
        if self.dtype not in ("bf16", "fp16"):
            self.fail(f"dtype must be bf16 or fp16, got {self.dtype!r}")
        if self.family not in FAMILIES:
            self.fail(
                f"model {self.model!r} is of no known family; begin its name with "
                f"{' or '.join(FAMILIES)}"
            )
        if not self.micro_batches:
            pieces = self.dp * (self.micro_batch or 1)
            self.fail(
                f"a global batch of {self.global_batch} does not split over dp {self.dp} and "
                f"micro-batches of {self.micro_batch or 1}; use a multiple of {pieces}"
            )
        try:
            for micro_batch in self.micro_batches:
                self.plan(micro_batch)
            _ = self.shape, self.cluster
        except ValueError as error:
            self.fail(str(error))

    def fail(self, message: str) -> None:
        raise PlanError(f"row {self.row}: {message}")

    @property
    def family(self) -> str:
        return re.match(r"[a-z]*", self.model.lower()).group()  # type: ignore[union-attr]

    @property
    def workload(self) -> Workload:
        """Runs with equal workloads did the same training on the same GPUs in different ways."""
        return (
            self.source, self.gpu, self.num_gpus, self.hidden, self.layers, self.heads,
            self.kv_heads, self.ffn, self.vocab, self.seq, self.global_batch,
        )  # fmt: skip

    @cached_property
    def shape(self) -> DecoderShape:
        """The decoder that was trained.

        A gpt trained in fp16 or with selective recompute dates from before FlashAttention (Dao et
        al. 2022) was usual: scores in memory, dropout as in GPT-2; context parallel came after it.
        Megatron ties the head.
        """
        if self.family == "llama":
            return DecoderShape(
                self.hidden, self.layers, self.heads, self.kv_heads, self.ffn, self.vocab, self.seq
            )
        early = (self.dtype == "fp16" or self.recompute == "selective") and self.cp == 1
        return DecoderShape(
            self.hidden, self.layers, self.heads, self.kv_heads, self.ffn, self.vocab, self.seq,
            norm="layer", mlp="gelu", positions="learned", tied=True, biases="all",
            attention="eager" if early else "sdpa", dropout=0.1 if early else 0.0,
        )  # fmt: skip

    @cached_property
    def preset(self) -> str:
        """Which of our presets the GPU is: all parts of its name occur in the run's."""
        parts = set(self.gpu.upper().split("-"))
        fitting = [name for name in GPUS if set(name.upper().split("-")) <= parts]
        if not fitting:
            near = difflib.get_close_matches(self.gpu.upper(), GPUS, 1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PlanError(f"no preset for GPU {self.gpu!r}{hint}; known: {', '.join(GPUS)}")
        return max(fitting, key=len)

    @cached_property
    def cluster(self) -> str:
        """The machines in the notation of presets: ``4x8xA100-80GB``."""
        per_node = min(self.num_gpus, self.gpus_per_node)
        return f"{self.num_gpus // per_node}x{per_node}x{self.preset}"

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Samples per micro-batch that are possible: the reported one, or those worth trying."""
        known = MICRO_BATCHES if self.micro_batch is None else (self.micro_batch,)
        return tuple(size for size in known if self.global_batch % (self.dp * size) == 0)

    @property
    def strategy(self) -> Strategy:
        """Of every block; :meth:`plan` says what embedding, norm and head do."""
        modern = self.dtype == "bf16" or self.recompute == "selective"
        wanted = modern if self.sequence_parallel is None else self.sequence_parallel
        return Strategy(
            tp=self.tp, dp=self.dp, cp=self.cp, zero=self.zero, recompute=self.recompute,
            sequence_parallel=wanted and self.tp > 1,
        )  # fmt: skip

    def plan(self, micro_batch: int | None = None) -> Plan:
        """What ran: blocks evenly over the stages, embedding in the first, norm and head last.

        Only blocks are recomputed, as Megatron and torchtitan do.
        micro_batch: one of ``micro_batches``, the first if None. With fewer micro-batches than
        stages 1F1B never gets to its steady state and is what GPipe is.
        """
        size = self.micro_batches[0] if micro_batch is None else micro_batch
        number = self.global_batch // (self.dp * size)
        ends = replace(self.strategy, recompute="none")
        names = ("embedding", *(f"blocks.{i}" for i in range(self.layers)), "norm", "head")
        return Plan(
            model="",
            world_size=self.num_gpus,
            global_batch_size=self.global_batch,
            num_micro_batches=number,
            layers=names,
            strategies=(ends, *[self.strategy] * self.layers, ends, ends),
            stages=self._stages(),
            schedule="gpipe" if self.schedule == "1f1b" and number < self.pp else self.schedule,
            virtual=self.virtual,
        )

    def _stages(self) -> tuple[Stage, ...]:
        pieces = self.pp * self.virtual
        if pieces == 1:
            return ()
        if pieces > self.layers:
            raise PlanError(f"{self.layers} layers do not fill {pieces} stages; lower pp")
        edges = [i * self.layers // pieces for i in range(pieces + 1)]
        lengths = [end - start for start, end in pairwise(edges)]
        lengths[0] += 1
        lengths[-1] += 2
        return tuple(Stage(a, b) for a, b in pairwise([0, *accumulate(lengths)]))

    def __str__(self) -> str:
        """For example ``gpt 1024x24 on 2 A100-SXM4-80GB, batch 16: dp2.recompute; micro=1``."""
        plan = notation.format(self.plan())
        return (
            f"{self.model} {self.hidden}x{self.layers} on {self.num_gpus} {self.gpu}, batch "
            f"{self.global_batch}: {plan}"
        )
