"""What cannot be done is refused on every rank at once, with a message that says what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from refused import BATCH, SEQ, Tiny, alike, compiled, refused, tokens
from torch import nn

import galvatron_compile as gc
from galvatron_compile.errors import (
    CaptureError,
    GalvatronError,
    InfeasibleError,
    NonFiniteLossError,
    PeerError,
    PlanError,
    ProfileError,
    ShapeError,
)

# --- sizes and memory ---------------------------------------------------------------------------


class Single(nn.Module):
    """One layer, which cannot be cut into stages."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(15, 21)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x).square().mean()


def odd_sizes() -> None:
    # Three samples do not halve, nor do 15 and 21 features.
    compiled(Single(), example_inputs={"x": torch.randn(3, 15)})


def odd_stages() -> tuple[int, float]:
    # Nor do 3 heads, 5 tokens or 21 words, but layers are two or more.
    parallel = compiled(Tiny(15, 3, 21), example_inputs=tokens(3, 5))
    return parallel.plan.pp, float(parallel.step(tokens(3, 5)))


def test_where_nothing_divides_a_pipeline_still_runs(ranks: Any) -> None:
    (pp, loss), (_, other) = ranks(2).run(odd_stages)
    assert pp == 2 and loss == other > 0


def test_a_world_size_that_nothing_divides_is_refused(ranks: Any) -> None:
    alike(
        refused(ranks, odd_sizes),
        InfeasibleError,
        "no strategy can run every layer with a global batch of 3 on 2 ranks",
        "tp2 splits no parameter of this model",
        "change the batch size or the number of ranks",
    )


@pytest.mark.parametrize("plan", ["dp2", "tp2; micro=4"])
def test_a_batch_that_a_plan_does_not_split_is_refused(ranks: Any, plan: str) -> None:
    pieces = {"dp2": 2, "tp2; micro=4": 4}[plan]
    alike(
        refused(ranks, compiled, plan=plan, global_batch_size=7),
        PlanError,
        "a global batch of 7 does not split into",
        f"use a multiple of {pieces}, for example 8, or change dp or the number of micro-batches",
    )


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"global_batch_size": 0}, ShapeError, "global_batch_size is 0; give the number"),
        ({"global_batch_size": -8}, ShapeError, "global_batch_size is -8"),
        ({"global_batch_size": "16"}, ShapeError, "global_batch_size is '16'; .* whole number"),
        ({"global_batch_size": 16.0}, ShapeError, r"global_batch_size is 16\.0; .* whole number"),
        ({"memory_bytes": 0}, InfeasibleError, "memory_bytes is 0; give the bytes"),
        ({"memory_bytes": 8e9}, InfeasibleError, r"memory_bytes is 8000000000\.0; .* whole"),
        ({"profile": "8xH100"}, ProfileError, r"pass ClusterProfile\.preset\('8xH100'\)"),
        ({"profile": "mine.json"}, ProfileError, r"pass ClusterProfile\.load\('mine\.json'\)"),
        ({"profile": Path("mine")}, ProfileError, r"pass ClusterProfile\.load\('mine'\)"),
        ({"profile": None}, ProfileError, "cluster_profile is None, .* ClusterProfile.preset"),
        ({"plan": 3}, PlanError, "plan is 3; pass a Plan, the path .* or notation such as"),
        ({"plan": {"tp": 2}}, PlanError, "plan is a dict; pass a Plan"),
        ({"plan": "plans/best"}, PlanError, "no plan at plans/best; save one"),
        ({"model": Tiny}, GalvatronError, "the model is the class Tiny; pass an instance of"),
        ({"model": "llama"}, GalvatronError, "the model is 'llama'; pass an instance of torch.nn"),
        ({"seed": 1.5}, GalvatronError, r"seed is 1\.5; pass a whole number"),
        ({"fuse": True}, GalvatronError, "fuse is True; pass 'auto', 'always' or 'never'"),
        ({"loss_fn": 3}, GalvatronError, r"loss_fn is 3; pass a function loss_fn\(outputs, batch"),
        ({"loss_fn": torch.sum}, CaptureError, r"model or of loss_fn\(outputs, batch\)"),
        ({"loss_fn": lambda y: y}, GalvatronError, r"takes \(y\), but is called loss_fn\(outputs"),
        ({"precision": "fp17"}, GalvatronError, "unknown precision 'fp17'; use 'fp32', 'bf16'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(
    ranks: Any, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    alike(refused(ranks, compiled, **changes), kind, message)


def smallest_memory() -> int:
    """The memory that the refusal of a tiny limit names, after a search that it lets succeed."""
    with pytest.raises(InfeasibleError, match=r"no plan fits in .*[(]100 bytes[)] a") as found:
        compiled(memory_bytes=100)
    needed = re.search(r"smallest that would do is .*[(](\d+) bytes[)]", str(found.value))
    plan = re.search("with the plan '(.*)'; raise memory_bytes", str(found.value))
    assert needed and plan, found.value
    parallel = compiled(memory_bytes=int(needed[1]))
    assert parallel.plan.predicted["memory_bytes"] == int(needed[1])
    return int(needed[1])


def test_memory_that_nothing_fits_is_refused_with_the_smallest_that_would_do(ranks: Any) -> None:
    one, other = ranks(2).run(smallest_memory)
    assert one == other > 100


@pytest.mark.parametrize("plan", ["dp2", "tp2.sp; micro=2"])
def test_a_given_plan_that_exceeds_the_memory_is_refused(ranks: Any, plan: str) -> None:
    alike(
        refused(ranks, compiled, plan=plan, memory_bytes=1000),
        InfeasibleError,
        rf"the plan '{plan}' needs .* [(]\d+ bytes[)] a rank, more than the .* [(]1000 bytes[)]",
        "more micro-batches.*; or raise memory_bytes, or leave plan out",
    )


# --- capture ------------------------------------------------------------------------------------


class Branching(Tiny):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.table.weight.sum() > 0:  # the line to be named
            ids = ids + 0
        return super().forward(ids, labels)


class FailsOnOneRank(Tiny):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise RuntimeError("the disk is on fire")
        return super().forward(ids, labels)


def uncapturable(kind: type[Tiny]) -> None:
    compiled(kind())


def test_a_model_that_export_cannot_capture_is_refused_with_its_line(ranks: Any) -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(at for at, line in enumerate(lines, 1) if "# the line to be named" in line)
    alike(
        refused(ranks, uncapturable, Branching),
        CaptureError,
        rf"test_refusals\.py:{number}: if self\.table\.weight\.sum\(\) > 0",
        "the model cannot be captured\n.*data-dependent",
    )


class Noisy(Branching):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        print("a message of the model", file=sys.stderr)
        return super().forward(ids, labels)


def on_one_rank(model: nn.Module, batch: Any) -> Any:
    profile = gc.ClusterProfile.preset("1xH100")
    return gc.compile(model, profile, example_inputs=batch, measure=False)


def test_a_failed_capture_prints_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="data-dependent"):
        on_one_rank(Noisy(), tokens())
    printed = capsys.readouterr()
    assert "a message of the model" in printed.err
    assert "def forward(" not in printed.err + printed.out


class Scales(Tiny):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor, scale: Any = None) -> Any:
        return super().forward(ids, labels) + (self.table(ids)[:, 0, 0] * scale).sum()


def test_an_input_that_is_as_long_as_the_batch_by_chance_is_explained() -> None:
    batch = tokens() | {"scale": torch.ones(BATCH)}
    on_one_rank(Scales(), batch)  # taken for one number a sample

    class Positions(Tiny):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(ids, labels) + (self.table(ids)[:, :, 0] * scale).sum()

    message = "(?s)the batch size must be free.*use an example batch of another size"
    with pytest.raises(CaptureError, match=message):
        on_one_rank(Positions(), tokens(SEQ) | {"scale": torch.ones(SEQ)})
    on_one_rank(Positions(), tokens(BATCH) | {"scale": torch.ones(SEQ)})


def test_a_rank_that_fails_alone_in_capture_fails_its_peers(ranks: Any) -> None:
    first, second = refused(ranks, uncapturable, FailsOnOneRank)
    assert type(second) is CaptureError and "the disk is on fire" in str(second)
    assert type(first) is PeerError
    assert str(first).startswith("rank 1 failed: CaptureError: ")
    assert "the disk is on fire" in str(first)


def test_example_inputs_that_the_model_does_not_take_are_refused(ranks: Any) -> None:
    errors = refused(ranks, compiled, example_inputs=tokens() | {"mask": torch.ones(BATCH, SEQ)})
    alike(errors, CaptureError, "Tiny.forward does not take batch entry mask; remove it")


# --- ranks that differ --------------------------------------------------------------------------


def different(**changes: list[Any]) -> None:
    rank = dist.get_rank()
    compiled(**{name: values[rank] for name, values in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": ["dp2", "tp2"]}, "'tp2' against 'dp2'"),
        ({"plan": ["dp2", None]}, "has_plan=False.* against .*has_plan=True"),
        ({"memory_bytes": [None, 10**9]}, "memory_bytes=1000000000.* against .*memory_bytes=None"),
        ({"precision": [None, "bf16"]}, "precision='bf16'.* against .*precision=None"),
        ({"seed": [0, 1]}, "seed=1.* against .*seed=0"),
        ({"example_inputs": [tokens(8), tokens(4)]}, "batch of 4.* against .*batch of 8"),
    ],
    ids=str,
)
def test_ranks_that_ask_for_different_things_are_refused(
    ranks: Any, changes: dict[str, list[Any]], message: str
) -> None:
    errors = refused(ranks, different, **changes)
    alike(errors, PlanError, f"rank 1 differs from rank 0: .*{message}")


def different_models(only_meta: bool) -> None:
    if only_meta:
        with torch.device("meta" if dist.get_rank() else "cpu"):
            model = Tiny()
    else:
        model = Tiny(depth=2 + dist.get_rank())
    compiled(model, plan="dp2")


@pytest.mark.parametrize(
    ("only_meta", "message"),
    [
        (False, "5 layers.* against .*4 layers"),
        (True, "14 of 14 tensors on meta.* against .* 0 of 14"),
    ],
    ids=["depth", "meta"],
)
def test_ranks_with_different_models_are_refused(
    ranks: Any, only_meta: bool, message: str
) -> None:
    alike(refused(ranks, different_models, only_meta), PlanError, message)


# --- steps --------------------------------------------------------------------------------------


def one_less(batch: Any) -> Any:
    return {name: value[1:] for name, value in batch.items()}


def shorter(batch: Any) -> Any:
    return {name: value[:, 1:] for name, value in batch.items()}


def without_labels(batch: Any) -> Any:
    return {"ids": batch["ids"]}


def with_mask(batch: Any) -> Any:
    return batch | {"mask": batch["ids"]}


def other_dtype(batch: Any) -> Any:
    return batch | {"ids": batch["ids"].int()}


def as_list(batch: Any) -> Any:
    return batch | {"ids": batch["ids"].tolist()}


def as_tuple(batch: Any) -> Any:
    return tuple(batch.values())


BAD_BATCHES = {
    one_less: r"ids: expected shape \[4, 6\], got \[3, 6\]; .*see local_batch.*drop_last=True",
    shorter: r"ids: expected shape \[4, 6\], got \[4, 5\]",
    without_labels: r"expected the entries \['ids', 'labels'\].*, got \['ids'\]",
    with_mask: r"expected the entries \['ids', 'labels'\].*, got \['ids', 'labels', 'mask'\]",
    other_dtype: "ids: expected dtype torch.int64, got torch.int32; convert it",
    as_list: r"batch\['ids'\]: expected a tensor, got list",
    as_tuple: r"expected a dict with the entries \['ids', 'labels'\].*, got tuple",
}


def bad_batches_on_rank_1() -> None:
    parallel = compiled(plan="dp2.zero3")
    share = parallel.local_batch(tokens())
    first = dist.get_rank() == 0
    for change, message in BAD_BATCHES.items():
        for call in (parallel.step, parallel.evaluate):
            kind = PeerError if first else ShapeError
            said = f"rank 1 failed: ShapeError: .*{message}" if first else message
            with pytest.raises(kind, match=said):
                call(share if first else change(share))
    assert parallel.step(share) == parallel.evaluate(share)  # nothing was left behind
    with pytest.raises(ShapeError, match=r"'ids'\]: a global batch of 7 does not divide into 2"):
        parallel.local_batch(tokens(7))


def test_a_bad_batch_on_one_rank_is_refused_on_both(ranks: Any) -> None:
    ranks(2).run(bad_batches_on_rank_1)


def never_loaded() -> None:
    with torch.device("meta"):
        model = Tiny()
    parallel = compiled(model, plan="tp2")
    share = parallel.local_batch(tokens())
    for call in (parallel.step, parallel.evaluate):
        with pytest.raises(GalvatronError, match=r"14 parameters have no values yet.*on the meta"):
            call(share)


def test_a_meta_model_is_not_stepped_before_it_is_loaded(ranks: Any) -> None:
    ranks(2).run(never_loaded)


def infinite(plan: str) -> None:
    model = Tiny()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    parallel = compiled(model, plan=plan)
    before = [parameter.detach().clone() for parameter in parallel.parameters()]
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 1 is (nan|inf).*Lower the"):
        parallel.step(parallel.local_batch(tokens()))
    for parameter, value in zip(parallel.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, value)


def test_a_loss_that_is_not_finite_is_reported(ranks: Any) -> None:
    for plan in ("dp2.zero2; micro=2", "tp2"):
        ranks(2).run(infinite, plan)
