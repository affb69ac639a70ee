"""One thing after the other that bench/gpu.py asks for: a row, a ceiling, a time of torch.compile.

:class:`Bench` answers requests; it keeps nothing between them, so that the process in which it
lives can be replaced when a kernel has broken it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_products
import torch
from gpu_cases import Case, Inputs, Sizes, prepared_backward
from gpu_check import poisoned, wide, wrong_results
from gpu_liger import liger_call
from gpu_report import Row
from gpu_timer import Timed, Timer, copy_bytes_per_s, matmul_flops_per_s

PRODUCTS = {"gather": "all_gather_matmul", "scatter": "matmul_reduce_scatter"}


@dataclass(frozen=True)
class Bench:
    """Answers to requests (verb, name).

    shapes: of the products by verb and name. seed: every request begins with it, so that any can
    be repeated alone. small: ceilings are of small tensors (dry run).
    """

    cases: Sequence[Case]
    sizes: Sizes
    shapes: dict[str, dict[str, gpu_products.Shape]]
    device: torch.device
    timer: Timer
    seed: int
    compiler: Callable[..., Any] = torch.compile
    small: bool = False

    def answer(self, verb: str, name: str) -> Any:
        """Of each verb: ``machine`` → dict; ``ceilings`` → dict; ``case``, ``preset``, ``linked`` →
        (lines of what is wrong, Row); ``compiled`` → Timed."""
        torch.manual_seed(self.seed)
        if verb in ("preset", "linked"):
            return self.product(verb, name)
        if verb in ("case", "compiled"):
            case = next(case for case in self.cases if case.name == name)
            return self.case(case) if verb == "case" else self.compiled(case)
        return {"machine": self.machine, "ceilings": self.ceilings}[verb]()

    def machine(self) -> dict[str, Any]:
        import triton

        versions = {
            "torch": torch.__version__, "triton": triton.__version__, "seed": self.seed,
        }  # fmt: skip
        if self.device.type == "cpu":
            return {"gpu": "no GPU", **versions}
        found = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": found.name,
            "gpu_memory_bytes": found.total_memory,
            "processors": found.multi_processor_count,
            "cuda": torch.version.cuda,
            **versions,
        }

    def ceilings(self) -> dict[str, float]:
        num_bytes, size = (2**12, 32) if self.small else (2**31, 8192)
        return {
            "copy_bytes_per_s": copy_bytes_per_s(self.timer, self.device, num_bytes),
            "matmul_flops_per_s": matmul_flops_per_s(self.timer, self.device, size),
        }

    def case(self, case: Case) -> tuple[list[str], Row]:
        """Right or wrong first, on inputs of its own (they may be written); then the times."""
        wrong = check(case, self.sizes, self.device)
        inputs = case.make(self.sizes, self.device)
        ours = self.timer(lambda: case.kernel(*inputs))
        times: dict[str, Timed] = {}
        if case.compares:
            times["eager"] = self.timer(eager_call(case, inputs))
        for name, function in case.others.items():
            times[name] = self.timer(lambda function=function: function(*inputs))  # type: ignore[misc]
        note = ""
        try:
            if (call := liger_call(case.name, inputs)) is not None:
                times["Liger"] = self.timer(call)
        except Exception as error:  # not ours, and of any version
            note = f"Liger failed: {first_line(error)}"
        moved = None if case.moved_bytes is None else case.moved_bytes(inputs)
        return wrong, Row(
            case.name,
            ours.ms,
            ceiling="" if moved is None else "copy",
            per_s=None if moved is None else moved / ours.ms * 1e3,
            target=case.target,
            over={name: timed.ms / ours.ms for name, timed in times.items()},
            over_target=case.over_target,
            eager_is=case.eager_is,
            late=late({"kernel": ours, **times}),
            note=note,
            seed=self.seed,
        )

    def compiled(self, case: Case) -> Timed:
        """Of gradients, only the backward graph."""
        import torch._functorch.config as functorch

        # Else a compiled backward may free what was saved for it, and refuses to run twice.
        with functorch.patch(donated_buffer=False):
            inputs = case.make(self.sizes, self.device)
            compiled = self.compiler(case.forward or case.eager, dynamic=False)
            return self.timer(_call(case, compiled, inputs))

    def product(self, verb: str, name: str) -> tuple[list[str], Row]:
        linked = verb == "linked"
        product = gpu_products.make(name, self.shapes[verb][name], self.device, linked=linked)
        title = f"{PRODUCTS[name]}, {'over PCIe' if linked else 'flags preset'}"
        wrong = product.wrong(title)
        ours, blas = self.timer(product.kernel), self.timer(product.blas)
        rate = product.flops / ours.ms * 1e3
        if product.transfer is None:
            return wrong, Row(
                title, ours.ms, "cuBLAS", blas.ms / ours.ms, rate, 0.92,
                {"eager": blas.ms / ours.ms}, late=late({"kernel": ours, "cuBLAS": blas}),
                seed=self.seed,
            )  # fmt: skip
        sent = self.timer(product.transfer)
        both = blas.ms + sent.ms
        note = (
            f"link {product.link_bytes / sent.ms / 1e6:.0f} GB/s; transfer {sent.ms:.3f} ms, "
            f"cuBLAS {blas.ms:.3f} ms; one after the other is eager, the longer would be perfect"
        )
        return wrong, Row(
            title, ours.ms, "the longer of both", max(blas.ms, sent.ms) / ours.ms, rate, None,
            {"eager": both / ours.ms}, eager_is="transfer by the copy engine, then cuBLAS",
            late=late({"kernel": ours, "cuBLAS": blas, "transfer": sent}), note=note,
            seed=self.seed,
        )  # fmt: skip


def check(case: Case, sizes: Sizes, device: torch.device) -> list[str]:
    """What is wrong with a kernel on fresh inputs, against PyTorch in float64."""
    inputs = case.make(sizes, device)
    exact = case.eager(*(wide(x) for x in inputs))
    with poisoned():
        got = case.kernel(*inputs)
    return wrong_results(case.name, got, exact, case.roundings)


def eager_call(case: Case, inputs: Inputs) -> Callable[[], Any]:
    """PyTorch's way; of gradients, the backward alone."""
    return _call(case, case.forward or case.eager, inputs)


def _call(case: Case, function: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    if case.forward is not None:
        return prepared_backward(function, case.num_leaves, inputs)
    return lambda: function(*inputs)


def late(times: dict[str, Timed]) -> tuple[str, ...]:
    return tuple(name for name, timed in times.items() if timed.late)


def first_line(error: BaseException) -> str:
    """Type and message, at most 300 characters."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]
