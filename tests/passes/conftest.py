"""Helpers of these tests, by path: with ``--import-mode=importlib`` they are not on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "sharding_cases" not in sys.modules:
    path = Path(__file__).with_name("sharding_cases.py")
    spec = importlib.util.spec_from_file_location("sharding_cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sharding_cases"] = module
    spec.loader.exec_module(module)
