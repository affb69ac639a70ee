"""``compile`` from end to end: it searches, obeys, trains as one process does, saves and loads."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from trained import MODELS, alone, compiled, odd_gpt, optimizer, same, together

import galvatron_compile as gc
from galvatron_compile import decisions, notation, passes
from galvatron_compile.layer_timing import LayerTiming

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
