"""From a model's name to a plan: the numbers agree with each other and nothing beats the answer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from galvatron_compile import notation, planning
from galvatron_compile.cli import app
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.constraints import Constraints
from galvatron_compile.errors import InfeasibleError, NotationError, PlanError
from galvatron_compile.models import DecoderShape, Workable, load_shape
from galvatron_compile.passes.plan_prices import options_of
from galvatron_compile.planned import Planned
from galvatron_compile.plans import Plan
from galvatron_compile.study import Study

GIB = 2**30
CLUSTER = ClusterProfile.preset("2x2xA100-40GB")
RANKS, BATCH = 4, 16


def model(**changes: Any) -> Workable:
    shape = {
        "hidden": 1024, "layers": 6, "heads": 16, "kv_heads": 8, "ffn": 4096, "vocab": 8192,
        "max_positions": 1024, **changes,
    }  # fmt: skip
    return load_shape("tiny", DecoderShape(**shape), 1024, torch.bfloat16)


@cache
def study() -> Study:
    return Study.of(model(), CLUSTER, BATCH, None, "bf16", Constraints())


def planned(constraints: str = "", memory_bytes: int | None = None, **more: Any) -> Planned:
    return planning.plan(
        study(), CLUSTER, global_batch_size=BATCH, constraints=constraints,
        memory_bytes=memory_bytes, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def free() -> Planned:
    return planned(memory_bytes=4 * GIB, top=3)


def test_the_parts_of_the_price_add_up(free: Planned) -> None:
    predicted = free.plan.predicted
    assert sum(predicted["causes"].values()) == pytest.approx(predicted["step_ms"], rel=1e-6)
    assert predicted["memory_bytes"] == max(g["memory_bytes"] for g in predicted["groups"])
    assert predicted["memory_bytes"] <= 4 * GIB
    for group in predicted["groups"]:
        parts = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes")
        total = sum(group[part] for part in (*parts, "transient_bytes", "reserve_bytes"))
        assert group["memory_bytes"] == total
    # Model FLOPs: six per parameter and token, and attention.
    tokens_per_s = BATCH * 1024 / (predicted["step_ms"] / 1e3)
    assert predicted["tokens_per_s"] == pytest.approx(tokens_per_s)
    least = 6 * (model().num_parameters - 8192 * 1024) * tokens_per_s / RANKS / 312e12
    assert least < predicted["mfu"] < 1.3 * least


def test_nothing_beats_the_answer(free: Planned) -> None:
    """In simulation, which ranks the few that are best by the closed form, and the baselines."""
    best_ms = free.plan.predicted["simulated_ms"]
    others = [*free.alternatives, *free.baselines]
    assert len(free.alternatives) >= 2 and others
    for other in others:
        groups = other.plan.predicted["simulated"]["groups"]
        if max(group["peak_bytes"] for group in groups) <= 4 * GIB:
            assert other.plan.predicted["simulated_ms"] >= best_ms
        else:
            assert "over the limit in simulation" in other.why
    assert free.plan.predicted["ranking"].startswith("ranked by simulation: the best 3 of")
    names = [b.name for b in free.baselines] + [name for name, _ in free.unfit_baselines]
    assert len(names) == 3
    families = dict(free.rejected)
    assert all(f"pp={pp}" in families for pp in (1, 2, 4) if pp != free.plan.pp)


def test_pricing_the_answer_gives_the_price_of_the_search(free: Planned) -> None:
    text = notation.format(free.plan)
    again = planning.price(
        text, study(), CLUSTER, global_batch_size=BATCH, memory_bytes=4 * GIB
    )
    assert again.predicted["step_ms"] == free.plan.predicted["step_ms"]
    assert again.predicted["memory_bytes"] == free.plan.predicted["memory_bytes"]
    assert Plan.from_json(free.plan.to_json()).predicted["step_ms"] == again.predicted["step_ms"]
    assert "ms a step" in str(free) and text in str(free)


def test_more_memory_is_never_slower() -> None:
    found = planned(memory_bytes=4 * GIB, curve=True)
    curve = found.plan.predicted["tradeoff"]
    assert len(curve) >= 4
    steps = [point["step_ms"] for point in curve]
    assert steps == sorted(steps, reverse=True)
    at_limit = next(p for p in curve if p["memory_bytes"] == 4 * GIB)
    # The curve is the closed form's; the plan is the best of a few in simulation.
    plans = [found.plan, *(other.plan for other in found.alternatives)]
    least = min(plan.predicted["step_ms"] for plan in plans)
    assert at_limit["step_ms"] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize(
    "text", ["pp=4", "zero!=3; tp=1; pp<=2", "tp>=2; sp=yes; pp=1", "recompute=full; pp=2; micro=8"]
)
def test_constraints_are_honoured_and_reported(text: str) -> None:
    found = planned(text)
    rules = Constraints.parse(text)
    assert rules.allows("pp", found.plan.pp)
    assert rules.allows("micro", found.plan.num_micro_batches)
    assert all(map(rules.allows_strategy, found.plan.strategies))
    assert f"constraints honoured: {text}" in str(found)


def test_layers_kept_together_share_a_stage() -> None:
    found = planned("pp=4; together=0-4")
    ends = [stage.last - 1 for stage in found.plan.stages]
    assert not set(ends) & {0, 1, 2, 3}


def test_baselines_keep_together_what_must_be() -> None:
    found = planned("pp=2; schedule=1f1b; together=0-5")
    best_ms = found.plan.predicted["simulated_ms"]
    assert all(other.plan.predicted["simulated_ms"] >= best_ms for other in found.baselines)
    assert all(other.plan.stages[0].last not in range(1, 6) for other in found.baselines)


def test_a_schedule_that_is_asked_for_is_used() -> None:
    found = planned("schedule=zero-bubble")
    assert found.plan.pp > 1 and found.plan.schedule == "zero-bubble"
    assert found.plan.predicted["simulated_ms"] > 0


def test_divided_sequences_that_are_asked_for_are_offered() -> None:
    found = planned("cp=2; micro=1; pp=1")  # 16 samples would do for 4 ranks
    assert {strategy.cp for strategy in found.plan.strategies} == {2}


def test_contradictions_and_limits_are_refused_with_the_remedy() -> None:
    with pytest.raises(PlanError, match=r"constraints \(pp=3\) leave no pipeline.*relax"):
        planned("pp=3")
    with pytest.raises(PlanError, match="tp=16"):
        planned("tp=16; pp=1")
    with pytest.raises(InfeasibleError, match=r"smallest limit that would do is [\d.]+ GiB"):
        planned(memory_bytes=int(1.7 * GIB))
    with pytest.raises(InfeasibleError, match="leaves nothing beside"):
        planned(memory_bytes=GIB)


def test_the_smallest_limit_named_is_enough() -> None:
    with pytest.raises(InfeasibleError) as error:
        planned(memory_bytes=int(1.7 * GIB))
    needed = int(str(error.value).split("(")[1].split(" bytes")[0])
    assert planned(memory_bytes=needed).plan.predicted["memory_bytes"] <= needed
    with pytest.raises(InfeasibleError):
        planned(memory_bytes=needed - 1)


def test_a_study_under_narrow_constraints_refuses_wider_ones() -> None:
    narrow = Study.of(model(layers=2), CLUSTER, BATCH, None, "bf16", Constraints.parse("tp=1"))
    assert narrow.under(Constraints.parse("tp=1; pp=2"), None).families()
    with pytest.raises(PlanError, match="make a new study"):
        narrow.under(Constraints(), None)


def test_long_sequences_are_divided_when_samples_run_out() -> None:
    long = load_shape(
        "long",
        DecoderShape(
            hidden=512, layers=2, heads=8, kv_heads=8, ffn=2048, vocab=1024, max_positions=8192
        ),
        8192,
        torch.bfloat16,
    )
    found = planning.plan(long, CLUSTER, global_batch_size=1)
    blocks = [s for s in found.plan.strategies if s.ulysses * s.cp > 1]
    causes = found.plan.predicted["causes"]
    assert blocks and causes["context_comm_ms"] > 0
    alone = planning.plan(
        long, CLUSTER, global_batch_size=1, constraints="ulysses=1; cp=1"
    )
    assert alone.plan.predicted["step_ms"] > found.plan.predicted["step_ms"]


def test_experts_are_divided_when_they_do_not_fit() -> None:
    experts = model(layers=2, experts=8, experts_per_token=2)
    whole = planning.price("dp4", experts, CLUSTER, global_batch_size=BATCH)
    parts = planning.price(
        "all: dp4; blocks: ep4.dp4", experts, CLUSTER, global_batch_size=BATCH
    )
    assert parts.predicted["causes"]["expert_comm_ms"] > 0
    assert whole.predicted["causes"]["expert_comm_ms"] == 0
    before, after = (p.predicted["layers"][1]["state_bytes"] for p in (whole, parts))
    assert after < 0.5 * before  # experts are most of a block
    with pytest.raises(NotationError, match="ep3 does not divide"):
        notation.parse("ep3", ("a",), 4, BATCH)


def test_selective_recompute_lies_between_none_and_full() -> None:
    prices = [
        planning.price(f"dp4{word}", study(), CLUSTER, global_batch_size=BATCH).predicted
        for word in ("", ".selective", ".recompute")
    ]
    assert prices[0]["step_ms"] < prices[1]["step_ms"] < prices[2]["step_ms"]
    saved = [price["groups"][0]["saved_bytes"] for price in prices]
    assert saved[0] > saved[1] > saved[2]


def test_the_study_prices_what_the_searcher_sees() -> None:
    found = study().under(Constraints.parse("pp=2; micro=4"), None)
    (problem, *_) = found.problems()
    plan = notation.parse("dp2.zero1; pp=2; micro=4", found.layer_names, RANKS, BATCH)
    ours = found.pricer.problem(plan)
    option = problem.costs.strategies.index(plan.strategies[0])
    for name in ("micro_ns", "step_ns", "state_bytes", "saved_bytes", "transient_bytes"):
        theirs = getattr(problem.costs, name)[:, option]
        assert theirs.tolist() == getattr(ours.costs, name)[:, options_of(plan, ours)[0]].tolist()


def test_the_command_line_plans_prices_and_refuses(tmp_path: Path) -> None:
    runner = CliRunner()
    base = ["plan", "gpt2", "--cluster", "1x2xL4", "--global-batch", "16", "--seq", "256"]
    out = tmp_path / "plan.json"
    done = runner.invoke(app, [*base, "--json", "--out", str(out), "--where", "pp<=2"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    wanted = {"step_ms", "tokens_per_s", "mfu", "peak_memory_bytes", "search_s", "plan"}
    assert wanted | {"alternatives", "baselines", "warnings"} <= record.keys()
    assert record["warnings"] and "NOT MEASURED" in record["warnings"][0]
    assert Plan.load(out).predicted["step_ms"] == record["step_ms"]
    priced = runner.invoke(app, [*base, "--notation", record["notation"], "--json"])
    assert json.loads(priced.stdout)["predicted"]["step_ms"] == record["step_ms"]
    for arguments, message in (
        (["plan", "gpt2"], "plan needs --cluster and --global-batch"),
        (["plan", "gtp2", *base[2:]], "gpt2"),
        ([*base[:3], "1x2xL5", *base[4:]], "no preset"),
        ([*base, "--where", "pp=5"], "relax"),
        ([*base, "--memory", "lots"], "36GiB"),
        ([*base, "--notation", "dp2", "--curve"], "--curve mean nothing with --notation"),
        (["plan", "gpt2", "--from-galvatron", "x"], "MODEL mean nothing"),
        (["price", "dp2", "--model", "gpt2"], "price needs --cluster and --global-batch"),
    ):
        refused = runner.invoke(app, arguments)
        assert refused.exit_code == 2 and message in refused.output, refused.output
