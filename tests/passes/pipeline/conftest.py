"""Helpers of these tests, by path: with ``--import-mode=importlib`` they are not on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "pipeline_instances" not in sys.modules:
    path = Path(__file__).with_name("pipeline_instances.py")
    spec = importlib.util.spec_from_file_location("pipeline_instances", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pipeline_instances"] = module
    spec.loader.exec_module(module)
