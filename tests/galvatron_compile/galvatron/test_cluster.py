"""Galvatron's measurements of a machine as a ClusterProfile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galvatron_compile.cluster_json import dumps, loads
from galvatron_compile.cluster_text import warning
from galvatron_compile.galvatron.cluster import to_cluster
from galvatron_compile.galvatron.formulas import MB
from galvatron_compile.galvatron.profile import GalvatronProfile

Files = dict[str, dict[str, Any]]
Written = Callable[[Files], Path]


def test_measured_numbers_come_through(files: Files, written: Written) -> None:
    profile = GalvatronProfile.load(written(files))
    cluster = to_cluster(profile)
    assert (cluster.num_nodes, cluster.ranks_per_node) == (1, 4)
    for size, ranks in ((2, [0, 1]), (4, [0, 1, 2, 3])):
        largest = profile.all_reduce[size].ms_by_mb[256.0]
        assert cluster.collective_ms("all_reduce", 256 * MB, ranks) >= 0.5 * largest
        gathered = cluster.collective_ms("all_gather", 256 * MB, ranks)
        assert gathered == pytest.approx(cluster.collective_ms("all_reduce", 256 * MB, ranks) / 2)
    assert cluster.collective_ms("p2p", 64 * MB, [0, 1]) == pytest.approx(64 / profile.p2p[2])
    assert cluster.overlap.joint == profile.overlap


def test_sources_tell_measured_from_default(files: Files, written: Written) -> None:
    cluster = to_cluster(GalvatronProfile.load(written(files)), "H100")
    sources = cluster.sources()
    times = "measured by Galvatron, sp_time_1nodes_4gpus_per_node.json"
    assert sources["all_reduce node x4"] == sources["all_to_all node x2"] == times
    assert sources["all_gather node x2"].startswith(times)
    assert sources["overlap"] == "measured by Galvatron, overlap_coefficient.json"
    assert sources["matmul bfloat16"].startswith("measured by Galvatron, computation_profiling")
    for name in ("memory bandwidth", "launch overhead", "attention bfloat16", "broadcast node x2"):
        assert sources[name].startswith("default")
    assert not cluster.is_measured
    assert "PARTLY NOT MEASURED" in warning(cluster)
    assert "unknown kind" in cluster.device.name and "H100" in cluster.device.name
    assert loads(dumps(cluster)) == cluster


def test_groups_over_nodes_take_the_strided_bandwidth(files: Files, written: Written) -> None:
    renamed = {name.replace("1nodes_4gpus", "2nodes_2gpus"): v for name, v in files.items()}
    profile = GalvatronProfile.load(written(renamed))
    cluster = to_cluster(profile)
    across = cluster.collective_ms("all_reduce", 64 * MB, [0, 2])
    assert across == pytest.approx(64 / profile.bandwidth[2, False])  # 2 (n - 1) / n = 1
    inside = cluster.collective_ms("all_reduce", 64 * MB, [0, 1])
    assert inside == pytest.approx(profile.all_reduce[2].ms_by_mb[64.0], rel=0.6)
    assert inside != across
    assert cluster.collective_ms("p2p", 64 * MB, [0, 2]) == pytest.approx(64 / profile.p2p[2])


def test_the_rate_of_layers_of_llama(llama: Path) -> None:
    """2 FLOPs a parameter and token over 3.859 ms a sample: what an A100 does."""
    cluster = to_cluster(GalvatronProfile.load(llama))
    flops = 2 * 778.2236328125 * MB / 4 * 2048
    assert cluster.matmul_ms(flops, "bfloat16") == pytest.approx(3.859, abs=1e-3)
