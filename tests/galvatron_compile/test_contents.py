"""What forward does not use is saved and loaded by its name, and never trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import galvatron_compile as gc
from galvatron_compile.compiler import understand
from galvatron_compile.contents import Contents, listed
from galvatron_compile.precision import Precision

UNUSED = ["spare.weight", "spare.bias", "twin.weight", "twin.bias", "count"]


class Partly(nn.Module):
    """Uses two of its layers. ``twin`` is ``spare``, ``also`` is the second name of ``one``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)
        self.spare = nn.Linear(5, 2)
        self.twin, self.also = self.spare, self.one
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.register_buffer("count", torch.tensor([7 + seed]))
        self.register_buffer("hidden", torch.rand(4), persistent=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)) * self.scale + self.shift).square().sum(-1).mean()


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()}


def compiled(model: nn.Module, plan: str | None = None) -> Any:
    profile = gc.ClusterProfile.preset("2xH100")
    return gc.compile(model, profile, example_inputs=batch(), plan=plan, measure=False)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_contents_name_what_no_graph_uses_once() -> None:
    model = Partly()
    contents = Contents.of(model, understand(model, batch(), None, Precision()).graph)
    assert contents.names == tuple(model.state_dict())
    assert list(contents.passive) == ["spare.weight", "spare.bias", "count", "hidden"]
    assert contents.tied == {
        "twin.weight": "spare.weight", "twin.bias": "spare.bias",
        "also.weight": "one.weight", "also.bias": "one.bias",
    }  # fmt: skip
    assert contents.unloaded == frozenset()
    assert all(torch.equal(model.get_parameter(n), contents.passive[n]) for n in UNUSED[:2])
    (remark,) = contents.remarks
    assert all(name in remark for name in UNUSED) and "hidden" not in remark


def test_a_model_that_forward_uses_whole_has_no_remark() -> None:
    model = nn.Linear(6, 1)
    graph = understand(model, (batch()["x"].float(),), lambda out, _: out.sum(), Precision()).graph
    contents = Contents.of(model, graph)
    assert (dict(contents.passive), contents.remarks) == ({}, ())


def test_long_lists_of_names_are_cut() -> None:
    assert listed(["c", "a", "b"]) == "a, b, c"
    assert listed("dbca", most=2) == "a, b and 2 more"


def test_it_loads_its_own_state_and_says_what_is_not_trained() -> None:
    model, given = Partly(), Partly(3)
    parallel = compiled(model)
    before = copy.deepcopy(model.state_dict())
    equal(parallel.full_state_dict(), before)
    assert "remark: forward does not use count, spare.bias" in parallel.report()
    parallel.load_full_state_dict(given.state_dict())
    equal(parallel.full_state_dict(), given.state_dict())
    equal(parallel.state_dict(), given.state_dict())
    equal(model.state_dict(), before)  # the caller's model is not written to
    assert [name for name, _ in parallel.named_parameters()] == [
        "one.weight", "one.bias", "two.weight", "two.bias",
    ]  # fmt: skip


def test_buffers_that_are_not_persistent_may_be_given() -> None:
    parallel, given = compiled(Partly()), Partly(3)
    kept = {"shift": given.shift, "hidden": given.hidden}
    parallel.load_full_state_dict({**given.state_dict(), **kept})
    assert parallel.step(batch()).item() == pytest.approx(given(**batch()).item(), rel=1e-12)
    other = compiled(Partly())
    other.load_state_dict({**given.state_dict(), "shift": given.shift})
    assert other.step(batch()).item() == pytest.approx(given(**batch()).item(), rel=1e-12)


def test_a_wrong_state_is_refused_by_name() -> None:
    parallel, state = compiled(Partly()), Partly(3).state_dict()
    for change, message in (
        ({"count": None}, "missing: count"),
        ({"spare.bias": torch.zeros(9)}, r"spare\.bias has shape \[9\], the model's is \[2\]"),
        ({"twin.bias": torch.zeros(2)}, r"twin\.bias and spare\.bias are tied but differ"),
        ({"spare.odd": torch.zeros(2)}, r"unexpected: spare\.odd"),
    ):
        wrong = {n: v for n, v in {**state, **change}.items() if v is not None}
        with pytest.raises(gc.GalvatronError, match=message):
            parallel.load_full_state_dict(wrong)


def test_on_the_meta_device_they_must_be_loaded_too() -> None:
    empty = Partly()
    empty.spare.to("meta")
    parallel = compiled(empty)
    assert empty.spare.weight.is_meta
    with pytest.raises(gc.GalvatronError, match=r"2 tensors have .*spare\.bias, spare\.weight"):
        parallel.step(batch())
    parallel.load_full_state_dict(Partly(3).state_dict())
    parallel.step(batch())
    equal(parallel.full_state_dict(), Partly(3).state_dict())


def unused_on_ranks(path: str) -> None:
    import torch.distributed.checkpoint as dcp

    rank = dist.get_rank()
    parallel = compiled(Partly(rank), "all: dp2.zero3")  # rank 0's values count
    share = parallel.local_batch(batch())
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1, weight_decay=0.5)
    first = Partly(0)
    assert parallel.step(share).item() == pytest.approx(first(**batch()).item(), rel=1e-12)
    optimizer.step()
    dcp.save(parallel.state_dict(), checkpoint_id=path)
    saved = parallel.full_state_dict()
    if rank == 0:
        assert list(saved) == list(first.state_dict())
        assert not torch.equal(saved["one.weight"], first.one.weight)
    for name in UNUSED:
        assert torch.equal(parallel.state_dict()[name], first.state_dict()[name])
    for start in (Partly(5), Partly(5).to("meta")):
        start.shift, start.hidden = first.shift, first.hidden
        other = compiled(start, "all: tp2")
        state = other.state_dict()
        dcp.load(state, checkpoint_id=path)
        other.load_state_dict(state)
        found = other.full_state_dict()
        if rank == 0:
            equal(found, saved)
        other.load_full_state_dict(first.state_dict() if rank == 0 else None)
        found = other.full_state_dict()
        if rank == 0:
            equal(found, first.state_dict())
        for name in UNUSED:  # on every rank
            assert torch.equal(other.state_dict()[name], first.state_dict()[name])


def test_on_several_ranks_and_through_checkpoints(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(unused_on_ranks, str(tmp_path))


def differently() -> None:
    model = Partly()
    if dist.get_rank() == 1:
        model.spare = nn.Linear(5, 4)
    compiled(model)


def test_ranks_must_hold_the_same(ranks: Any) -> None:
    errors = ranks(2).errors(differently)
    assert all("differs from rank 0" in str(error) for error in errors)
