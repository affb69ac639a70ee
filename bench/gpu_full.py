"""The bench at full size on a GPU, as the worker's process makes it."""

from __future__ import annotations

import random

import gpu_products
import torch
from gpu_cases import FULL
from gpu_flat import CASES
from gpu_measure import Bench
from gpu_timer import CudaTimer
from gpu_worker import Answer


def full_answer() -> Answer:
    """What answers requests; memory of a request goes back before the next."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    shapes = {"preset": gpu_products.PRESET, "linked": gpu_products.LINKED}
    seed = random.SystemRandom().randrange(2**31)
    bench = Bench(CASES, FULL, shapes, device, CudaTimer(), seed)

    def answer(verb: str, name: str) -> object:
        torch.cuda.empty_cache()
        return bench.answer(verb, name)

    return answer
