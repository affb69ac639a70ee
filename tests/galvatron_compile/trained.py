"""Some steps of a model by one process and by its parallel form, side by side."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import galvatron_compile as gc

MODELS = str(Path(__file__).parents[1] / "equivalence")
STEPS = 2


def models(folder: str) -> Any:
    """tests/equivalence/models.py; its models are the ones of the equivalence matrix."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import models as module

    return module


def odd_gpt(folder: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    """Model and batch, the same on every rank."""
    module = models(folder)
    torch.manual_seed(0)
    model = module.OddGPT(width=16, heads=2, depth=2, dropout=dropout).to(dtype)
    batch = module.odd_gpt().batch
    return model, batch


def compiled(model: nn.Module, batch: Any, **arguments: Any) -> Any:
    profile = gc.ClusterProfile.preset("2xH100")
    return gc.compile(model, profile, example_inputs=batch, measure=False, **arguments)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def alone(model: nn.Module, loss_of: Any, max_norm: float | None = None) -> dict[str, Any]:
    """What one process gets from ``STEPS`` steps on a copy of ``model``."""
    model = copy.deepcopy(model)
    optimize = optimizer(model.parameters())
    losses, norms, gradients = [], [], {}
    for _ in range(STEPS):
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimize.step()
        optimize.zero_grad()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state}


def together(parallel: Any, batch: Any, max_norm: float | None = None) -> dict[str, Any]:
    """The same steps of a parallel model."""
    share = parallel.local_batch(batch)
    optimize = optimizer(parallel.parameters())
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        losses.append(parallel.step(share).item())
        if step == 0:
            gradients = parallel.full_gradients()
        if max_norm is not None:
            norms.append(parallel.clip_grad_norm_(max_norm).item())
        optimize.step()
        parallel.zero_grad()
    state = parallel.full_state_dict()
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-9)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-9)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    assert found["gradients"].keys() == wanted["gradients"].keys()
    assert list(found["state"]) == list(wanted["state"])
    for part in ("gradients", "state"):
        for name, value in wanted[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=1e-8, atol=1e-10)
