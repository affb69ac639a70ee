"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load_ranks() -> ModuleType:
    """tests/ranks.py, by path: with ``--import-mode=importlib`` tests/ is not on sys.path."""
    if "ranks" not in sys.modules:
        path = Path(__file__).with_name("ranks.py")
        spec = importlib.util.spec_from_file_location("ranks", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["ranks"] = module
        spec.loader.exec_module(module)
    return sys.modules["ranks"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Any]]:
    """``ranks(4).run(function, *args)``: run on 4 gloo ranks that are kept for the session."""
    yield from _pools({})


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[[int], Any]]:
    """As ``ranks``; Triton kernels run there, on CPU tensors, under Triton's interpreter."""
    yield from _pools({"TRITON_INTERPRET": "1"})


def _pools(environment: dict[str, str]) -> Iterator[Callable[[int], Any]]:
    module = _load_ranks()
    pools: dict[int, Any] = {}

    def pool(world_size: int) -> Any:
        if world_size not in pools:
            pools[world_size] = module.RankPool(world_size, environment=environment)
        return pools[world_size]

    yield pool
    for opened in pools.values():
        opened.close()
