"""When operators launch kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from galvatron_compile.kernels import base


@dataclass
class OnGPU:
    """What is asked of a tensor of a GPU, where there is none."""

    index: int
    dtype: torch.dtype = torch.bfloat16
    is_cuda: bool = True

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_device(self) -> int:
        return self.index


def test_kernels_run_on_the_current_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches there, whatever device its arguments are of."""
    monkeypatch.setattr(base, "HAS_TRITON", True)
    monkeypatch.setattr(base, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def runs(*given: Any) -> bool:
        return base.runs_kernels(*given)

    assert runs(OnGPU(1), OnGPU(1, torch.float32), OnGPU(1, torch.int64))
    assert not runs(OnGPU(0))
    assert not runs(OnGPU(1), OnGPU(0))
    assert not runs(OnGPU(1), OnGPU(1, torch.float64))
    assert not runs(OnGPU(1), torch.ones(2))
