"""What cannot be done is refused on every rank at once, with a message that says what to do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import galvatron_compile as gc
from galvatron_compile.errors import (
    CaptureError,
    GalvatronError,
    InfeasibleError,
    NonFiniteLossError,
    NotationError,
    PeerError,
    PlanError,
    ProfileError,
    ShapeError,
    UnsupportedError,
)

SEQ, VOCAB, BATCH = 6, 20, 8


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, hidden = x.shape
        heads = self.qkv(self.norm(x)).view(b, s, 3, self.heads, hidden // self.heads)
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(b, s, hidden))


class Tiny(nn.Module):
    """Two blocks; returns its loss."""

    def __init__(
        self,
        hidden: int = 16,
        heads: int = 2,
        vocab: int = VOCAB,
        depth: int = 2,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(batch: int = BATCH, seq: int = SEQ) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (batch, seq), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


def compiled(model: Any = None, **changes: Any) -> Any:
    """``gc.compile`` of the tiny model on the ranks of the case, with what a test changes."""
    dist.barrier()  # so that a peer's failure can only come from the call under test
    arguments = {"example_inputs": tokens(), "measure": False} | changes
    profile = arguments.pop("profile", gc.ClusterProfile.preset("2xH100"))
    return gc.compile(model or Tiny(), profile, **arguments)


def refused(ranks: Any, case: Callable[..., Any], *args: Any, **changes: Any) -> list[Exception]:
    """What each of two ranks raised; all must have, without waiting for a timeout."""
    errors = ranks(2).errors(partial(case, *args, **changes), timeout_s=60.0)
    assert [type(error).__name__ for error in errors if error is None] == []
    assert not any("gave no answer" in str(e) or "was ended" in str(e) for e in errors), errors
    return errors


def alike(errors: list[Exception], kind: type[Exception], *patterns: str) -> None:
    """Every rank raised the same kind of error by itself, saying all of this."""
    for error in errors:
        assert type(error) is kind, errors
        for pattern in patterns:
            assert re.search(pattern, str(error)), str(error)


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


# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(ranks: Any) -> gc.Plan:
    return ranks(2).run(lambda: compiled(plan="dp2").plan)[0]


def other_model(plan: gc.Plan, **sizes: int) -> None:
    compiled(Tiny(**sizes), plan=plan)


@pytest.mark.parametrize("sizes", [{"depth": 3}, {"hidden": 32}], ids=str)
def test_a_plan_for_another_model_is_refused(ranks: Any, plan: Any, sizes: dict[str, int]) -> None:
    message = f"plan is for another model .fingerprint {plan.model}, .*search a new plan"
    alike(refused(ranks, other_model, plan, **sizes), PlanError, message)


def test_a_plan_for_another_world_size_or_batch_is_refused(ranks: Any, plan: Any) -> None:
    wide = replace(plan, world_size=4, strategies=(gc.Strategy(dp=4),) * len(plan.layers))
    message = "plan is for another world size: 4 ranks, but there are 2; launch 4 processes"
    alike(refused(ranks, compiled, plan=wide), PlanError, message)
    message = "plan is for another global batch size: 8, but it is 16; pass global_batch_size=8"
    alike(refused(ranks, compiled, plan=plan, global_batch_size=16), PlanError, message)


def broken_plans(plan: gc.Plan) -> dict[str, tuple[str, str]]:
    """Texts of plan files by name, each with what its refusal must say."""
    good = json.loads(plan.to_json())
    layer = {**good["layers"][1], "zero": 7}
    typo = {("num_microbatches" if key == "num_micro_batches" else key): good[key] for key in good}
    return {
        "cut.json": (plan.to_json()[:40], "cut.json: plan is not valid JSON: .* line 3 column"),
        "zero7.json": (
            json.dumps(good | {"layers": [good["layers"][0], layer, *good["layers"][2:]]}),
            r"layers\[1\]: ZeRO stage must be 0, 1, 2 or 3, got 7",
        ),
        "typo.json": (json.dumps(typo), "plan lacks the field 'num_micro_batches'"),
        "newer.json": (json.dumps(good | {"version": 99}), "schema version 99, this version reads"),
        "list.json": ("[]", "plan must be an object"),
    }


def test_malformed_plan_files_are_refused(ranks: Any, plan: Any, tmp_path: Path) -> None:
    for name, (text, message) in broken_plans(plan).items():
        (tmp_path / name).write_text(text)
        errors = refused(ranks, compiled, plan=tmp_path / name)
        alike(errors, PlanError, re.escape(str(tmp_path / name)), message)
    gone = str(tmp_path / "gone.json")
    alike(refused(ranks, compiled, plan=gone), PlanError, f"no plan at {gone}; save one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ulysses2", "Ulysses sequence parallel is not executed by this version"),
        ("cp2", "leave cp2 out"),
        ("dp2.ep2", "expert parallel is not executed by this version"),
        ("dp2.selective", "selective recompute is not executed by this version"),
    ],
)
def test_what_the_planner_knows_and_the_runtime_does_not_is_refused(
    ranks: Any, text: str, message: str
) -> None:
    alike(refused(ranks, compiled, plan=text), UnsupportedError, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp1; pp=2", "1f1b over 2 groups needs at least 2 micro-batches, got 1; use gpipe"),
        (
            "dp1; stages=1,1,1,1; virtual=2; schedule=interleaved",
            "interleaved over 2 groups needs at least 2 micro-batches, got 1; use gpipe",
        ),
    ],
)
def test_schedules_that_do_not_fit_the_batch_are_refused(
    ranks: Any, text: str, message: str
) -> None:
    alike(refused(ranks, compiled, plan=text), PlanError, message)


@pytest.mark.parametrize(
    ("text", "kind", "message", "at"),
    [
        ("all: dp2; blocks: tp2.zreo3", NotationError, "did you mean 'zero3'?", "zreo3"),
        ("tp4", NotationError, "tp4 does not divide 2 ranks; use a divisor of 2", "tp4"),
        ("all: dp2; 9: tp2", NotationError, "layer 9 does not exist; layers are 0-3", "9"),
        ("dp2; micro=x", NotationError, "expected a whole number from 1 on, got 'x'", "x"),
        ("tp2.pp2", NotationError, "write '; pp=2' after the strategies", "pp2"),
    ],
)
def test_malformed_notation_is_refused_with_a_caret_under_it(
    ranks: Any, text: str, kind: type[Exception], message: str, at: str
) -> None:
    errors = refused(ranks, compiled, plan=text)
    alike(errors, kind, re.escape(message))
    for error in errors:
        _, line, caret = str(error).splitlines()
        assert line.strip() == text
        assert line[caret.index("^") :].startswith(at)


def tied_apart() -> None:
    compiled(Tiny(tied=True), plan="all: dp2; head: tp2")


def test_tied_layers_with_different_strategies_are_refused(ranks: Any) -> None:
    alike(
        refused(ranks, tied_apart),
        PlanError,
        "layers with tied parameters need one strategy, got embedding: dp2, head: tp2",
    )


def heads_apart() -> None:
    compiled(Tiny(15, 3, 21), example_inputs=tokens(4, 5), plan="tp2")


def test_a_plan_that_the_model_cannot_be_split_by_is_refused(ranks: Any) -> None:
    message = "strategy tp2 is not possible.*: tp2 splits no parameter of this model"
    alike(refused(ranks, heads_apart), UnsupportedError, message)


# --- profiles -----------------------------------------------------------------------------------


def with_profile(path: Path) -> None:
    compiled(profile=gc.ClusterProfile.load(path))


def test_malformed_profiles_are_refused(ranks: Any, tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    gc.ClusterProfile.preset("2xH100").save(good)
    fields = json.loads(good.read_text())
    for number, (changes, message) in enumerate(
        [
            ({"name": 3}, "name must be a text, got 3"),
            ({"schema": 99}, "schema is 99, this version reads"),
            ({"memory": {"value": -1, "source": "measured"}}, "it must be positive"),
            ({"colour": "red"}, "colour is not a field"),
        ]
    ):
        path = tmp_path / f"bad{number}.json"
        path.write_text(json.dumps(fields | changes))
        alike(refused(ranks, with_profile, path), ProfileError, re.escape(str(path)), message)
    cut = tmp_path / "cut.json"
    cut.write_text(good.read_text()[:50])
    alike(refused(ranks, with_profile, cut), ProfileError, "cut.json: not JSON: .* line 4")
    alike(
        refused(ranks, with_profile, tmp_path / "gone.json"),
        ProfileError,
        "cannot read the cluster profile .*gone.json",
        "make one with galvatron-compile profile",
    )


def test_a_profile_of_fewer_ranks_is_refused(ranks: Any) -> None:
    profile = gc.ClusterProfile.preset("1xH100")
    message = "describes 1 x 1 ranks, but rank 1 was asked for; profile the cluster that will train"
    alike(refused(ranks, compiled, profile=profile), ProfileError, message)


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
