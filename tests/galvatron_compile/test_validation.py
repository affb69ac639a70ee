"""Validation: the table refuses what is wrong, runs become plans, the measures are right."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from galvatron_compile import notation
from galvatron_compile.commands import validate as command
from galvatron_compile.errors import PlanError, UnsupportedError
from galvatron_compile.validation import Prediction, Run, read_table, report
from galvatron_compile.validation.metrics import (
    Errors,
    Metrics,
    Pair,
    ranks,
    regret,
    spearman,
)
from galvatron_compile.validation.outliers import fit, model_flops_per_token, outliers, peak_share
from galvatron_compile.validation.plot import plot
from galvatron_compile.validation.report import ALL, CALIBRATION, WITHOUT
from galvatron_compile.validation.table import COLUMNS

ROW: dict[str, Any] = {
    "source": "here", "model": "gpt", "gpu": "A100-SXM4-80GB", "num_gpus": 8, "gpus_per_node": 8,
    "hidden": 64, "layers": 8, "heads": 4, "kv_heads": 4, "ffn": 256, "vocab": 1000, "seq": 128,
    "global_batch": 32, "micro_batch": 2, "tp": 2, "pp": 2, "dp": 2, "cp": 1, "zero": 1,
    "recompute": "full", "dtype": "fp16", "step_ms": 100.0, "peak_memory_gib": "", "notes": "",
}  # fmt: skip
SHARED = Path("../shared/data/published/measured_runs.csv")


def table(path: Path, *changes: dict[str, Any], drop: str = "") -> Path:
    rows = [{**ROW, **change} for change in changes or ({},)]
    names = [name for name in dict.fromkeys(k for row in rows for k in row) if name != drop]
    file = path / "runs.csv"
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def run(**changes: Any) -> Run:
    values = {**ROW, **changes}
    gib = values.pop("peak_memory_gib")
    return Run(row=values.pop("row", 2), memory_bytes=gib * 2**30 if gib else None, **values)


# --- the table ---------------------------------------------------------------------------------


def test_a_table_is_read_with_its_blanks(tmp_path: Path) -> None:
    first, second = read_table(
        table(tmp_path, {"peak_memory_gib": 2.5}, {"micro_batch": "", "notes": "compile, eager"})
    )
    assert (first.row, first.memory_bytes, first.micro_batch) == (2, 2.5 * 2**30, 2)
    assert (second.row, second.memory_bytes, second.micro_batch) == (3, None, None)
    assert second.notes == "compile, eager"


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match=f"lacks the column {name};.*must be there"):
        read_table(table(tmp_path, drop=name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": "wide"}, "row 3: hidden must be a whole number from 1 on, got 'wide'"),
        ({"tp": 0}, "row 3: tp must be a whole number from 1 on, got '0'"),
        ({"step_ms": "nan"}, "row 3: step_ms must be a number above 0, got 'nan'"),
        ({"step_ms": ""}, "row 3: step_ms must be a number above 0, it is blank"),
        ({"peak_memory_gib": -1}, "row 3: peak_memory_gib must be a number above 0"),
        ({"dp": 4}, "row 3: tp2 x pp2 x dp4 x cp1 are 16 GPUs, but num_gpus is 8"),
        ({"global_batch": 30}, "row 3: a global batch of 30 does not split.*multiple of 4"),
        ({"recompute": "some"}, "row 3: recompute must be none or selective or full"),
        ({"dtype": "int8"}, "row 3: dtype must be bf16 or fp16"),
        ({"model": "resnet"}, "row 3: model 'resnet' is of no known family"),
        ({"gpu": "A200-80GB"}, "row 3: no preset for GPU 'A200-80GB'; did you mean A100-80GB"),
        ({"heads": 5}, "row 3: 5 heads do not divide a hidden size of 64"),
        ({"zero": 4}, "row 3: ZeRO stage must be 0, 1, 2 or 3"),
        ({"pp": 16, "tp": 1, "dp": 1, "num_gpus": 16, "zero": 0}, "8 layers do not fill 16 stages"),
        ({"num_gpus": 12, "dp": 3, "global_batch": 36}, "row 3: 12 GPUs do not fill nodes of 8"),
        ({"schedule": "best"}, "row 3: schedule 'best' is not known"),
        ({"sequence_parallel": "maybe"}, "row 3: sequence_parallel must be yes or no"),
    ],
)
def test_a_bad_row_is_named_with_the_remedy(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        read_table(table(tmp_path, {}, change))


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    with pytest.raises(PlanError, match="cannot read"):
        read_table(file)
    file.write_text("")
    with pytest.raises(PlanError, match="is empty; its first line names the columns source, "):
        read_table(file)
    file.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(PlanError, match="a header but no runs"):
        read_table(file)
    file.write_text(",".join(COLUMNS) + "\n" + "here,gpt\n")
    with pytest.raises(PlanError, match="row 2: the number of values is not the header's 24"):
        read_table(file)
    file.write_text(",".join([*COLUMNS, "tp"]) + "\n")
    with pytest.raises(PlanError, match="has the column tp twice"):
        read_table(file)
    renamed = table(tmp_path, {"gpus": 8}, drop="num_gpus")
    with pytest.raises(PlanError, match="lacks the column num_gpus"):
        read_table(renamed)
    with pytest.raises(PlanError, match="unknown column 'remark'; known"):
        read_table(table(tmp_path, {"remark": "x"}))
    with pytest.raises(PlanError, match="lacks the column micro_batch; rename 'micro_batchs'"):
        read_table(table(tmp_path, {"micro_batchs": 2}, drop="micro_batch"))


# --- a run in our terms ------------------------------------------------------------------------


def test_a_run_is_a_plan_with_the_head_in_the_last_stage() -> None:
    plan = run().plan()
    blocks, ends = "tp2.dp2.zero1.recompute", "tp2.dp2.zero1"  # only blocks are recomputed
    assert notation.format(plan) == f"all: {blocks}; 0,9-10: {ends}; micro=8; stages=5,6"
    names = plan.layers
    assert names[0] == "embedding" and names[-2:] == ("norm", "head") and len(names) == 11
    again = notation.parse(notation.format(plan), names, 8, 32)
    assert again.strategies == plan.strategies and again.stages == plan.stages
    assert run(pp=1, tp=4).plan().stages == ()


def test_sequence_parallel_and_attention_are_those_of_the_time() -> None:
    old, selective, modern = run(), run(recompute="selective"), run(dtype="bf16")
    assert [r.strategy.sequence_parallel for r in (old, selective, modern)] == [False, True, True]
    assert [r.shape.attention for r in (old, selective, modern)] == ["eager", "eager", "sdpa"]
    assert not run(dtype="bf16", sequence_parallel=False).strategy.sequence_parallel
    assert not run(dtype="bf16", tp=1, dp=4).strategy.sequence_parallel
    llama = run(model="llama3-8B", kv_heads=2).shape
    assert (llama.norm, llama.mlp, llama.positions) == ("rms", "swiglu", "rotary")
    assert not llama.tied
    assert (old.shape.norm, old.shape.biases, old.shape.tied) == ("layer", "all", True)


def test_fewer_micro_batches_than_stages_run_as_gpipe() -> None:
    short = run(pp=4, tp=1, dp=2, global_batch=8)
    assert short.plan().num_micro_batches == 2 and short.plan().schedule == "gpipe"
    assert run().plan().schedule == "1f1b"


def test_an_unreported_micro_batch_leaves_those_that_divide() -> None:
    unknown = run(micro_batch=None, global_batch=24)
    assert unknown.micro_batches == (1, 2, 4)
    assert [unknown.plan(size).num_micro_batches for size in (1, 2, 4)] == [12, 6, 3]


@pytest.mark.parametrize(
    ("gpu", "preset"),
    [("A100-SXM4-80GB", "A100-80GB"), ("A100-SXM4-40GB", "A100-40GB"), ("H200-SXM", "H200"),
     ("H100-SXM-96GB-HBM2e-500W", "H100")],
)  # fmt: skip
def test_gpus_are_found_among_the_presets(gpu: str, preset: str) -> None:
    assert run(gpu=gpu).cluster == f"1x8x{preset}"
    assert run(gpu=gpu, num_gpus=2, dp=1, tp=1, zero=0).cluster == f"1x2x{preset}"
    assert run(gpu=gpu, num_gpus=32, dp=8).cluster == f"4x8x{preset}"


# --- measures ----------------------------------------------------------------------------------


def pair(measured: float, predicted: float, memory: tuple[float, float] | None = None,
         **changes: Any) -> Pair:  # fmt: skip
    gib, guess = memory or (0.0, None)
    of = run(step_ms=measured, peak_memory_gib=gib, **changes)
    return Pair(of, Prediction(predicted, None if guess is None else guess * 2**30))


def test_errors_by_hand() -> None:
    pairs = [pair(100, 110), pair(200, 150), pair(50, 50, (10.0, 12.0))]
    found = Metrics.of(pairs)
    assert found.time is not None and found.memory is not None
    assert found.time.mean == pytest.approx((0.1 + 0.25 + 0) / 3)
    assert found.time.median == pytest.approx(0.1)
    assert found.time.bias == pytest.approx((0.1 - 0.25) / 3)
    assert (found.time.worst, found.time.number) == (pytest.approx(0.25), 3)
    assert found.memory == Errors(1, *[pytest.approx(0.2)] * 4)
    nothing = Metrics.of([])
    assert (nothing.time, nothing.memory, nothing.rank, nothing.regret) == (None,) * 4


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [9, 7, 5, 1]) == pytest.approx(-1)
    # ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * (1 + 1 + 1 + 1 + 0) / (5 * 24)
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(1 - 24 / 120)
    # ranks 1.5 1.5 3 against 1 2 3
    assert spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert ranks([7, 7, 9, 3]).tolist() == [2.5, 2.5, 4, 1]


def test_ranks_and_regret_count_within_workloads() -> None:
    perfect = [pair(10, 1), pair(20, 2), pair(30, 3)]
    turned = [pair(m, p, layers=16) for m, p in ((100, 3), (120, 2), (150, 1))]
    alike = [pair(m, 1, layers=24) for m in (10, 20, 40)]
    two = [pair(10, 2, layers=32), pair(11, 1, layers=32)]
    found = Metrics.of([*perfect, *turned, *alike, *two])
    assert found.rank is not None and found.regret is not None
    assert (found.rank.number, found.rank.least, found.rank.most) == (3, -1.0, 1.0)
    assert found.rank.mean == pytest.approx(0) and found.rank.median == pytest.approx(0)
    # nothing lost, half lost, the worst of what is predicted alike, a tenth lost
    assert found.regret.number == 4
    assert found.regret.mean == pytest.approx((0 + 0.5 + 3.0 + 0.1) / 4)
    assert found.regret.most == pytest.approx(3.0)
    assert regret([pair(5, 9)]) == 0
    assert Metrics.of([pair(m, 1, num_gpus=n, dp=n // 4, zero=0, global_batch=32)
                       for m, n in ((1, 4), (2, 8), (3, 16))]).rank is None  # fmt: skip


# --- outliers ----------------------------------------------------------------------------------


def law(layer_ms: float = 2.0, head_ms: float = 3.0, **changes: Any) -> Run:
    """A run that takes exactly what its form's law says."""
    of = run(**changes)
    number = of.plan().num_micro_batches
    own = of.layers / of.pp
    step = (number + of.pp - 1) * own * layer_ms + number * head_ms + own + 4
    return run(**{**changes, "step_ms": step * changes.get("step_ms", 1.0)})


def form(**one: Any) -> list[Run]:
    cases = [(pp, layers, batch) for pp in (1, 2, 4) for layers in (8, 12, 16) for batch in (8, 16)]
    return [
        law(row=row, pp=pp, num_gpus=2 * pp, dp=1, zero=0, layers=layers, global_batch=batch,
            **(one if row == 7 else {}))
        for row, (pp, layers, batch) in enumerate(cases, start=2)
    ]  # fmt: skip


def test_a_run_off_the_law_of_its_like_is_an_outlier() -> None:
    assert outliers(form()) == ()
    (found,) = outliers(form(step_ms=1.3))
    assert found.row == 7 and found.why.startswith("+30.0% off the law of 18 runs")
    assert outliers(form(step_ms=1.03)) == ()  # less than repeated runs may differ by
    assert outliers(form(step_ms=1.3)[:7]) == ()  # too few to have a law


def test_a_run_faster_than_the_hardware_is_an_outlier() -> None:
    good = run(hidden=4096, heads=32, kv_heads=32, ffn=16384, layers=32, seq=2048, step_ms=4000)
    flops = model_flops_per_token(good.shape, 2048) * 2048 * 32
    parameters = good.shape.num_parameters - 2048 * 4096
    assert flops == pytest.approx((6 * parameters + 6 * 32 * 4096 * 2048) * 2048 * 32, rel=2e-3)
    assert peak_share(good) == pytest.approx(flops / 4.0 / (8 * 312e12))
    (found,) = outliers([run(hidden=4096, heads=32, kv_heads=32, ffn=16384, layers=32, seq=2048,
                             step_ms=900)])  # fmt: skip
    assert found.why.endswith("of the GPUs' peak")


def test_the_fit_ignores_a_bad_row() -> None:
    import numpy as np

    terms = np.array([[1.0, x] for x in range(1, 9)])
    measured = 5 + 2.0 * np.arange(1, 9)
    measured[3] *= 2
    residuals = fit(terms, measured)
    assert residuals[3] == pytest.approx(1.0, abs=1e-3)
    assert abs(np.delete(residuals, 3)).max() < 1e-3


# --- report ------------------------------------------------------------------------------------


def half(of: Run) -> Prediction:
    if of.layers == 24:
        raise UnsupportedError("24 layers are too many")
    return Prediction(of.step_ms / 2, 2.0**30)


def test_a_report_tells_sources_outliers_failures_and_calibration_apart() -> None:
    runs = [*form(step_ms=1.3), run(row=30, source="there"), run(row=31, layers=24),
            run(row=32, source="there", layers=12, step_ms=77)]  # fmt: skip
    found = report(runs, half, lambda of: of.layers == 12 and of.source == "there")
    assert list(found.metrics) == ["here", "there", ALL, WITHOUT, CALIBRATION]
    numbers = [metrics.time.number for metrics in found.metrics.values() if metrics.time]
    assert numbers == [18, 1, 19, 18, 1]
    assert found.failures == ((31, "24 layers are too many"),)
    text = str(found)
    assert "row 31: 24 layers are too many" in text and "row 7: +30.0% off the law" in text
    everything = text.splitlines()[3].split()
    assert everything == [ALL, "19", "50.0%", "50.0%", "-50.0%", "50.0%", "0", "-", "-", "-"]
    document = json.loads(json.dumps(found.to_dict()))
    assert document["metrics"][ALL]["time"]["median"] == 0.5
    assert [r["row"] for r in document["runs"] if not r["counted"]] == [32]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pairs = [Pair(of, half(of)) for of in form()]
    plot(pairs, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UnsupportedError, match=r"cannot write a picture as \.docx"):
        plot(pairs, tmp_path / "a.docx")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command with a predictor that halves, or with a profile gives 1 ms."""
    app = typer.Typer()
    app.command()(command.validate)

    def predictor(table: Path, clusters: Any) -> Any:
        return lambda of: Prediction(1.0) if of.gpu in clusters else half(of), None

    monkeypatch.setattr(command, "predictor", predictor)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = table(tmp_path, {}, {"step_ms": 200}, {"step_ms": 300})
    shown = cli(file, "--plot", tmp_path / "p.svg")
    assert shown.exit_code == 0 and "50.0%" in shown.output
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    document = json.loads(cli(file, "--json").output)
    assert document["metrics"]["here"]["rank"]["mean"] == 1.0
    profile = tmp_path / "c.json"
    profile.write_text("{}")
    changed = cli(file, "--json", "--cluster-override", f"A100-SXM4-80GB={profile}")
    assert {r["predicted_ms"] for r in json.loads(changed.output)["runs"]} == {1.0}


def test_the_command_says_what_to_change(tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = table(tmp_path)
    for words, message in [
        ([tmp_path / "absent.csv"], "cannot read"),
        ([file, "--cluster-override", "A100"], "must read GPU=PROFILE"),
        ([file, "--cluster-override", "L4=x.json"], "has no GPU 'L4'"),
        ([file, "--cluster-override", "A100-SXM4-80GB=x.json"], "no profile x.json"),
    ]:
        refused = cli(*words)
        assert refused.exit_code == 2 and message in refused.output, refused.output
    refused = cli(table(tmp_path, {"dp": 3}))
    assert refused.exit_code == 2 and "row 2: tp2 x pp2 x dp3" in refused.output


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_the_shared_table_is_read_and_has_no_outliers_of_its_own() -> None:
    runs = read_table(SHARED)
    assert len(runs) == 371 and len({of.workload for of in runs}) == 123 + 3 + 5
    assert {of.cluster.split("x")[-1] for of in runs} == {"A100-80GB", "H100"}
    assert all(0.005 < peak_share(of) < 0.7 for of in runs)
    assert outliers(runs) == ()
