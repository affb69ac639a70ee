"""What a run's training software did that decides its speed, told from its row: era as causes.

All that predictions assume about frameworks is here, with the reason for each number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from galvatron_compile.presets import HOST_BACKWARD, HOST_MS
from galvatron_compile.validation.run import Dtype, Run

if TYPE_CHECKING:
    import torch

    from galvatron_compile.precision import Precision

Pairs = frozenset[tuple[str, str]]

MEGATRON_KERNELS: Pairs = frozenset(
    {
        ("add", "_softmax"), ("native_dropout", "add"),
        ("div", "clone"), ("clone", "clone"), ("clone", "bmm"), ("div", "cat"),
        ("div", "addmm"), ("addmm", "clone"), ("mm", "clone"),
    }
)  # fmt: skip
"""Neighbours that are one kernel in Megatron-LM (Narayanan et al. 2021, section 4.2): masked
softmax and bias-dropout-add; by its layout [sequence, batch, heads] batched products, which take
strided operands and scale their result; products whose result an all-reduce changes in place. Its
fused bias and GELU is one operator as it is: the bias is the product's."""

MAX_FUSED_KEYS, FUSED_BATCH = 2048, 4
"""Megatron's masked softmax kernel takes at most so many keys, and samples times heads of a rank
in multiples of four (megatron/model/fused_softmax.py in 2021-22); other shapes run eagerly in
float32, operator by operator."""

EARLY_HOST_MS, EARLY_BACKWARD = 0.068, 0.42
"""Host time of one operator in the forward pass of Megatron-DeepSpeed in 2022-23, whose layers are
Python around eager PyTorch 1, and the share of it in backward, which autograd runs in C++: fitted
by bench/calibrate_host.py on the rows of two GPUs in one node (see :func:`calibrated_on`), which
are reported apart from the others."""

EARLY_WHOLE_HEAD = 2.51
"""How many times longer than counted the head and loss take where tensor parallelism does not
divide the vocabulary, in the same rows and fitted with them. No cause is proven: it grows with the
hidden size, as the vocabulary's products do, which then run at some 100 of 312 TFLOP/s."""

CALIBRATED_GPUS = 2


@dataclass(frozen=True)
class Software:
    """How a framework runs a plan.

    compute, gradient: dtypes of activations and of the gradients that are summed over ranks; the
        optimizer's weights are float32 in every mixed precision.
    host_ms: host time of dispatching one operator; None for what the cluster's profile says.
    overlap: :attr:`galvatron_compile.facts.Overlap.joint`; 2 where gradients are reduced after
        backward, None for what the cluster's profile says.
    fused: neighbours that are one kernel; None where a compiler fuses all it can.
    whole_head: times that an undivided head takes longer than counted.
    kept_products: selective recompute keeps every so many-th product.
    composite_norm: RMS norm runs operator by operator, in float32.
    exposed: share of tensor-parallel collectives that products do not hide.
    backward_dispatch: host time of an operator in backward, as a share of ``host_ms``.
    """

    name: str
    compute: Dtype
    gradient: str
    host_ms: float | None
    overlap: float | None
    fused: Pairs | None
    whole_head: float = 1.0
    kept_products: int = 1
    composite_norm: bool = False
    exposed: float = 1.0
    backward_dispatch: float = HOST_BACKWARD

    @staticmethod
    def of(run: Run) -> Software:
        """Early Megatron for fp16, FSDP for bf16 without pipeline and with ZeRO-3, else Megatron.

        Early Megatron, also under DeepSpeed: gradients have the weights' dtype, and the all-reduce
        begins when backward has ended (SC'21 paper; in vTrain's rows 2 and 8 data-parallel ranks
        differ by an all-reduce at the end of a step). Later Megatron sums in float32 beside
        backward, and so does FSDP (torchtitan: mixed_precision_reduce float32). ZeRO-3 gathers
        ahead in all of them.

        FSDP here is torchtitan in 2024-25: selective recompute runs every second product again
        (torchtitan/distributed/activation_checkpoint.py), and eager RMS norm is a composite, as it
        was before torch 2.8 had a kernel for it.

        "compile" in the notes: torch.compile fuses memory-bound operators and dispatches the code
        it made in one call, so that no host time is left; TorchInductor (Ansel et al. 2024).
        "async" in the notes: collectives and products run in as many pieces as there are ranks
        (PyTorch's asynchronous tensor parallel), so that only the first piece is waited for.
        """
        if run.dtype == "fp16":
            overlap = 2.0 if run.zero < 3 else None
            return Software(
                "early Megatron", "fp16", "float16", EARLY_HOST_MS, overlap, MEGATRON_KERNELS,
                EARLY_WHOLE_HEAD if run.tp == 1 else 1.0, backward_dispatch=EARLY_BACKWARD,
            )  # fmt: skip
        compiled = "compile" in run.notes.lower()
        exposed = 1 / run.tp if "async" in run.notes.lower() else 1.0
        host_ms = 0.0 if compiled else HOST_MS
        if run.zero == 3 and run.pp == 1:
            fused = None if compiled else frozenset[tuple[str, str]]()
            return Software(
                "FSDP", "bf16", "float32", host_ms, None, fused,
                kept_products=2, composite_norm=not compiled, exposed=exposed,
            )  # fmt: skip
        fused = None if compiled else MEGATRON_KERNELS
        return Software("Megatron", "bf16", "float32", host_ms, None, fused, exposed=exposed)

    def softmax_is_eager(self, run: Run, micro_batch: int) -> bool:
        """Whether the shape falls back from the masked softmax kernel."""
        rows = micro_batch * run.heads // run.tp
        fits = run.seq <= MAX_FUSED_KEYS and rows % FUSED_BATCH == 0
        return self.fused == MEGATRON_KERNELS and not fits

    def precision(self) -> Precision:
        import torch

        from galvatron_compile.precision import Precision

        return Precision(self.dtype(), torch.float32, getattr(torch, self.gradient))

    def dtype(self) -> torch.dtype:
        import torch

        return {"fp16": torch.float16, "bf16": torch.bfloat16}[self.compute]


def calibrated_on(run: Run) -> bool:
    """Whether the run is one of those that the EARLY constants were fitted on."""
    return "vtrain" in run.source.lower() and run.num_gpus == CALIBRATED_GPUS
