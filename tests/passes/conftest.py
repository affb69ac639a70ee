"""Helpers of these tests, by path: with ``--import-mode=importlib`` they are not on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from galvatron_compile.passes.stand_in import Recorder

for name in ("sharding_cases", "rule_cases", "in_parts", "piece_cases"):
    if name not in sys.modules:
        path = Path(__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


@pytest.fixture
def float64() -> Iterator[None]:
    """The same random numbers in every test, in double precision."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Per capture, how many calls stood in for others; empty where no stand-in was tried."""
    counts: list[int] = []
    leave = Recorder.__exit__

    def leaving(self: Recorder, *error: object) -> None:
        counts.append(len(self.calls) - sum(len(kind.real) for kind in set(self.calls)))
        leave(self, *error)

    monkeypatch.setattr(Recorder, "__exit__", leaving)
    return counts
