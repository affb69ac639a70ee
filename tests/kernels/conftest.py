"""Makes helpers importable (``--import-mode=importlib`` keeps tests/ off sys.path)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name in ("kernel_checks", "peer_checks"):
    if _name not in sys.modules:
        _path = Path(__file__).with_name(f"{_name}.py")
        _spec = importlib.util.spec_from_file_location(_name, _path)
        assert _spec is not None and _spec.loader is not None
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)


@pytest.fixture
def seed() -> int:
    """``kernel_checks.new_seed``; pytest prints it where a test fails."""
    seed: int = sys.modules["kernel_checks"].new_seed()
    return seed


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of bench/gpu.py can be imported, anew in every test."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    yield
    for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu_")]:
        del sys.modules[name]
