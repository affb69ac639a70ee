"""Optimizers go on as they were, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import Net, adam, compiled, stepped
from torch import nn

from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint
from galvatron_compile.errors import CheckpointError

MAKERS: dict[str, Any] = {
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.7, 0.9), amsgrad=True),
    "Adam, lr a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class Scaled(nn.Module):
    """Has a scalar parameter, whose moments have no dims either."""

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.net = Net()
        self.scale = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale.square()


def go_on(parallel: Any, optimizer: Any) -> list[float]:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses = []
    for _ in range(3):
        losses.append(stepped(parallel, optimizer))
        scheduler.step()
    return losses


@pytest.mark.parametrize("name", MAKERS)
def test_any_of_torchs_optimizers_goes_on(tmp_path: Path, name: str) -> None:
    parallel = compiled(Scaled())
    optimizer = MAKERS[name](parallel.parameters())
    go_on(parallel, optimizer)
    save_checkpoint(tmp_path, parallel, optimizer)
    wanted = {id(p): dict(optimizer.state[p]) for p in parallel.parameters()}
    dtypes = [[getattr(v, "dtype", type(v)) for v in state.values()] for state in wanted.values()]
    losses = go_on(parallel, optimizer)
    assert len(set(losses)) == 3

    other = compiled(Scaled(0.9))
    again = MAKERS[name](other.parameters())
    for _ in range(2):  # into an optimizer without state, and into one with
        load_checkpoint(tmp_path, other, again)
        assert dtypes == [
            [getattr(value, "dtype", type(value)) for value in again.state[p].values()]
            for p in other.parameters()
        ]
        assert go_on(other, again) == losses


def groups(parallel: Any, *prefixes: str) -> list[dict[str, Any]]:
    return [
        {"params": [p for name, p in parallel.named_parameters() if name.startswith(prefix)]}
        for prefix in prefixes
    ]


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (
            lambda p: adam(p),
            lambda p: torch.optim.SGD(p.parameters()),
            r"is of torch\.optim\.adamw\.AdamW, the optimizer given is torch\.optim\.sgd\.SGD",
        ),
        (
            lambda p: torch.optim.SGD(groups(p, "one")),
            lambda p: torch.optim.SGD(p.parameters()),
            r"the checkpoint's did not train two\.bias, two\.weight",
        ),
        (
            lambda p: torch.optim.SGD(p.parameters()),
            lambda p: torch.optim.SGD(groups(p, "two")),
            r"the checkpoint's also trained one\.bias, one\.weight",
        ),
        (
            lambda p: torch.optim.SGD(groups(p, "one", "two")),
            lambda p: torch.optim.SGD(p.parameters()),
            "its group 0 is several groups in the checkpoint",
        ),
        (lambda p: None, adam, "was saved without an optimizer; load it without one"),
    ],
    ids=["class", "more", "fewer", "groups", "none"],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    tmp_path: Path, saved: Any, loaded: Any, message: str
) -> None:
    parallel = compiled()
    save_checkpoint(tmp_path, parallel, saved(parallel))
    other = compiled(Net().requires_grad_(True))
    with torch.no_grad():
        next(other.parameters()).fill_(3.0)
    before = other.full_state_dict()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, other, loaded(other))
    for name, value in other.full_state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: torch.optim.Adafactor(p.parameters(), lr=0.1),
            r"Adafactor's state 'row_var' of one\.weight is a tensor of \[6, 1\]",
        ),
        (
            lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
            r"holds a tensor that is not among parallel\.parameters\(\)",
        ),
        (
            lambda p: torch.optim.SGD([{"params": list(p.parameters()), "odd": object()}]),
            "the optimizer's option 'odd' is <object",
        ),
    ],
    ids=["factored", "foreign", "option"],
)
def test_an_optimizer_that_cannot_be_saved_is_refused(
    tmp_path: Path, make: Any, message: str
) -> None:
    parallel = compiled()
    optimizer = make(parallel)
    stepped(parallel, optimizer)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, parallel, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_how_an_optimizer_runs_stays_its_own(tmp_path: Path) -> None:
    parallel = compiled()
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.5, foreach=True)
    stepped(parallel, optimizer)
    save_checkpoint(tmp_path, parallel, optimizer)
    other = torch.optim.AdamW(parallel.parameters(), lr=0.1, foreach=False)
    load_checkpoint(tmp_path, parallel, other)
    (group,) = other.param_groups
    assert (group["lr"], group["foreach"], len(other.state)) == (0.5, False, 4)
    assert all(torch.is_tensor(state["step"]) for state in other.state.values())
    load_checkpoint(tmp_path, parallel)  # of an optimizer, without one
