"""Predicting measured runs: what of a row decides the price, and who is to blame if it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.errors import GalvatronError
from galvatron_compile.facts import Fact, Overlap
from galvatron_compile.passes.tally import OperatorCount, Tally
from galvatron_compile.validation import Run
from galvatron_compile.validation.hardware import TABLE_DIR, Hardware
from galvatron_compile.validation.kernels import Kernels
from galvatron_compile.validation.predict import Predictor, adapted
from galvatron_compile.validation.software import (
    EARLY_HOST_MS,
    EARLY_WHOLE_HEAD,
    MEGATRON_KERNELS,
    Software,
    calibrated_on,
)

ROW: dict[str, Any] = {
    "row": 2, "source": "here", "model": "gpt", "gpu": "A100-SXM4-80GB", "num_gpus": 4,
    "gpus_per_node": 8, "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 256,
    "vocab": 512, "seq": 128, "global_batch": 16, "micro_batch": 2, "tp": 2, "pp": 2, "dp": 1,
    "cp": 1, "zero": 0, "recompute": "full", "dtype": "fp16", "step_ms": 100.0,
}  # fmt: skip


def run(**changes: Any) -> Run:
    return Run(**{**ROW, **changes})


FSDP = {
    "model": "llama3-8B", "gpu": "H100-SXM-96GB-HBM2e-500W", "tp": 1, "pp": 1, "dp": 4, "zero": 3,
    "dtype": "bf16", "recompute": "selective",
}  # fmt: skip


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def test_a_run_is_predicted_and_depth_costs_no_capture(predictor: Predictor) -> None:
    shallow, deep = predictor.predict(run()), predictor.predict(run(layers=40))
    assert shallow.memory_bytes is not None and deep.memory_bytes is not None
    # Embedding, head and optimizer aside, ten times the blocks take ten times as long.
    assert 7 < deep.step_ms / shallow.step_ms < 10
    assert deep.memory_bytes > shallow.memory_bytes
    assert len(predictor._models) == 1


def test_the_host_bounds_small_layers(predictor: Predictor) -> None:
    slow = replace(Software.of(run()), host_ms=10 * EARLY_HOST_MS)
    ratio = predictor.predict_with(run(), slow).step_ms / predictor.predict(run()).step_ms
    assert 8 < ratio < 10.1


def test_an_unreported_micro_batch_is_the_fastest_that_fits(predictor: Predictor) -> None:
    known = [predictor.predict(run(micro_batch=size)).step_ms for size in (1, 2, 4, 8, 16)]
    assert predictor.predict(run(micro_batch=None)).step_ms == min(known)


def test_what_the_notes_say_is_a_cause(predictor: Predictor) -> None:
    eager, compiled = (predictor.predict(run(**FSDP, notes=n)) for n in ("eager", "compile"))
    assert compiled.step_ms < eager.step_ms
    tp: dict[str, Any] = {**FSDP, "tp": 2, "dp": 2}
    plain, hidden = (
        predictor.predict(run(**tp, notes=n)) for n in ("compile", "compile, async tp")
    )
    assert hidden.step_ms < plain.step_ms


def test_software_is_told_from_the_row() -> None:
    early, modern, fsdp = Software.of(run()), Software.of(run(dtype="bf16")), run(**FSDP)
    assert (early.gradient, early.overlap, early.fused) == ("float16", 2.0, MEGATRON_KERNELS)
    assert (modern.gradient, modern.overlap) == ("float32", None)
    assert Software.of(fsdp).kept_products == 2 and Software.of(fsdp).composite_norm
    assert Software.of(replace(fsdp, notes="compile")).host_ms == 0.0
    assert early.whole_head == 1.0
    assert Software.of(run(tp=1, dp=2)).whole_head == EARLY_WHOLE_HEAD


def test_the_masked_softmax_kernel_wants_rows_in_fours() -> None:
    software = Software.of(run())
    assert not software.softmax_is_eager(run(), 2)  # 2 samples of 2 heads a rank
    assert software.softmax_is_eager(run(), 1)
    assert software.softmax_is_eager(run(seq=4096, layers=1, pp=1, dp=2), 2)


def test_rows_of_two_gpus_are_the_calibration() -> None:
    assert calibrated_on(run(source="vTrain ground_truth", num_gpus=2, pp=1))
    assert not calibrated_on(run(source="vTrain ground_truth"))
    assert not calibrated_on(run(num_gpus=2, pp=1))


# --- hardware ----------------------------------------------------------------------------------


def test_the_part_is_read_from_its_name() -> None:
    found = Hardware({}).cluster(run(**FSDP))
    plain = Hardware({}).cluster(run(**{**FSDP, "gpu": "H100-SXM-80GB"}))
    assert found.device.memory_bytes == 96 * 2**30
    assert found.memory.value / plain.memory.value == pytest.approx(2.4 / 3.35)
    flops = 1e13
    ratio = found.matmul_ms(flops, "bfloat16") / plain.matmul_ms(flops, "bfloat16")
    assert ratio == pytest.approx(700 / 500)


def test_published_all_reduce_times_beside_the_table_are_used(tmp_path: Path) -> None:
    assert Hardware.beside(tmp_path / "runs.csv").all_reduce == {}
    folder = tmp_path / TABLE_DIR
    folder.mkdir()
    lines = ["size,…", *(f"{mib * 2**20},1,float,{mib * 1e6},1,1,1" for mib in (1, 2, 4, 1024))]
    (folder / "AR_GPU2_x").write_text("\n".join(lines))
    hardware = Hardware.beside(tmp_path / "runs.csv")
    cluster = hardware.cluster(run())
    assert cluster.collective_ms("all_reduce", 2**20, (0, 1)) == pytest.approx(1.0)
    other = hardware.cluster(run(**FSDP)).collective_ms("all_reduce", 2**20, (0, 1))
    assert other < 0.1
    (folder / "AR_GPU2_x").write_text("size\n1,2")
    with pytest.raises(GalvatronError, match=r"AR_GPU2_x: .*lines must read bytes,count"):
        Hardware.beside(tmp_path / "runs.csv")


def test_a_measured_profile_is_used_as_it_is(tmp_path: Path, predictor: Predictor) -> None:
    measured = replace(
        ClusterProfile.preset("4xL4"), launch_overhead_ms=Fact(1.0, "measured in a test")
    )
    measured.save(tmp_path / "c.json")
    assert adapted(measured, Software.of(run())).launch_overhead_ms.value == 1.0
    slow = predictor.predict(run(), tmp_path / "c.json")
    assert slow.step_ms > 5 * predictor.predict(run()).step_ms
    with pytest.raises(GalvatronError, match=r"row 7: the profile .* describes 4 ranks, fewer"):
        predictor.predict(run(row=7, num_gpus=8, dp=2), tmp_path / "c.json")


def test_software_that_overlaps_otherwise_does_so_within_a_node_too() -> None:
    preset = ClusterProfile.preset("2x8xA100-80GB")
    cluster = replace(preset, node_overlap=Overlap(1.3, 1.2, 1.1, "measured here"))
    software = replace(Software.of(run()), overlap=1.05)
    found = adapted(cluster, software)
    assert found.overlap_slowdown == found.overlap.joint == 1.05
    assert (found.overlap_within(True).joint, found.overlap_within(True).compute) == (1.05, 1.2)
    assert adapted(preset, software).node_overlap is None


def test_what_cannot_run_names_the_row(predictor: Predictor) -> None:
    assert predictor.predict(run(tp=1, cp=2)).step_ms > 0
    with pytest.raises(GalvatronError, match=r"row 9: .* does not divide into 2 × cp4"):
        predictor.predict(run(row=9, tp=1, pp=1, cp=4, seq=100))


# --- kernels -----------------------------------------------------------------------------------


def count(name: str, num_bytes: int, **more: Any) -> OperatorCount:
    return OperatorCount(name, more.pop("kind", "memory"), more.pop("flops", 0), num_bytes,
                         "float16", **more)  # fmt: skip


def tally_of(*forward: OperatorCount) -> Tally:
    return Tally(forward, (), {}, 0, 0, 0, product_bytes=100)


def test_an_eager_softmax_is_four_operators_in_float32() -> None:
    software = Software.of(run())
    (fused,) = Kernels(software, False, 1)(tally_of(count("_softmax", 400))).forward
    assert fused.num_bytes == 400
    eager = Kernels(software, True, 1)(tally_of(count("_softmax", 400))).forward
    assert [c.num_bytes for c in eager] == [600, 800, 800, 600]


def test_every_second_product_is_dropped() -> None:
    products = [
        count("mm", 0, kind="matmul", flops=2, writes=((i, 0, 10 * i),), product=(1, 1, 1, 1))
        for i in (1, 2, 3)
    ]
    found = Kernels(Software.of(run(**FSDP)), False, 99)(tally_of(*products))
    assert found.dropped == {2} and found.product_bytes == 80
    assert Kernels(Software.of(run()), False, 99)(tally_of(*products)).dropped == frozenset()


def test_only_an_undivided_head_is_slower() -> None:
    head = count("mm", 10, kind="matmul", flops=100, writes=((1, 0, 4),), product=(1, 8, 512, 8))
    software = Software.of(run(tp=1, dp=2))
    (slow,) = Kernels(software, False, 512)(tally_of(head)).forward
    assert slow.flops == round(100 * EARLY_WHOLE_HEAD)
    assert Kernels(software, False, 513)(tally_of(head)).forward[0].flops == 100
