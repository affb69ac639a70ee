"""Losses that mix samples: gathered over the data axis, or refused clearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import galvatron_compile as gc
from galvatron_compile.errors import UnsupportedError

TOLERANCE = 1e-9
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "square of a mean": lambda logits, y: F.cross_entropy(logits, y) ** 2 + logits.mean(),
    "spread over the batch": lambda logits, y: logits.std(0).sum() + F.cross_entropy(logits, y),
    "worst sample": lambda logits, y: F.cross_entropy(logits, y, reduction="none").max(),
    "norm of the outputs": lambda logits, y: logits.norm(),
    "a penalty that needs no sample": lambda logits, y: logits.mean(0).exp().sum(),
    "similarity of all pairs": lambda logits, y: (logits @ logits.T).logsumexp(1).mean(),
}


class Model(nn.Module):
    """Two layers and one of the losses; with ``regulariser``, all weights stand in the loss too."""

    def __init__(self, loss: Callable[..., torch.Tensor], regulariser: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 5)
        self.loss, self.regulariser = loss, regulariser

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + F.gelu(block(x))
        loss = self.loss(self.out(x), y)
        if self.regulariser:
            loss = loss + 0.1 * torch.stack([(p**2).sum() for p in self.parameters()]).sum()
        return loss


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, 8, dtype=torch.float64), "y": torch.randint(0, 5, (8,))}


def differences(losses: Any, plan: str, regulariser: bool) -> dict[str, tuple[float, float]]:
    """Per loss, how far loss and gradients are from those of one process."""
    found = {}
    for name, loss in losses.items():
        torch.manual_seed(1)
        model, inputs = Model(loss, regulariser).double(), batch()
        expected = model(**inputs)
        expected.backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        parallel = gc.compile(
            model, gc.ClusterProfile.preset("2xH100"), example_inputs=inputs, plan=plan,
            measure=False,
        )
        value = parallel.step(parallel.local_batch(inputs))
        got = parallel.full_gradients()
        worst = max((float((got[n] - wanted[n]).abs().max()) for n in got), default=0.0)
        found[name] = (abs(float(value) - float(expected.detach())), worst)
    return found


@pytest.mark.parametrize("plan", ["dp2", "tp2", "all: dp2; 0: tp2"])
def test_losses_that_mix_samples_equal_one_process(ranks: Any, plan: str) -> None:
    for name, (loss, gradient) in ranks(2).run(differences, LOSSES, plan, False)[0].items():
        assert loss < TOLERANCE and gradient < TOLERANCE, (name, loss, gradient)


@pytest.mark.parametrize("plan", ["dp2", "tp2"])
def test_a_regulariser_over_all_weights_equals_one_process(ranks: Any, plan: str) -> None:
    """Every parameter is shared with the loss: placements of all are chosen in one problem."""
    losses = {"mean": F.cross_entropy}
    loss, gradient = ranks(2).run(differences, losses, plan, True)[0]["mean"]
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


def test_sizes_that_depend_on_the_data_are_refused() -> None:
    model = Model(lambda logits, y: F.cross_entropy(logits[y > 1], y[y > 1])).double()
    with pytest.raises(UnsupportedError, match=r"size depends on the data.*ignore_index"):
        gc.compile(
            model, gc.ClusterProfile.preset("2xH100"), example_inputs=batch(), measure=False
        )
