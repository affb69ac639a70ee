"""Measuring: structure and agreement of what comes out, never how fast this machine is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from galvatron_compile import profiling
from galvatron_compile.cli import app
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.curves import KINDS
from galvatron_compile.profiling_collectives import groups_of

TINY = profiling.Sizes((16, 32), (8, 16), 2, 2**16, (1024, 8192), 0.005)


@pytest.mark.parametrize(
    ("payloads_mib", "cpu", "cuda"),
    [((0.25, 1, 4, 16), 4, 16), ((1, 2, 64, 256), 2, 64), ((0.5, 3), 3, 3), ((100, 200), 100, 100)],
)
def test_overlap_is_measured_with_messages_as_large_as_layers(
    payloads_mib: tuple[float, ...], cpu: float, cuda: float
) -> None:
    payloads_bytes = tuple(int(size * 2**20) for size in payloads_mib)
    sizes = profiling.Sizes((16,), (8,), 2, 2**16, payloads_bytes, 0.005)
    assert sizes.overlap_bytes(torch.device("cpu")) == cpu * 2**20
    assert sizes.overlap_bytes(torch.device("cuda")) == cuda * 2**20


def test_lone_process_measures_computation() -> None:
    seen: list[tuple[int, int, str]] = []
    profile = profiling.measure(lambda *step: seen.append(step), sizes=TINY)
    assert profile.is_measured and profile.world_size == 1 and not profile.collectives
    assert {c.dtype for c in profile.matmul} >= {"float32", "bfloat16", "float64"}
    assert [flops for flops, _ in profile.matmul[0].points] == [2 * 16**3, 2 * 32**3]
    assert profile.attention_ms(1e6, "float32") > 0 and profile.memory_ms(1e9) > 0
    assert profile.memory_bytes > 0 and profile.overlap_slowdown == 1
    assert [done for done, _, _ in seen] == list(range(seen[-1][1] + 1))
    assert "measured on" in str(profile) and "torch" in profile.memory.source


def _measure_and_count_groups(local_world_size: int) -> tuple[Any, bool, int]:
    import os

    import torch.distributed as dist

    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
    tiny = profiling.Sizes((16, 32), (8,), 2, 2**16, (1024, 8192), 0.005)
    try:
        profiling.measure(sizes=tiny)
        profile = profiling.measure(sizes=tiny)  # a second time, with groups of the same ranks
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    dist.barrier()  # the caller's group still works
    return profile, dist.is_initialized(), dist.get_world_size()


def test_two_ranks_measure_every_collective_and_agree(ranks: Callable[[int], Any]) -> None:
    answers = ranks(2).run(_measure_and_count_groups, 2)
    profile = answers[0][0]
    assert all(answer == (profile, True, 2) for answer in answers)
    assert {(c.kind, c.tier, c.num_ranks) for c in profile.collectives} == {
        (kind, "node", 2) for kind in KINDS
    }
    for curve in profile.collectives:
        assert [payload for payload, _ in curve.points] == [1024, 8192]
        assert curve.points[0][1] <= curve.points[1][1]
    assert profile.node_overlap is None  # one node: the same
    assert profile.overlap_slowdown >= 1 and profile.is_measured and "gloo" in str(profile)


def test_two_nodes_of_one_rank_measure_the_cluster_tier(ranks: Callable[[int], Any]) -> None:
    profile = ranks(2).run(_measure_and_count_groups, 1)[0][0]
    assert (profile.num_nodes, profile.ranks_per_node) == (2, 1)
    assert {c.tier for c in profile.collectives} == {"cluster"}
    assert profile.collective_ms("p2p", 4096, (0, 1)) > 0


def test_overlap_is_measured_within_nodes_and_across(ranks: Callable[[int], Any]) -> None:
    answers = ranks(4).run(_measure_and_count_groups, 2)
    profile = answers[0][0]
    assert all(answer == (profile, True, 4) for answer in answers)
    assert (profile.num_nodes, profile.ranks_per_node) == (2, 2)
    assert profile.node_overlap is not None
    assert profile.node_overlap.source.startswith("measured on")


def _groups_that_overlap() -> list[int]:
    """Sizes of the groups whose all-reduces ran beside computation."""
    from unittest.mock import patch

    import torch.distributed as dist

    seen, reduce = [], dist.all_reduce

    def noted(tensor: Any, *rest: Any, **options: Any) -> Any:
        if options.get("async_op"):
            seen.append(dist.get_world_size(options["group"]))
        return reduce(tensor, *rest, **options)

    with patch.object(dist, "all_reduce", noted):
        _measure_and_count_groups(2)
    return sorted(set(seen))


def _sums_beside_computation() -> list[tuple[int, int]]:
    """How many calls and sums ran together, each time."""
    from unittest.mock import patch

    from galvatron_compile import profiling_collectives

    seen, together = [], profiling_collectives._together

    def noted(watch: Any, compute: Any, calls: int, tensors: Any, group: Any) -> Any:
        seen.append((calls, len(tensors)))
        return together(watch, compute, calls, tensors, group)

    with patch.object(profiling_collectives, "_together", noted):
        _measure_and_count_groups(2)
    return sorted(set(seen))


def _rounds(late: bool) -> int:
    """How often one of them measures sums without computation."""
    from unittest.mock import patch

    import torch.distributed as dist

    from galvatron_compile import profiling_collectives
    from galvatron_compile.stopwatch import Stopwatch

    seen, together = [], profiling_collectives._together

    def noted(watch: Any, compute: Any, calls: int, *rest: Any) -> Any:
        seen.append(calls)
        return together(watch, compute, calls, *rest)

    watch = Stopwatch(torch.device("cpu"), 0.01, -1.0 if late else 600.0)
    with patch.object(profiling_collectives, "_together", noted):
        product = torch.ones(64, 64)
        profiling_collectives.measure_overlap(
            watch, lambda: product @ product, 0.05, 4096, dist.group.WORLD
        )
    return seen.count(0)


def _groups_of_pairs() -> list[float]:
    """Rank 0 is in a group more than rank 1."""
    import torch.distributed as dist

    from galvatron_compile.torch_private import new_local_group

    rank = dist.get_rank()
    kept = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
    sums = []
    for _ in range(2):
        group = new_local_group((0, 1))
        sums.append(torch.ones(1))
        dist.all_reduce(sums[-1], group=group)
        dist.barrier()
        dist.destroy_process_group(group)
    assert (kept is None) == (rank == 1)
    return [float(each) for each in sums]


def test_groups_may_be_made_again_by_ranks_with_unequally_many(
    ranks: Callable[[int], Any],
) -> None:
    assert ranks(2).run(_groups_of_pairs) == [[2.0, 2.0]] * 2


def test_overlap_within_a_node_is_that_of_its_group(ranks: Callable[[int], Any]) -> None:
    assert ranks(4).run(_groups_that_overlap) == [[2, 4]] * 4


def test_overlap_is_that_of_sums_in_a_row(ranks: Callable[[int], Any]) -> None:
    """A lone sum shows how late it starts beside computation, not how slow it is."""
    found = ranks(2).run(_sums_beside_computation)
    assert found[0] == found[1], "ranks that differ would wait for each other"
    assert all(sums == 0 or sums >= 3 for _, sums in found[0])
    assert {sums for calls, sums in found[0] if calls} == {0, 3, 9}


def test_overlap_is_measured_once_where_time_is_up(ranks: Callable[[int], Any]) -> None:
    assert ranks(2).run(_rounds, True) == [1, 1]
    in_time = ranks(2).run(_rounds, False)
    assert in_time[0] == in_time[1] > 1


def test_groups_are_neighbours_in_a_node_and_strided_across_nodes() -> None:
    assert groups_of(5, 2, 4) == [
        ("node", (4, 5)),
        ("node", (4, 5, 6, 7)),
        ("cluster", (1, 5)),
        ("cluster", (1, 3, 5, 7)),
        ("cluster", tuple(range(8))),
    ]
    for size in (g for _, g in groups_of(17, 128, 8)):
        assert 17 in size
    assert len(groups_of(0, 128, 8)) <= 12


def test_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_measure = profiling.measure
    monkeypatch.setattr(
        profiling, "measure", lambda progress, quick: tiny_measure(progress, quick, TINY)
    )
    out = tmp_path / "c.json"
    result = CliRunner().invoke(app, ["profile", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "Matrix products" in result.output and "NOT MEASURED" not in result.output
    assert ClusterProfile.load(out).is_measured


def test_command_shows_presets_and_refuses_unknown_ones() -> None:
    result = CliRunner().invoke(app, ["profile", "--preset", "8xH200"])
    assert result.exit_code == 0 and "NOT MEASURED" in result.output
    assert "all_reduce" in result.output and "Sources" in result.output
    refused = CliRunner().invoke(app, ["profile", "--preset", "8xTPU"])
    assert refused.exit_code == 2 and "no preset '8xTPU'" in refused.output
    assert "Traceback" not in refused.output
