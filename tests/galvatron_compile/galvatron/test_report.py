"""The report of a planned profile: what it says, what it refuses, what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galvatron_compile import notation
from galvatron_compile.errors import InfeasibleError, ProfileError
from galvatron_compile.galvatron import plans
from galvatron_compile.galvatron.formulas import MB, Workload
from galvatron_compile.galvatron.pricing import price
from galvatron_compile.galvatron.report import memory_limit, plan_from_galvatron, workload
from galvatron_compile.galvatron.text import describe_plan
from galvatron_compile.plans import Plan

Files = dict[str, dict[str, Any]]
Written = Callable[[Files], Path]
GIB = 1024 * MB


def planned(folder: Path, memory_bytes: int = 100 * GIB, **options: Any) -> dict[str, Any]:
    shape = {"num_layers": 4, "hidden_size": 64, **options}
    return plan_from_galvatron(folder, 4, 128, 8, memory_bytes, **shape)


def test_the_report_holds_together(files: Files, written: Written) -> None:
    report = planned(written(files))
    json.dumps(report, allow_nan=False)
    plan = Plan.from_json(json.dumps(report["plan"]))
    assert notation.format(plan) == report["notation"]
    assert plan.predicted["step_ms"] == report["step_ms"]
    assert plan.predicted["memory_bytes"] == max(report["peak_memory_bytes"])
    assert report["tokens_per_s"] == pytest.approx(8 * 128 / report["step_ms"] * 1e3)
    assert report["mfu"] is None and "which GPU" in report["mfu_reason"]
    assert report["galvatron_plan_step_ms"] is None
    assert report["fits"] and len(report["peak_memory_bytes"]) == plan.pp
    again = plans.loads(json.dumps(report["galvatron_plan"]), 4)
    assert again.strategies == plan.strategies
    work = workload(written(files), 4, 128, 8, 4, 64)
    assert price(work, again).step_ms == report["step_ms"]


def test_alternatives_are_priced_and_told_apart(files: Files, written: Written) -> None:
    folder = written(files)
    report = planned(folder)
    behind = [record["behind_percent"] for record in report["alternatives"]]
    assert behind == sorted(behind) and behind[0] >= 0
    assert all(record["why"] for record in report["alternatives"])
    names = [record["name"] for record in report["alternatives"]]
    assert "one strategy for all layers" in names and "pp=2, micro=4" in names
    work = workload(folder, 4, 128, 8, 4, 64)
    for record in report["alternatives"]:
        plan = notation.parse(record["notation"], plans.layer_names(4), 4, 8)
        assert price(work, plan).step_ms == record["step_ms"]
    assert len(planned(folder, top=2)["alternatives"]) == 2


def test_a_family_that_does_not_fit_says_what_it_needs(files: Files, written: Written) -> None:
    folder = written(files)
    with pytest.raises(InfeasibleError, match=r"smallest plan needs GPUs with ([0-9,]+) MiB") as e:
        planned(folder, 1100 * MB)
    least = int(str(e.value).split("GPUs with ")[-1].split(" ")[0].replace(",", ""))
    with pytest.raises(InfeasibleError):
        planned(folder, (least - 1) * MB)
    report = planned(folder, least * MB)
    whys = [r["why"] for r in report["alternatives"] if r["step_ms"] is None]
    assert whys and all("smallest plan needs" in why for why in whys)
    assert "its smallest plan needs" in describe_plan(report)


def test_the_text(files: Files, written: Written) -> None:
    report = planned(written(files), gpu="A100-80GB")
    text = describe_plan(report)
    for part in (report["notation"], "layers: forward", "stage 0", "MFU", "alternatives", "exact"):
        assert part in text
    assert f"{report['step_ms']:.3f} ms a step" in text


def test_a_proof_that_is_not_complete_is_said(
    made_work: Callable[..., Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = made_work(8, 8, 16, 2)
    options: dict[str, Any] = {"num_layers": 8, "hidden_size": 4096}
    memory_bytes = int(1500 + 8 * work.model.parameter_mb) * MB
    folder = work.profile.directory
    exact = plan_from_galvatron(folder, 8, 128, 16, memory_bytes, **options)
    assert exact["proven_optimal"]
    for name in ("search.FEW_LABELS", "search.MANY_LABELS", "outcomes.MANY_LABELS"):
        monkeypatch.setattr(f"galvatron_compile.galvatron.{name}", 0)
    report = plan_from_galvatron(folder, 8, 128, 16, memory_bytes, **options)
    assert not report["proven_optimal"]
    assert report["no_plan_below_ms"] <= exact["step_ms"] <= report["step_ms"] + 1e-6
    assert "NOT PROVEN optimal" in describe_plan(report)


def test_mfu_needs_a_known_gpu(files: Files, written: Written) -> None:
    folder = written(files)
    report = planned(folder, gpu="A100-80GB")
    work = workload(folder, 4, 128, 8, 4, 64)
    parameters = 4 * work.model.parameter_mb * MB / 4 + work.model.whole.states_mb[1] * MB / 16
    flops = 8 * 128 * (6 * parameters + 12 * 4 * 64 * 128)
    assert report["mfu"] == pytest.approx(flops / (report["step_ms"] / 1e3) / (4 * 312e12))
    with pytest.raises(ProfileError, match="GPU 'A1' is not known; use one of A100-40GB"):
        planned(folder, gpu="A1")


def test_depth_and_width_must_be_known(files: Files, written: Written) -> None:
    folder = written(files)
    with pytest.raises(ProfileError, match="does not hold the depth of model 'made-1b'"):
        workload(folder, 4, 128, 8)
    with pytest.raises(ProfileError, match="does not hold the width"):
        workload(folder, 4, 128, 8, num_layers=4)


def test_a_plan_in_the_folder_gives_depth_memory_and_a_rival(
    files: Files, written: Written
) -> None:
    folder = written(files)
    theirs = notation.parse("dp4.zero3.recompute; 0,4: dp4.zero3", plans.layer_names(3), 4, 8)
    plans.save(theirs, folder / "galvatron_config_made-1b_1nodes_4gpus_per_node_48GB_bf16.json")
    work = workload(folder, 4, 128, 8, hidden_size=64)
    assert work.num_layers == 3
    assert memory_limit(work.profile, None).gpu_bytes == 48 * GIB
    report = plan_from_galvatron(folder, 4, 128, 8, hidden_size=64)
    assert report["galvatron_plan_step_ms"] == price(work, theirs).step_ms >= report["step_ms"]
    assert "Galvatron's plan" in [record["name"] for record in report["alternatives"]]
    other_batch = plan_from_galvatron(folder, 4, 128, 16, hidden_size=64)
    assert other_batch["galvatron_plan_step_ms"] is None


def test_memory_must_be_known(files: Files, written: Written) -> None:
    work = workload(written(files), 4, 128, 8, 4, 64)
    with pytest.raises(ProfileError, match="how much memory a GPU has; give it"):
        memory_limit(work.profile, None)
    with pytest.raises(ProfileError, match="less than 1 MiB"):
        memory_limit(work.profile, 1000)


def test_llama(llama: Path) -> None:
    report = plan_from_galvatron(llama, 8, 2048, 16, 36 * GIB)
    assert report["step_ms"] == pytest.approx(1085.952, abs=1e-3)
    assert report["galvatron_plan_step_ms"] == pytest.approx(1086.046124, abs=1e-6)
    assert report["memory_limit_bytes"] == 29492 * MB
    assert report["proven_optimal"] and report["no_plan_below_ms"] == pytest.approx(
        report["step_ms"], abs=1e-6
    )
    by_name = {record["name"]: record for record in report["alternatives"]}
    assert by_name["one strategy for all layers"]["step_ms"] == pytest.approx(1117.7, abs=0.05)
    assert plan_from_galvatron(llama, 8, 2048, 16)["step_ms"] == report["step_ms"]
    exact = plan_from_galvatron(llama, 8, 2048, 16, 36 * GIB, exact_bytes=True)
    assert exact["step_ms"] == pytest.approx(1085.858, abs=1e-3)


def test_planning_imports_neither_torch_nor_scipy(files: Files, written: Written) -> None:
    folder = written(files)
    code = (
        "import sys\n"
        "from galvatron_compile.galvatron.report import plan_from_galvatron\n"
        "from galvatron_compile.galvatron.text import describe_plan\n"
        f"report = plan_from_galvatron({str(folder)!r}, 4, 128, 8, 100 << 30, num_layers=4, "
        "hidden_size=64)\n"
        "describe_plan(report)\n"
        "heavy = {'torch', 'scipy', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
