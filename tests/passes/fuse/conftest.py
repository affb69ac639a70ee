"""The helper of these tests, by path: with ``--import-mode=importlib`` it is not on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "fuse_cases" not in sys.modules:
    _path = Path(__file__).with_name("fuse_cases.py")
    _spec = importlib.util.spec_from_file_location("fuse_cases", _path)
    assert _spec is not None and _spec.loader is not None
    sys.modules["fuse_cases"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["fuse_cases"])
