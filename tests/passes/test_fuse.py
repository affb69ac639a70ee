"""What the fuse pass finds in the graphs of real models, what it declines and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import Decision, Setting, build, understand
from galvatron_compile.errors import GalvatronError
from galvatron_compile.fusions import Fusion, Fusions
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.job import Job
from galvatron_compile.notation import parse
from galvatron_compile.passes.fuse import fuse
from galvatron_compile.passes.rewrite import make_mesh
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.precision import Precision
from galvatron_compile.printer import fingerprint, format_graph
from galvatron_compile.program import StageProgram

BATCH = 4
CLUSTER = ClusterProfile.preset("8xH100")


@cache
def llama(dtype: torch.dtype = torch.float32, width: int = 32, length: int = 12) -> LayeredGraph:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    ids = torch.zeros(BATCH, length, dtype=torch.int64)
    return understand(model, {"input_ids": ids, "labels": ids}, None, Precision())


def program(layered: LayeredGraph, text: str, device: str = "cpu") -> StageProgram:
    """Of rank 0 of 2, without a process group."""
    names = [layer.name for layer in layered.layers]
    plan = parse(text, names, 2, BATCH, model=fingerprint(layered))
    shardings = shard(layered, set(plan.strategies))
    mesh = make_mesh(layered, plan, 2, 0, dry=True)
    setting = Setting(Job(0, 2, torch.device("cpu")), None, Precision(), None, False)  # type: ignore[arg-type]
    made = build(layered, Decision(plan, shardings, None), mesh, setting)
    return replace(made, device=torch.device(device))


def taken(fusions: Fusions) -> Counter[str]:
    """How often each was replaced, counting every layer."""
    count: Counter[str] = Counter()
    for layers, found in fusions.by_graph:
        for fusion in found:
            count[fusion.name] += len(layers) * fusion.taken
    return count


def test_a_llama_with_sequence_parallelism_is_fused_throughout() -> None:
    before = program(llama(), "tp2.sp")
    after, fusions = fuse(before, None, "always")
    assert taken(fusions) == {
        "rms_norm": 3, "add_rms_norm": 2, "rotary": 4, "swiglu": 2,
        "all_gather → linear": 5, "linear → reduce_scatter": 4,
        "vocabulary-parallel cross_entropy": 1,
    }  # fmt: skip
    block = after.stages[0].module.get_submodule("layers.1")
    assert isinstance(block, torch.fx.GraphModule)
    called = Counter(str(getattr(n.target, "__name__", "")) for n in block.graph.nodes)
    assert (called["gather_linear"], called["linear_reduce_scatter"]) == (2, 2)
    left = format_graph(block)
    gone = ("rsqrt", "silu", "neg", "all_gather", "linear")
    assert not any(f" = {word}(" in left for word in gone)
    untouched = format_graph(before.stages[0].module.get_submodule("layers.1"))
    assert " = rsqrt(" in untouched
    assert "gather_linear" in str(after)  # the printed program has them too


def test_a_sum_over_ranks_ends_in_the_norm_behind_it() -> None:
    _, fusions = fuse(program(llama(), "tp2"), None, "always")
    assert taken(fusions) == {
        "rms_norm": 3, "all_reduce + add_rms_norm": 2, "rotary": 4, "swiglu": 2,
        "vocabulary-parallel cross_entropy": 1,
    }  # fmt: skip


def test_the_report_reads() -> None:
    text = str(fuse(program(llama(), "tp2.sp"), None, "always")[1])
    assert "// model.layers.0 and 1 more" in text
    assert "all_gather → linear" in text and "replaced" in text
    declined = Fusion("swiglu", ("silu", "mul"), "no kernel runs on the CPU")
    words = " ".join(str(declined).split())
    assert words == "swiglu silu … mul declined: no kernel runs on the CPU"


def test_never_and_auto_on_the_cpu_change_nothing() -> None:
    made = program(llama(), "tp2.sp")
    assert fuse(made, None, "never") == (made, Fusions())
    same, fusions = fuse(made, ClusterProfile.preset("8xH100"))
    assert fusions.num_taken == 0
    assert {fusion.why_not for fusion in fusions} == {"no kernel runs on the CPU"}
    one, other = (p.stages[0].module.get_submodule("layers.1") for p in (made, same))
    assert one.code == other.code


def test_an_unknown_wish_is_refused() -> None:
    with pytest.raises(GalvatronError, match=r"fuse is 'yes'; pass 'auto', 'always' or 'never'"):
        fuse(program(llama(), "tp2"), None, "yes")  # type: ignore[arg-type]


# Prices. On the device "cuda" of another machine, by its profile.


def judged(text: str, layered: LayeredGraph, cluster: str) -> dict[str, Fusion]:
    _, fusions = fuse(program(layered, text, "cuda"), ClusterProfile.preset(cluster))
    return {fusion.name: fusion for fusion in fusions}


def test_on_a_gpu_what_pays_is_replaced() -> None:
    found = judged("tp2.sp", llama(torch.bfloat16, 4096, 4096), "8xH100")
    for name in ("rms_norm", "swiglu", "rotary", "all_gather → linear", "linear → reduce_scatter"):
        assert found[name].taken, found[name]
        assert found[name].saves_ms is not None and found[name].saves_ms > 0


def test_small_products_are_not_worth_the_overlap() -> None:
    found = judged("tp2.sp", llama(torch.bfloat16), "8xH100")
    gathered = found["all_gather → linear"]
    assert gathered.why_not.startswith("too small: "), gathered
    assert found["rms_norm"].taken  # one launch instead of seven


def test_symmetric_memory_ends_at_the_node() -> None:
    found = judged("tp2.sp", llama(torch.bfloat16, 4096, 4096), "2x1xH100")
    assert "spans nodes" in found["all_gather → linear"].why_not
    assert found["swiglu"].taken


def test_float64_has_no_kernel() -> None:
    found = judged("tp2.sp", llama(torch.float64), "8xH100")
    assert found["swiglu"].why_not == "no kernel for float64"


def test_a_loss_is_several_kernels() -> None:
    """As one operator of the graph too, here of logits that are float32 to begin with."""
    cases = [
        ("dp2", "cross_entropy", llama(torch.float32, 4096, 4096), 1),
        ("tp2.sp", "vocabulary-parallel cross_entropy", llama(), 5),
    ]
    for text, name, layered, passes in cases:
        _, fusions = fuse(program(layered, text, "cuda"), CLUSTER)
        [found] = [fusion for fusion in fusions if fusion.name == name]
        assert len(found.covers) == 1 and found.taken, found
        logits = 2 * 4096 * 64 * 4 if text == "dp2" else 4 * 12 * 32 * 4
        assert found.saves_ms == pytest.approx(passes * CLUSTER.memory_ms(logits), rel=0.05)


def test_what_is_one_kernel_already_stays() -> None:
    module = variant(lambda x, weight: F.rms_norm(x, (8,), weight, 1e-6))
    layered = understand(module, {"x": torch.randn(BATCH, 8, 8)}, None, Precision())
    _, fusions = fuse(program(layered, "dp2", "cuda"), CLUSTER)
    verdicts = {(fusion.name, fusion.why_not) for fusion in fusions}
    assert ("rms_norm", "it is one kernel already") in verdicts


def test_views_and_collectives_are_no_gain_of_a_streaming_kernel() -> None:
    """By hand, in bytes of one activation: a rotary embedding reads and writes two products, a
    negation, a concatenation of two halves and a sum; tables and halves count for theirs."""
    width, length = 4096, 4096
    found = judged("tp2", llama(torch.bfloat16, width, length), "8xH100")
    heads, size = 4 // 2, width // 4
    whole = BATCH * heads * length * size * 2
    table = length * size * 2
    moved = [2 * whole + table] * 2 + [whole, 2 * whole, 3 * whole]  # neg reads and writes halves
    apart_ms = sum(map(CLUSTER.memory_ms, moved))
    once_ms = CLUSTER.memory_ms(2 * whole + 2 * table)
    # By name the last: of the keys, which have half as many heads.
    assert found["rotary"].saves_ms == pytest.approx((apart_ms - once_ms) / 2, rel=0.02)
    total = BATCH * length * width * 2
    wide = 2 * total
    norm = [total + wide, 2 * wide, wide, 0, 0, 2 * wide, wide + total, 2 * total]
    apart_ms = sum(CLUSTER.memory_ms(max(1, n)) for n in [3 * total, *norm])
    once_ms = CLUSTER.memory_ms(4 * total)
    assert found["all_reduce + add_rms_norm"].saves_ms == pytest.approx(
        apart_ms - once_ms, rel=0.02
    )


# What may not be replaced.


class Odd(nn.Module):
    """Norms that share what is inside of them, a gate read twice, and one plain RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OddBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class OddBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        gate = F.silu(self.up(self.weight * scaled))
        return x + gate * self.up(x) + gate + scaled


def test_what_is_read_elsewhere_stays() -> None:
    layered = understand(Odd(), {"x": torch.randn(BATCH, 3, 8)}, None, Precision())
    _, fusions = fuse(program(layered, "dp2"), None, "always")
    verdicts = {fusion.name: fusion.why_not for fusion in fusions}
    assert verdicts["rms_norm"].endswith("is read elsewhere too")
    assert verdicts["swiglu"].endswith("is read elsewhere too")


def variant(norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    class Variant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(VariantBlock() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x.square().mean()

    class VariantBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return norm(x, self.weight)

    return Variant()


def of_power(eps: Any = 1e-6, dim: int = -1, power: int = 2) -> nn.Module:
    return variant(
        lambda x, w: w * (x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps))
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [({}, True), ({"dim": 1}, False), ({"power": 4}, False), ({"eps": 1}, False)],
)
def test_only_the_norm_itself_is_taken_for_one(change: dict[str, Any], found: bool) -> None:
    inputs = {"x": torch.randn(BATCH, 8, 8).abs() + 1}
    layered = understand(of_power(**change), inputs, None, Precision())
    _, fusions = fuse(program(layered, "dp2"), None, "always")
    assert any("rms_norm" in fusion.name for fusion in fusions) is found
