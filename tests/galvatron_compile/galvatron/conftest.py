"""Profiles in Galvatron's format: a made-up one for any test, the shared real one where it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from galvatron_compile.galvatron.formulas import Workload
from galvatron_compile.galvatron.profile import GalvatronProfile

SEQ, HIDDEN = 128, 16384  # a sample's message is 4 MB
Files = dict[str, dict[str, Any]]


def made_files(num_gpus: int, random: Random) -> Files:
    """A complete folder for ``num_gpus`` GPUs in one node; links and computation at random."""
    degrees = [1 << i for i in range(num_gpus.bit_length())]
    machine = f"1nodes_{num_gpus}gpus_per_node.json"
    layer, start = random.uniform(0.5, 6), random.uniform(0.1, 1)
    ends = random.uniform(0.2, 4)
    batches = range(1, 9)
    computation = {
        f"layertype_0_bsz{b}_seq{SEQ}": layer + start / b * random.uniform(0.9, 1.1)
        for b in batches
    }
    computation |= {
        f"layertype_other_bsz{b}_seq{SEQ}": ends + start / b * random.uniform(0.9, 1.1)
        for b in batches
    }
    parameter = random.uniform(50, 800)
    kept = random.uniform(50, 500)
    act: dict[str, float] = {str(d): kept / d * random.uniform(0.9, 1.1) for d in degrees}
    act["checkpoint"] = kept / random.uniform(4, 20)

    def both(states: float, activation: float) -> dict[str, Any]:
        return {
            str(SEQ): {
                "model_states": {str(d): states / d * random.uniform(1, 1.2) for d in degrees},
                "activation": {str(d): activation / d for d in degrees},
            }
        }

    memory = {
        "layertype_0_sp": {
            str(SEQ): {"parameter_size": parameter, "tp_activation_per_bsz_dict": act}
        },
        "other_memory_pp_off_sp": both(random.uniform(500, 4000), random.uniform(50, 800)),
        "other_memory_pp_on_first_sp": both(random.uniform(300, 2000), random.uniform(20, 200)),
        "other_memory_pp_on_last_sp": both(random.uniform(300, 2000), random.uniform(50, 700)),
    }
    speed = 10 ** random.uniform(0.5, 2.5)
    bandwidth = {
        f"allreduce_size_{d}_consec_{c}": speed * random.uniform(0.8, 1.2)
        for d in degrees[1:]
        for c in ((1,) if d == num_gpus else (0, 1))
    }
    times = {
        f"{kind}_size_{d}_{mb}MB_time": random.uniform(0.02, 0.1)
        + mb / speed * random.uniform(1, 2)
        for kind in ("allreduce", "all2all")
        for d in degrees[1:]
        for mb in [1 << i for i in range(9)]
    }
    return {
        "computation_profiling_bf16_made-1b_all.json": computation,
        "memory_profiling_bf16_made-1b_all.json": memory,
        f"allreduce_bandwidth_{machine}": bandwidth,
        f"p2p_bandwidth_{machine}": {f"pp_size_{d}": speed for d in degrees[1:]},
        f"sp_time_{machine}": times,
        "overlap_coefficient.json": {"overlap_coe": random.uniform(1, 1.5)},
    }


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.fixture
def files() -> Files:
    """Of 4 GPUs, the same every time."""
    return made_files(4, Random(0))


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Files], Path]:
    return lambda files: write(tmp_path / "profile", files)


@pytest.fixture
def made_work(tmp_path: Path) -> Callable[..., Workload]:
    """``made_work(num_gpus, num_layers, global_batch_size, seed)``: a random workload."""

    def make(num_gpus: int, num_layers: int, global_batch_size: int, seed: int = 0) -> Workload:
        folder = write(tmp_path / f"{num_gpus}-{seed}", made_files(num_gpus, Random(seed)))
        profile = GalvatronProfile.load(folder)
        return Workload(profile, num_gpus, SEQ, global_batch_size, num_layers, HIDDEN)

    return make


@pytest.fixture(scope="session")
def llama() -> Path:
    """The profile of Llama2-7B on 8 GPUs that Galvatron ships, where the shared data are."""
    beside = Path(__file__).resolve().parents[4] / "shared"
    shared = Path(os.environ.get("GALVATRON_SHARED", beside))
    folder = shared / "data" / "galvatron_llama2_7b_8gpu"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set GALVATRON_SHARED to the folder with data/")
    return folder


@pytest.fixture
def llama_work(llama: Path) -> Workload:
    return Workload(GalvatronProfile.load(llama), 8, 2048, 16, 32, 4096)
