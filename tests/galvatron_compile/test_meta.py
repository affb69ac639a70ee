"""Models that are on the meta device altogether: planned, printed, loaded, and then trained."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import galvatron_compile as gc
from galvatron_compile import notation
from galvatron_compile.on_meta import buffers_on_meta

MODELS = str(Path(__file__).parents[1] / "equivalence")
NOT_IN_ITS_STATE_DICT = {
    "llama": ["model.rotary_emb.inv_freq"],
    "bert": ["bert.embeddings.position_ids", "bert.embeddings.token_type_ids"],
}


def models(folder: str) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import models as module

    return module


def on_meta(folder: str, name: str) -> nn.Module:
    """A case of the equivalence matrix, built under ``torch.device("meta")``, in float64."""
    with torch.device("meta"):
        model: nn.Module = models(folder).MODELS[name]().model.double().train()
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model


def compiled(model: nn.Module, batch: Any, **arguments: Any) -> Any:
    profile = gc.ClusterProfile.preset("2xH100")
    return gc.compile(model, profile, example_inputs=batch, measure=False, **arguments)


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Of gradients; only rank 0 has what was found."""
    if dist.is_initialized() and dist.get_rank():
        return
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NOT_IN_ITS_STATE_DICT)
def test_it_is_planned_and_printed_before_anything_is_loaded(name: str) -> None:
    case = models(MODELS).make(name)
    with models(MODELS).Promote():
        real = compiled(case.model, case.batch)
        parallel = compiled(on_meta(MODELS, name), case.batch)
    assert parallel.plan.strategies == real.plan.strategies
    assert parallel.plan.layers == real.plan.layers
    assert "memory limit" in parallel.report()
    text = str(parallel._program)
    for buffer in NOT_IN_ITS_STATE_DICT[name]:
        assert "buffer_" + buffer.replace(".", "_") in text
    assert not any(tensor.is_meta for tensor in parallel.state_dict().values())


def load_and_step(folder: str, name: str, plan: str | None, path: str) -> None:
    import torch.distributed.checkpoint as dcp

    case, empty = models(folder).make(name), on_meta(folder, name)
    with models(folder).Promote():
        wanted = case.model(**case.batch).loss
        parallel = compiled(empty, case.batch, plan=plan)
    wanted.backward()
    gradients = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    share = parallel.local_batch(case.batch)
    buffers = {n: b for n, b in case.model.named_buffers() if n not in case.model.state_dict()}
    # Whole, from rank 0.
    whole = {**case.model.state_dict(), **buffers}
    parallel.load_full_state_dict(whole if dist.get_rank() == 0 else None)
    assert parallel.step(share).item() == pytest.approx(wanted.item(), rel=1e-9)
    close(parallel.full_gradients(), gradients)
    saved = parallel.full_state_dict()
    if dist.get_rank() == 0:
        assert list(saved) == list(case.model.state_dict())
    # Through a checkpoint, and the buffers that it does not hold beside it.
    dcp.save(parallel.state_dict(), checkpoint_id=path)
    with models(folder).Promote():
        other = compiled(on_meta(folder, name), case.batch, plan="all: dp2.zero3; 1: tp2")
    state = other.state_dict()
    dcp.load(state, checkpoint_id=path)
    other.load_state_dict({**state, **buffers})
    assert other.step(other.local_batch(case.batch)).item() == pytest.approx(
        wanted.item(), rel=1e-9
    )
    close(other.full_gradients(), gradients)


@pytest.mark.parametrize("plan", [None, "all: tp2; 1: dp2.zero3; micro=2"])
@pytest.mark.parametrize("name", NOT_IN_ITS_STATE_DICT)
def test_loaded_it_trains_as_the_real_one(
    ranks: Any, name: str, plan: str | None, tmp_path: Path
) -> None:
    ranks(2).run(load_and_step, MODELS, name, plan, str(tmp_path))


@pytest.mark.parametrize("name", NOT_IN_ITS_STATE_DICT)
def test_what_is_missing_is_named_with_what_to_do(name: str) -> None:
    case = models(MODELS).make(name)
    with models(MODELS).Promote():
        parallel = compiled(on_meta(MODELS, name), case.batch)
    with pytest.raises(gc.GalvatronError, match=r"\d+ tensors have no values yet .* more\)"):
        parallel.step(case.batch)
    parallel.load_full_state_dict(case.model.state_dict())
    absent = NOT_IN_ITS_STATE_DICT[name]
    for method in (parallel.step, parallel.evaluate):
        with pytest.raises(gc.GalvatronError) as caught:
            method(case.batch)
        text = str(caught.value)
        assert text.startswith(f"{len(absent)} tensor")
        assert f"leaves out {', '.join(absent)}, so no checkpoint" in text
        assert f"load_full_state_dict({{**state, {absent[0]!r}: …}})" in text
        assert "buffers on the CPU" in text
    state = {**case.model.state_dict(), absent[0]: torch.zeros(2, 77)}
    with pytest.raises(gc.GalvatronError, match=rf"{absent[0]} has shape \[2, 77\]"):
        parallel.load_full_state_dict(state)


class Regression(nn.Module):
    """A loss that divides by sizes, and class weights that a state dict holds."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 5)
        self.register_buffer("weight", torch.rand(5) + 0.5)
        self.loss = loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        out = self.out(x)
        if self.loss == "mse":
            return F.mse_loss(out, y)
        if self.loss == "mean":
            return (out * y).mean() + 1e-2 * self.out.weight.square().sum()
        return F.cross_entropy(out, y.argmax(-1), self.weight)


def every_loss() -> None:
    torch.manual_seed(0)
    batch = {
        "x": torch.randn(8, 8, dtype=torch.float64), "y": torch.randn(8, 5, dtype=torch.float64),
    }  # fmt: skip
    for loss in ("mse", "mean", "weighted"):
        model = Regression(loss).double()
        wanted = model(**batch)
        wanted.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        for start in (copy.deepcopy(model).to("meta"), Regression(loss).double()):
            for plan in ("dp2.zero3; micro=2", "tp2"):
                parallel = compiled(start, batch, plan=plan)
                assert notation.format(parallel.plan) == plan
                parallel.load_full_state_dict(model.state_dict())
                found = parallel.step(parallel.local_batch(batch))
                assert found.item() == pytest.approx(wanted.item(), rel=1e-9), (loss, plan)
                close(parallel.full_gradients(), gradients)


def test_every_loss_divides_by_what_was_loaded(ranks: Any) -> None:
    """Denominators hold no parameter, and read the very buffers that a state fills."""
    ranks(2).run(every_loss)


class Shifted(nn.Module):
    """Adds buffers to activations; ``also`` is the second name of ``shift``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("shift", torch.rand(6), persistent=False)
        self.register_buffer("also", self.shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x) + self.shift) * self.also).square().mean()


def test_buffers_may_stay_on_the_cpu() -> None:
    """As the message advises: of a hand-written model too, whose operators see two devices."""
    real = Shifted().double()
    real.also = real.shift  # `double` made two of them
    empty = copy.deepcopy(real)
    empty.one, empty.two = copy.deepcopy(real.one).to("meta"), copy.deepcopy(real.two).to("meta")
    shift, x = empty.shift, torch.randn(4, 6, dtype=torch.float64)
    parallel = compiled(empty, {"x": x})
    assert empty.shift is shift and empty.also is shift
    parallel.load_full_state_dict(real.state_dict())
    assert parallel.step({"x": x}).item() == pytest.approx(real(x).item(), rel=1e-12)


def test_buffers_come_back_where_capture_fails() -> None:
    empty = Shifted().to("meta")
    empty.shift = empty.also = shift = torch.rand(6)
    with pytest.raises(ValueError, match="stop"), buffers_on_meta(empty) as real:
        assert empty.shift.is_meta and empty.shift is empty.also
        assert real == {"shift": shift, "also": shift}
        raise ValueError("stop")
    assert empty.shift is shift and empty.also is shift
    with buffers_on_meta(Shifted()) as real:
        assert real == {}
