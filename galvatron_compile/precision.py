"""Which dtype computes, which one the optimizer sees, and which one gradients are summed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from galvatron_compile.errors import GalvatronError


@dataclass(frozen=True, slots=True)
class Precision:
    """Three dtypes; None means the dtype that a parameter already has.

    compute: floating working weights, batch inputs and buffers.
    master: what the optimizer updates.
    reduce: what gradients are accumulated over micro-batches and summed over ranks in.
    """

    compute: torch.dtype | None = None
    master: torch.dtype | None = None
    reduce: torch.dtype | None = None

    @staticmethod
    def parse(text: str | None) -> Precision:
        """``None`` keeps the model's dtypes; ``"fp32"``; ``"bf16"``: bf16 with fp32 masters.

        Raises GalvatronError on anything else.
        """
        if text is None:
            return Precision()
        if text == "fp32":
            return Precision(torch.float32, torch.float32, torch.float32)
        if text == "bf16":
            return Precision(torch.bfloat16, torch.float32, torch.float32)
        raise GalvatronError(f"unknown precision {text!r}; use 'fp32', 'bf16' or None")

    def compute_of(self, dtype: torch.dtype) -> torch.dtype:
        return self.compute if self.compute and dtype.is_floating_point else dtype

    def master_of(self, dtype: torch.dtype) -> torch.dtype:
        return self.master if self.master and dtype.is_floating_point else dtype

    def reduce_of(self, dtype: torch.dtype) -> torch.dtype:
        return self.reduce if self.reduce and dtype.is_floating_point else dtype

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in the compute dtype if it is floating, else itself."""
        return tensor.to(self.compute_of(tensor.dtype))
