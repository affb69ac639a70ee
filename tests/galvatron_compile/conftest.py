"""Helpers of these tests, by path: with ``--import-mode=importlib`` they are not on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HELPERS = (
    "hand_made",
    "example_plans",
    "checkpoint_models",
    "emulated",
    "pipeline_cases",
    "recorded_by_hand",
    "refused",
    "simulated",
    "trained",
)

for name in HELPERS:
    if name not in sys.modules:
        path = Path(__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
