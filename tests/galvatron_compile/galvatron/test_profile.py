"""What is read of a folder of Galvatron's, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galvatron_compile.errors import ProfileError
from galvatron_compile.galvatron.profile import GalvatronProfile

Files = dict[str, dict[str, Any]]
Written = Callable[[Files], Path]
COMPUTATION = "computation_profiling_bf16_made-1b_all.json"
MEMORY = "memory_profiling_bf16_made-1b_all.json"
TIMES = "sp_time_1nodes_4gpus_per_node.json"
BANDWIDTH = "allreduce_bandwidth_1nodes_4gpus_per_node.json"


def test_every_part_is_read(files: Files, written: Written) -> None:
    files[COMPUTATION] = {
        f"layertype_{kind}_bsz{b}_seq128": slope + offset / b
        for kind, slope, offset in (("0", 3.0, 0.5), ("other", 2.0, 1.0))
        for b in (1, 2, 4)
    }
    profile = GalvatronProfile.load(written(files))
    assert (profile.model, profile.precision, profile.num_gpus) == ("made-1b", "bf16", 4)
    model = profile.at(128)
    assert model.layer_ms.slope == pytest.approx(3) and model.layer_ms.offset == pytest.approx(0.5)
    assert model.ends_ms.at(8) == pytest.approx(17)
    assert set(model.activation_mb) == {1, 2, 4}
    assert model.recomputed_mb < model.activation_mb[1]
    assert set(profile.bandwidth) == {(4, True), (2, True), (2, False)}
    assert set(profile.p2p) == {2, 4} and set(profile.all_to_all) == {2, 4}
    exact = files[TIMES]["allreduce_size_2_4MB_time"]
    assert profile.all_reduce[2].ms(4.0) == exact
    assert profile.all_reduce[2].ms(4.5) == pytest.approx(profile.all_reduce[2].line.at(4.5))
    assert profile.plan_path is None


@pytest.mark.parametrize("name", [COMPUTATION, MEMORY, TIMES, BANDWIDTH])
def test_a_missing_file_is_named(files: Files, written: Written, name: str) -> None:
    del files[name]
    with pytest.raises(ProfileError, match=f"has no file {name.split('_')[0]}"):
        GalvatronProfile.load(written(files))


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        (MEMORY, ("layertype_0_sp",), None, "lacks the field 'layertype_0_sp'"),
        (MEMORY, ("layertype_0_sp", "128", "parameter_size"), None, "128.parameter_size"),
        (
            MEMORY,
            ("layertype_0_sp", "128", "tp_activation_per_bsz_dict", "2"),
            "x",
            "tp_activation_per_bsz_dict.2 must be a number, got 'x'",
        ),
        (MEMORY, ("other_memory_pp_off_sp", "128", "activation"), 3, "must be an object, got 3"),
        (
            MEMORY,
            ("other_memory_pp_on_last_sp", "128", "model_states", "1"),
            -1,
            "model_states.1 is -1; it must be positive",
        ),
        (BANDWIDTH, ("allreduce_size_4_consec_1",), None, "'allreduce_size_4_consec_1'"),
        (TIMES, ("all2all_size_2_1MB_time",), True, "must be a number, got True"),
        ("overlap_coefficient.json", ("overlap_coe",), 0.9, "a slowdown is at least 1"),
    ],
)
def test_the_field_at_fault_is_named(
    files: Files, written: Written, name: str, path: tuple[str, ...], value: Any, message: str
) -> None:
    table = files[name]
    for key in path[:-1]:
        table = table[key]
    if value is None:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    with pytest.raises(ProfileError) as error:
        GalvatronProfile.load(written(files))
    assert name in str(error.value) and message in str(error.value)


def test_a_file_that_is_not_json_is_named(files: Files, written: Written) -> None:
    folder = written(files)
    (folder / TIMES).write_text("{")
    with pytest.raises(ProfileError, match=f"cannot read .*{TIMES}"):
        GalvatronProfile.load(folder)


def test_one_batch_size_gives_no_line(files: Files, written: Written) -> None:
    files[COMPUTATION] = {"layertype_0_bsz1_seq128": 1.0, "layertype_other_bsz1_seq128": 1.0}
    with pytest.raises(ProfileError, match="at least two batch sizes, got 1"):
        GalvatronProfile.load(written(files))


def test_other_lengths_machines_and_precisions_are_refused(files: Files, written: Written) -> None:
    with pytest.raises(ProfileError, match="sequence length 99; it has 128"):
        GalvatronProfile.load(written(files)).at(99)
    with pytest.raises(ProfileError, match=r"of 16 GPUs \(it has .*4gpus"):
        GalvatronProfile.load(written(files), num_gpus=16)
    with pytest.raises(ProfileError, match="there is no folder"):
        GalvatronProfile.load("nowhere")
    for name in (COMPUTATION, MEMORY):
        files[name.replace("bf16", "fp32")] = files.pop(name)
    folder = written(files)
    for name in (COMPUTATION, MEMORY):
        (folder / name).unlink()
    with pytest.raises(ProfileError, match="is in fp32"):
        GalvatronProfile.load(folder)


def test_the_number_of_gpus_chooses_a_machine(files: Files, written: Written) -> None:
    for name in [name for name in files if "1nodes" in name]:
        files[name.replace("1nodes_4gpus", "2nodes_4gpus")] = dict(files[name])
    two = files["allreduce_bandwidth_2nodes_4gpus_per_node.json"]
    two["allreduce_size_8_consec_1"] = 50.0
    folder = written(files)
    with pytest.raises(ProfileError, match="has several files allreduce_bandwidth_"):
        GalvatronProfile.load(folder)
    assert GalvatronProfile.load(folder, 4).num_nodes == 1
    assert GalvatronProfile.load(folder, 8).num_nodes == 2


def test_the_profile_that_galvatron_ships(llama: Path) -> None:
    profile = GalvatronProfile.load(llama)
    model = profile.at(2048)
    assert (profile.model, profile.num_nodes, profile.gpus_per_node) == ("llama2-7b", 1, 8)
    assert model.layer_ms.slope == pytest.approx(3.8590, abs=5e-5)
    assert model.layer_ms.offset == pytest.approx(0.8330, abs=5e-5)
    assert model.ends_ms.slope == pytest.approx(2.6803, abs=5e-5)
    assert model.ends_ms.offset == pytest.approx(2.3549, abs=5e-5)
    assert profile.plan_path is not None
