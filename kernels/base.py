"""What every kernel file shares: Triton where it is installed, when kernels run, launch sizes.

Kernels run on CUDA tensors, and on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``,
for tests; set before this is imported). Everywhere else, and for float64, an operator computes the
same in plain PyTorch. Checked on triton 3.6 and 3.7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # no wheel for this platform: operators still compute, without kernels

    class _Absent:
        """Stands for a module of which only decorators and annotations are used."""

        constexpr = None

        def jit(self, function: Any) -> Any:
            return function

        def __getattr__(self, name: str) -> Any:
            raise ImportError("triton is not installed here (there are wheels for Linux only)")

    triton, tl = _Absent(), _Absent()
    HAS_TRITON = INTERPRETED = False

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KERNEL_DTYPES",
    "as_rows",
    "exact",
    "next_power_of_2",
    "runs_kernels",
    "tl",
    "triton",
    "warps_for",
]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernels(*tensors: Tensor) -> bool:
    """Whether operators on these tensors launch Triton kernels rather than PyTorch's.

    Triton launches on the current device, whatever device its arguments are of.
    """
    if not HAS_TRITON:
        return False
    floats = [x for x in tensors if x.is_floating_point()]
    if any(x.dtype not in KERNEL_DTYPES for x in floats):
        return False
    if INTERPRETED:
        return True
    return all(x.is_cuda for x in tensors) and all(
        x.get_device() == torch.cuda.current_device() for x in tensors
    )


def exact(x: Tensor) -> Tensor:
    """``x`` in the dtype that operators without kernels compute in: float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def warps_for(block: int) -> int:
    """Warps of a program that handles a row of ``block`` elements: 16 bytes a lane at least."""
    return min(16, max(1, block // 512 if block >= 1024 else block // 256))


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]`` with the last dim contiguous; copies only if it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
