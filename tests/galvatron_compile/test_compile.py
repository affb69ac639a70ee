"""``compile`` from end to end: it searches, obeys, trains as one process does, saves and loads."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import galvatron_compile as gc
from galvatron_compile import decisions, notation, passes
from galvatron_compile.layer_timing import LayerTiming

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


# --- search -------------------------------------------------------------------------------------


def search_and_train(folder: str) -> list[str]:
    model, batch = odd_gpt(folder)
    wanted = alone(model, lambda m: m(**batch), 0.5)
    plans: list[str] = []
    limit: int | None = None
    for _ in range(2):  # then with two thirds of the memory that the first plan needed
        parallel = compiled(copy.deepcopy(model), batch, memory_bytes=limit)
        needed = parallel.plan.predicted["memory_bytes"]
        assert limit is None or needed <= limit
        assert "memory limit" in parallel.report()
        same(together(parallel, batch, 0.5), wanted)
        plans.append(notation.format(parallel.plan))
        limit = needed * 2 // 3
    return plans


def test_the_searched_plan_fits_and_trains_as_one_process(ranks: Any) -> None:
    plans, other = ranks(2).run(search_and_train, MODELS, timeout_s=300.0)
    assert plans == other
    assert plans[0] != plans[1]
    assert any(word in plans[1] for word in ("zero", "recompute", "tp2", "micro")), plans


def on_one_rank(**arguments: Any) -> Any:
    model, batch = odd_gpt(MODELS)
    profile = arguments.pop("profile", None) or gc.ClusterProfile.preset("1xH100")
    return gc.compile(model, profile, example_inputs=batch, **arguments)


def test_a_search_keeps_its_costs_and_says_where_times_come_from() -> None:
    parallel = on_one_rank(measure=False)
    assert str(parallel.search.costs).startswith("cost table for 1 ranks: global batch 8 in 1 of")
    count = len(parallel.plan.layers)
    assert parallel.plan.predicted["sources"] == {"measured": 0, "analytic": count}
    assert f"computation of 0 layers timed on this device, of {count}" in parallel.report()


def test_layers_are_timed_within_the_memory_of_this_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A global batch that fits the profile's memory but not this machine's is planned all the
    same; an H100 would hold all of it in one micro-batch."""
    monkeypatch.setenv("GALVATRON_CACHE", str(tmp_path))
    monkeypatch.setattr(decisions, "free_bytes", lambda device, num_sharing: 2**22)
    largest: list[int] = []
    make = passes.experiments.make_arguments

    def watched(graph: Any, symbol: Any, size: int, device: Any) -> list[Any]:
        largest.append(size)
        return make(graph, symbol, size, device)

    monkeypatch.setattr(passes.experiments, "make_arguments", watched)
    parallel = on_one_rank(global_batch_size=2**16)
    assert parallel.plan.global_batch_size == 2**16
    # A sample is 12 tokens of 16 numbers of 8 bytes.
    assert largest and max(largest) * 12 * 16 * 8 < 2**22
    assert parallel.plan.predicted["sources"]["measured"] == len(parallel.plan.layers)


# --- plans that are given -----------------------------------------------------------------------


def three_spellings(folder: str, path: str) -> None:
    model, batch = odd_gpt(folder)
    text = "all: dp2.zero3; 1: tp2.sp.recompute; micro=2"
    first = compiled(copy.deepcopy(model), batch, plan=text)
    assert notation.format(first.plan) == text
    assert first.plan.predicted["step_ms"] > 0
    file = Path(path) / f"plan{dist.get_rank()}.json"
    first.plan.save(file)
    wanted = together(first, batch)
    for plan in (first.plan, file, str(file)):
        again = compiled(copy.deepcopy(model), batch, plan=plan)
        assert again.plan == first.plan
        found = together(again, batch)
        assert found["losses"] == wanted["losses"]
        for name, value in wanted["state"].items():
            assert torch.equal(found["state"][name], value)


def test_a_plan_is_given_as_text_path_or_plan(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(three_spellings, MODELS, str(tmp_path))


def test_a_given_plan_is_timed_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own forms, at its own batch size; without ``measure`` nothing is, and it says so."""
    asked: list[Any] = []

    def timed(runs: Any, *_: Any) -> dict[Any, LayerTiming]:
        asked.extend(runs)
        return {(*run.form, 2): LayerTiming(1000.0, 2000.0) for run in runs if run.form[0]}

    monkeypatch.setattr(decisions, "measure_layers", timed)
    parallel = on_one_rank(plan="dp1.recompute; micro=4")
    classes = {run.form[0] for run in asked}
    assert len(asked) == len(classes) > 1
    assert {run.form[1:] for run in asked} == {(1, False)}
    assert {run.sizes for run in asked} == {(2,)}
    count = len(parallel.plan.layers)
    assert parallel.plan.predicted["sources"] == {"measured": count - 1, "analytic": 1}
    assert parallel.plan.predicted["compute_ms"] > (count - 1) * 4 * 3000
    assert f"computation of {count - 1} layers timed on this device, of 1" in parallel.report()
    asked.clear()
    parallel = on_one_rank(plan="dp1.recompute; micro=4", measure=False)
    assert not asked
    assert parallel.plan.predicted["sources"] == {"measured": 0, "analytic": count}
    assert f"computation of 0 layers timed on this device, of {count}" in parallel.report()


def test_a_given_plan_beyond_the_device_s_memory_is_run_with_a_remark() -> None:
    profile = gc.ClusterProfile.preset("1xH100")
    reserve = int(profile.reserve_bytes.value)
    small = replace(profile, device=replace(profile.device, memory_bytes=reserve + 1000))
    remark = r"remark: the plan 'dp1' needs .* more than the 0\.0 MiB [(]1000 bytes[)] that a rank"
    assert re.search(remark, on_one_rank(plan="dp1", measure=False, profile=small).report())
    assert "remark: the plan" not in on_one_rank(plan="dp1", measure=False).report()


class Renamed(nn.Module):
    """The odd GPT with every module and parameter called otherwise."""

    def __init__(self, gpt: Any) -> None:
        super().__init__()
        self.q_proj = gpt.lettuce
        self.bias = gpt.where
        self.weight = gpt.pile
        self.embed_tokens = gpt.last
        self.mlp = gpt.out
        for block in gpt.pile:
            modules = dict(block.named_children())
            new_names = ("wte", "o_proj", "ln", "lm_head", "up", "k")
            for old, new in zip(modules, new_names, strict=True):
                delattr(block, old)
                setattr(block, new, modules[old])
            block.forward = Renamed.block.__get__(block)

    def block(self: Any, x: torch.Tensor) -> torch.Tensor:
        b, s, width = x.shape
        fused = self.o_proj(self.wte(x)).view(b, s, self.heads, 3, width // self.heads)
        q, k, v = (piece.transpose(1, 2) for piece in fused.unbind(3))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.ln(mixed.transpose(1, 2).reshape(b, s, width)), self.dropout)
        gate, up = self.up(self.lm_head(x)).chunk(2, dim=-1)
        return x + self.k(F.gelu(gate) * up)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.q_proj(tokens) + self.bias
        for block in self.weight:
            x = block(x)
        logits = self.mlp(self.embed_tokens(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def rename(folder: str) -> None:
    model, batch = odd_gpt(folder)
    renamed = Renamed(copy.deepcopy(model))
    first, second = compiled(model, batch), compiled(renamed, batch)
    assert first.plan.strategies == second.plan.strategies
    assert first.plan.model == second.plan.model  # the fingerprint: they can exchange plans
    assert first.plan.num_micro_batches == second.plan.num_micro_batches
    plan = first.plan
    tensor = compiled(renamed, batch, plan="tp2")
    assert tensor.step(tensor.local_batch(batch)).item() == pytest.approx(
        first.step(first.local_batch(batch)).item(), rel=1e-9
    )
    assert compiled(renamed, batch, plan=plan).plan.strategies == plan.strategies


def test_renaming_everything_changes_no_plan(ranks: Any) -> None:
    ranks(2).run(rename, MODELS)


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


# --- one process --------------------------------------------------------------------------------


def test_one_process_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    model, batch = odd_gpt(MODELS)
    wanted = alone(model, lambda m: m(**batch), 0.5)
    for plan in (None, "dp1.recompute; micro=4"):
        parallel = gc.compile(
            copy.deepcopy(model),
            gc.ClusterProfile.preset("1xH100"),
            example_inputs=batch,
            plan=plan,
            measure=False,
        )
        assert (parallel.data_rank, parallel.data_size) == (0, 1)
        same(together(parallel, batch, 0.5), wanted)


def test_an_example_of_one_sample_means_a_batch_of_one() -> None:
    model, batch = odd_gpt(MODELS)
    single = {name: value[:1] for name, value in batch.items()}
    profile = gc.ClusterProfile.preset("1xH100")
    parallel = gc.compile(copy.deepcopy(model), profile, example_inputs=single, measure=False)
    assert parallel.plan.global_batch_size == 1
    loss = parallel.step(parallel.local_batch(single))
    assert loss.item() == pytest.approx(model(**single).item(), rel=1e-9)


class TwoAndALoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.body(x), target)


def a_stage_without_parameters(folder: str) -> tuple[int, list[float]]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 8), "target": torch.randint(0, 4, (8,))}
    parallel = compiled(TwoAndALoss(), batch, plan="dp1; stages=2,1; micro=2")
    optimize = optimizer(parallel.parameters())
    losses = []
    for _ in range(2):
        losses.append(parallel.step(parallel.local_batch(batch)).item())
        optimize.step()
        optimize.zero_grad()
        gc.save_checkpoint(folder, parallel, optimize)
    gc.load_checkpoint(folder, parallel, optimize)
    return len(list(parallel.named_parameters())), losses


def test_a_stage_without_parameters_has_an_optimizer_too(ranks: Any, tmp_path: Path) -> None:
    first, last = ranks(2).run(a_stage_without_parameters, str(tmp_path))
    assert (first[0], last[0]) == (4, 0)
    assert first[1] == last[1] and first[1][1] < first[1][0]
