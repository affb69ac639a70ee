"""Tiles and waves: how much of a GPU a product keeps busy."""

from __future__ import annotations

import pytest

from galvatron_compile.passes.tiles import busy_share, num_processors


def test_whole_waves_of_whole_tiles_keep_everything_busy() -> None:
    assert busy_share(1, 256 * 9, 128 * 12, 64, 108) == 1.0
    assert busy_share(1, 8192, 8192, 8192, 108) > 0.94


def test_one_tile_too_many_starts_another_wave() -> None:
    full = busy_share(108, 256, 128, 64, 108)
    assert full == 1.0
    # 109 tiles of the largest size would leave 107 processors idle in the second wave.
    assert 0.5 < busy_share(109, 256, 128, 64, 108) < 0.85


def test_edges_and_idle_processors_are_lost() -> None:
    assert busy_share(1, 64, 64, 64, 108) == pytest.approx(0.6 / 108)
    assert busy_share(1, 257, 128, 64, 2) < 0.85
    assert busy_share(1, 1, 4096, 4096, 108) < 0.05  # a product with one row


def test_a_long_sum_is_divided() -> None:
    short, long = (busy_share(1, 1024, 1024, k, 108) for k in (512, 8192))
    assert long > short


def test_devices_are_known_by_the_end_of_their_name() -> None:
    assert num_processors("NVIDIA H100") == 132
    assert num_processors("NVIDIA A100-80GB") == 108
    assert num_processors("NVIDIA A10") == 72
    assert num_processors("Xeon") is None
