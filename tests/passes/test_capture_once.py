"""Capture once gives what the full capture gives; what repeats runs twice, what differs runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import galvatron_compile as gc
from galvatron_compile.errors import CaptureError
from galvatron_compile.interpret import run_graph, run_layers
from galvatron_compile.passes import capture_once as under_test
from galvatron_compile.passes.alike import alike_groups
from galvatron_compile.passes.annotate import Workload, annotate
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.capture_once import understand_once
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.passes.stand_in import Recorder
from galvatron_compile.passes.strategies import enumerate_strategies
from galvatron_compile.precision import Precision

sys.path.insert(0, str(Path(__file__).parent))
import captured_models as models
from once_cases import (
    Block,
    Chain,
    Collecting,
    Looping,
    Noting,
    Penalised,
    Refusing,
    UNet,
    check,
    example,
    understand,
)

pytestmark = pytest.mark.usefixtures("float64")


# --- models that repeat -------------------------------------------------------------------------


def deep(kind: str, layers: int) -> tuple[nn.Module, Any]:
    """A tiny transformers model with that many layers."""
    model, batches = models.transformers_model(kind)
    config: Any = model.config
    for name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, layers)
    return type(model)(config), batches


@pytest.mark.parametrize(
    ("kind", "layers", "stand_ins"),
    [
        ("llama", 6, 3), ("llama", 12, 9), ("llama_tied", 6, 3), ("gpt2", 6, 3), ("bert", 6, 3),
        ("vit", 6, 3), ("t5", 6, 4),
    ],
)  # fmt: skip
def test_transformers_models(kind: str, layers: int, stand_ins: int, ran: list[int]) -> None:
    model, batches = deep(kind, layers)
    check(model, batches(4))
    assert ran == [stand_ins]


@pytest.mark.parametrize("tied", [True, False])
def test_a_hand_written_gpt(tied: bool, ran: list[int]) -> None:
    check(models.OddGPT(8, tied), models.token_batch(4))
    assert ran == [5]


def test_a_module_dict(ran: list[int]) -> None:
    check(models.RenamedGPT(7), models.token_batch(4, ids="x", labels="y"))
    assert ran == [4]


def test_frozen_blocks_are_a_class_of_their_own(ran: list[int]) -> None:
    model = models.OddGPT(10)
    for block in model.plums[3:8]:
        block.requires_grad_(False)
    layered = check(model, models.token_batch(4))
    indices = [layer.class_index for layer in layered.layers]
    assert indices == [0, *[1] * 3, *[2] * 5, *[1] * 2, 3, 4]
    assert ran == [4]


def test_models_on_the_meta_device(ran: list[int]) -> None:
    with torch.device("meta"):
        model = models.OddGPT(6)
    example = {name: value.to("meta") for name, value in models.token_batch(4).items()}
    check(model, example)
    assert ran == [3]


def test_what_was_captured_once_computes_and_trains_like_the_model(ran: list[int]) -> None:
    model = models.OddGPT(6)
    graph = under_test.capture_once(model, models.token_batch(4))
    example = models.token_batch(5)
    reference = models.eager(model, model(**example))
    models.assert_equal_to(reference, model, run_graph(graph, example))
    models.assert_equal_to(reference, model, run_layers(find_layers(graph), example))
    assert ran == [3]


def test_costs_are_those_of_the_full_capture() -> None:
    model, batches = deep("llama", 6)
    cluster = gc.ClusterProfile.preset("2xH100")
    strategies = enumerate_strategies(2, global_batch_size=8)
    workload = Workload(2, 8, (1, 4), Precision())
    once, full = (
        annotate(layered, shard(layered, strategies), cluster, strategies, workload, {})
        for layered in (understand_once(model, batches(4)), understand(model, batches(4)))
    )
    assert once == full


def errors_on_ranks(folder: str) -> tuple[int, float, float]:
    """Stand-ins, and largest differences of loss and gradients from one process, float64."""
    sys.path.insert(0, folder)
    import captured_models as models

    torch.manual_seed(0)
    model, example = models.OddGPT(6).double(), models.token_batch(8)
    loss, gradients = models.eager(model, model(**example))
    counts: list[int] = []
    mark = Recorder._mark
    Recorder._mark = lambda self, *given: counts.append(1) or mark(self, *given)  # type: ignore
    try:
        parallel = gc.compile(
            model,
            gc.ClusterProfile.preset("2xH100"),
            example_inputs=example,
            plan="all: dp2; blocks: tp2; 1: dp2.zero3; 3: dp2.zero3; 4: tp2.sp.recompute; micro=2",
            measure=False,
        )
    finally:
        Recorder._mark = mark  # type: ignore[method-assign]
    got = float(parallel.step(parallel.local_batch(example)))
    found = parallel.full_gradients()
    differences = [float((found[name] - gradients[name]).abs().max()) for name in found]
    return len(counts), abs(got - float(loss)), max(differences, default=0.0)


def test_a_compiled_deep_model_equals_one_process(ranks: Callable[[int], Any]) -> None:
    results = ranks(2).run(errors_on_ranks, str(Path(__file__).parent))
    for calls, loss_error, gradient_error in results:
        assert calls == 6  # each block's call is marked: compile() captures once
        assert loss_error < 1e-12 and gradient_error < 1e-11


# --- code around the blocks ---------------------------------------------------------------------


@pytest.mark.parametrize(("chain", "stand_ins"), [(UNet, 5), (Collecting, 5), (Looping, 9)])
def test_any_code_around_the_blocks(chain: type[Chain], stand_ins: int, ran: list[int]) -> None:
    check(chain(Block), example())
    assert ran == [stand_ins]


def test_blocks_with_several_results(ran: list[int]) -> None:
    check(Penalised(Noting), example())
    assert ran == [5]


# --- the model stays as it is -------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = Chain(Block)
    forward, before = vars(Block)["forward"], {n: dict(vars(m)) for n, m in model.named_modules()}
    understand_once(model, example())
    assert vars(Block)["forward"] is forward
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before


def test_errors_are_those_of_the_full_capture() -> None:
    model = Chain(Refusing)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    forward = vars(Refusing)["forward"]
    with pytest.raises(CaptureError) as full:
        capture(model, example())
    with pytest.raises(CaptureError) as once:
        understand_once(model, example())
    assert str(once.value) == str(full.value)
    assert vars(Refusing)["forward"] is forward
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before


def test_groups_are_the_outermost_alike_modules() -> None:
    model = nn.ModuleDict({"a": Chain(Block, 5), "b": Chain(Block, 3)})
    (group,) = alike_groups(model, 4)
    assert [member.module for member in group.members] == list(model["a"].blocks)
    assert group.differing == (("", "layer_idx"),)
    assert alike_groups(nn.ModuleList(Chain(Block, 2) for _ in range(4)), 4)[0].members
