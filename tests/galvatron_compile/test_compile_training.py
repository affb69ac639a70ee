"""What ``compile`` gives trains as one process does: inputs, precision, states, dropout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from trained import MODELS, alone, compiled, odd_gpt, optimizer, same, together

import galvatron_compile as gc

# --- inputs and precision -----------------------------------------------------------------------


class Logits(nn.Module):
    """Returns logits, for a loss beside; positional arguments and one that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, *, flag: bool = True) -> torch.Tensor:
        hidden = torch.relu(self.one(x * scale))
        return self.two(hidden if flag else -hidden)


def loss_of_pair(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[2])


def loss_of_dict(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch["wanted"])


def loss_beside() -> None:
    torch.manual_seed(3)
    model = Logits().double()
    x, scale = torch.randn(8, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    wanted = torch.randint(0, 4, (8,))
    on_one = alone(model, lambda m: F.cross_entropy(m(x, scale), wanted))
    for plan in ("dp2.zero3", "dp2; micro=2"):
        parallel = compiled(
            copy.deepcopy(model), (x, scale, wanted), plan=plan, loss_fn=loss_of_pair
        )
        same(together(parallel, (x, scale, wanted)), on_one)
    batch = {"x": x, "scale": scale, "wanted": wanted, "flag": False}
    on_one = alone(model, lambda m: F.cross_entropy(m(x, scale, flag=False), wanted))
    parallel = compiled(copy.deepcopy(model), batch, plan="dp2", loss_fn=loss_of_dict)
    same(together(parallel, batch), on_one)
    with pytest.raises(gc.GalvatronError, match=r"batch\['flag'\] is True, .* with False"):
        parallel.step(parallel.local_batch(batch) | {"flag": True})


def test_tuple_and_dict_inputs_with_a_loss_beside(ranks: Any) -> None:
    ranks(2).run(loss_beside)


def bf16(folder: str) -> list[list[float]]:
    model, batch = odd_gpt(folder, dtype=torch.float32)
    exact = model(**batch).item()
    found = []
    for plan in ("dp2.zero2", "tp2.sp", "all: dp2.zero3.recompute; 1: tp2; micro=2"):
        parallel = compiled(copy.deepcopy(model), batch, plan=plan, precision="bf16")
        share, optimize, losses = parallel.local_batch(batch), optimizer(parallel.parameters()), []
        for _ in range(4):
            losses.append(parallel.step(share).item())
            assert {p.dtype for p in parallel.parameters()} == {torch.float32}
            assert {p.grad.dtype for p in parallel.parameters()} == {torch.float32}
            optimize.step()
            parallel.zero_grad()
        assert losses[0] == pytest.approx(exact, rel=0.02) and losses[0] != exact
        assert losses[-1] < losses[0] - 0.05
        found.append(losses)
    return found


def test_bf16_trains_with_fp32_masters(ranks: Any) -> None:
    one, other = ranks(2).run(bf16, MODELS)
    assert one == other


# --- states -------------------------------------------------------------------------------------


def from_meta(folder: str) -> None:
    model, batch = odd_gpt(folder)
    wanted = alone(model, lambda m: m(**batch))
    empty = copy.deepcopy(model).to("meta")
    empty.out.weight = empty.lettuce.weight  # `to` made two of the tied one
    for plan in ("dp2.zero3", "tp2"):
        parallel = compiled(empty, batch, plan=plan)
        parallel.load_full_state_dict(model.state_dict() if dist.get_rank() == 0 else None)
        assert all(parameter.is_meta for parameter in empty.parameters())
        same(together(parallel, batch), wanted)


def test_a_meta_model_is_loaded_whole_and_trains(ranks: Any) -> None:
    ranks(2).run(from_meta, MODELS)


def checkpoints(folder: str, path: str) -> None:
    import torch.distributed.checkpoint as dcp

    model, batch = odd_gpt(folder)
    trained = compiled(copy.deepcopy(model), batch, plan="all: tp2; 1: dp2.zero3; micro=2")
    wanted = together(trained, batch)["state"]
    loss = trained.evaluate(trained.local_batch(batch))
    dcp.save(trained.state_dict(), checkpoint_id=path)
    for plan in ("dp2.zero3", "tp2.sp", "dp2"):
        other = compiled(copy.deepcopy(model), batch, plan=plan)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=path)
        other.load_state_dict(state)
        found = other.full_state_dict()
        assert list(found) == (list(wanted) if dist.get_rank() == 0 else [])
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        again = other.evaluate(other.local_batch(batch))
        torch.testing.assert_close(again, loss, rtol=1e-9, atol=0)


def test_a_checkpoint_of_one_plan_loads_under_another(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(checkpoints, MODELS, str(tmp_path))


# --- dropout ------------------------------------------------------------------------------------


def dropout(folder: str) -> None:
    model, batch = odd_gpt(folder, dropout=0.3)
    exact = odd_gpt(folder)[0](**batch).item()
    for plan, again in (
        ("tp2", "tp2.recompute"),
        ("tp2.sp", "tp2.sp.recompute"),
        ("dp2.zero3; micro=2", "dp2.zero3.recompute; micro=2"),
    ):
        kept, repeated = (compiled(copy.deepcopy(model), batch, plan=p) for p in (plan, again))
        share = kept.local_batch(batch)
        losses = [(kept.step(share), repeated.step(share)) for _ in range(2)]
        assert losses[0][0] == losses[0][1] and losses[1][0] == losses[1][1]
        assert losses[0][0] != losses[1][0]  # another step, other masks
        for one, other in zip(kept.parameters(), repeated.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        assert losses[0][0].item() != pytest.approx(exact, rel=1e-4)
        assert kept.evaluate(share).item() == pytest.approx(exact, rel=1e-9)
        if plan == "tp2":
            agree_on_replicated(kept)


def agree_on_replicated(parallel: Any) -> None:
    """Parameters that both tensor ranks hold whole have one gradient: their masks were equal."""
    count = 0
    for entry in parallel.states.entries:
        if not entry.layout.tensor.is_shard:
            gradients = [torch.empty_like(entry.master.grad) for _ in range(2)]
            dist.all_gather(gradients, entry.master.grad.contiguous())
            torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)
            count += 1
    assert count >= 8  # norms and the biases behind row-sharded weights


def test_dropout_is_repeated_by_recompute_and_agrees_where_values_are_replicated(
    ranks: Any,
) -> None:
    ranks(2).run(dropout, MODELS)


class Drops(nn.Module):
    """A residual block that drops in front, in its hidden layer and in what it adds.

    Samples, positions and hidden features are equal, so that only masks tell them apart. ``places``
    is added at every position of every sample.
    """

    def __init__(self, within: float) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.within = within  # probability in front and in the hidden layer
        self.samples, self.places = nn.Embedding(4, 8), nn.Parameter(torch.zeros(6, 8))
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8)
        self.out = nn.Linear(8, 1)
        with torch.no_grad():
            self.samples.weight.copy_(torch.randn(1, 8).expand(4, 8))
            self.up.weight.copy_(self.up.weight[:1].expand(64, 8))  # equal hidden features
            self.down.weight.copy_(self.down.weight[:, :1].expand(8, 64))
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.samples(ids).unsqueeze(1) + self.places
        x = F.dropout(self.norm(x), self.within, self.training)
        hidden = F.dropout(torch.tanh(self.up(x)), self.within, self.training)
        x = x + F.dropout(self.down(hidden), 0.5, self.training)
        return self.out(x).square().sum()


def drop(plan: str) -> dict[str, torch.Tensor]:
    """The gradients of one step, on rank 0; where both ranks hold a parameter whole, their own
    gradients must be one."""
    batch = {"ids": torch.arange(4)}
    # Sequence parallel splits positions only in what is added; elsewhere every mask has them all.
    parallel = compiled(Drops(0.0 if "sp" in plan else 0.5), batch, plan=plan)
    parallel.step(parallel.local_batch(batch))
    if plan == "tp2":
        for entry in parallel.states.entries:
            if not entry.layout.tensor.is_shard:
                each = [torch.empty_like(entry.master.grad) for _ in range(2)]
                dist.all_gather(each, entry.master.grad.contiguous())
                torch.testing.assert_close(each[0], each[1], rtol=1e-12, atol=1e-14)
    return parallel.full_gradients()


@pytest.mark.parametrize(
    ("plan", "name", "dim"),
    [
        ("tp2", "down.weight", 1),  # hidden features
        ("tp2.sp", "places", 0),  # positions
        ("dp2", "samples.weight", 0),
        ("dp2.zero3.recompute", "samples.weight", 0),
        ("dp2; micro=2", "samples.weight", 0),
    ],
)
def test_the_parts_of_a_sharded_region_draw_different_masks(
    ranks: Any, plan: str, name: str, dim: int
) -> None:
    """With one mask for both, the gradients of the two parts would be the same."""
    gradient = ranks(2).run(drop, plan)[0][name]
    first, second = gradient.chunk(2, dim)
    assert not torch.allclose(first, second)
    if "micro" in plan:  # one sample a rank and micro-batch: four masks
        rows = gradient.unbind(0)
        pairs = [(a, b) for at, a in enumerate(rows) for b in rows[:at]]
        assert not any(torch.allclose(one, other) for one, other in pairs)
