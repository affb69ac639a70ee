"""Which dtype computes, which one the optimizer sees, and which one gradients are summed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from galvatron_compile.errors import GalvatronError


@dataclass(frozen=True, slots=True)
class Precision:
    """Three dtypes; None means the dtype that a parameter already has.

    compute: floating working weights and batch inputs; what the model derives from them follows.
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

    def cast_all(self, inputs: Any) -> Any:
        """Every tensor in nested tuples, lists and dicts through :meth:`cast`."""
        return tree_map_only(torch.Tensor, self.cast, inputs)


@contextmanager
def computing_in(model: torch.nn.Module, precision: Precision) -> Iterator[None]:
    """Inside, the parameters have the compute dtype; afterwards they are what they were.

    A model asks its tensors for their dtype while it runs (``x.to(weight.dtype)``), so it must be
    captured in the dtype that it will run in. Buffers keep theirs: rotary frequencies in bf16
    would lose the positions that the model takes care to keep in float32.
    """
    before = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.data = precision.cast(parameter.data)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
