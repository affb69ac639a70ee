"""A training program as a user writes one, which can be told to die. Run as a script, per rank.

It goes on from the last checkpoint in ``--folder`` if there is one, saves after every second step,
and writes a line of JSON per step. ``--die step`` kills this process with SIGKILL in step 6, before
the first collective; ``--die save`` in the save after step 6, with its files written and not yet
listed. A rank that fails writes how long it had waited.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import galvatron_compile as gc
from galvatron_compile import checkpoint_files
from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint

LAST, EVERY, FATAL = 8, 2, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def batch(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).double()}


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, fate: str, background: bool) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    profile = gc.ClusterProfile.preset(f"{world}xH100")
    plan = "dp1" if world == 1 else f"dp{world}.zero3"
    parallel = gc.compile(Net(), profile, example_inputs=batch(0), plan=plan, measure=False)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
    if folder.exists():
        load_checkpoint(folder, parallel, optimizer)
    handle = None
    while parallel.num_steps < LAST:
        step = parallel.num_steps + 1
        if fate == "step" and step == FATAL:
            dist.all_reduce = die
        print(json.dumps({"step": step, "begins": True}), flush=True)
        loss = parallel.step(parallel.local_batch(batch(step)))
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": step, "loss": loss.item()}), flush=True)
        if step % EVERY == 0:
            if fate == "save" and step == FATAL:
                if handle is not None:
                    handle.wait()  # the save before this one is to be complete
                checkpoint_files.describe = die
            handle = save_checkpoint(folder, parallel, optimizer, asynchronous=background, keep=2)
    if handle is not None:
        handle.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--die", choices=("never", "step", "save"), default="never")
    parser.add_argument("--background", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{given.store}", rank=given.rank, world_size=given.world,
            timeout=timedelta(seconds=given.timeout_s),
        )  # fmt: skip
    began = time.monotonic()
    try:
        train(given.folder, given.die, given.background)
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "after_s": time.monotonic() - began}))
        raise


if __name__ == "__main__":
    main()
