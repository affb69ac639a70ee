"""Makes ``kernel_checks`` importable (``--import-mode=importlib`` keeps tests/ off sys.path)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "kernel_checks" not in sys.modules:
    _path = Path(__file__).with_name("kernel_checks.py")
    _spec = importlib.util.spec_from_file_location("kernel_checks", _path)
    assert _spec is not None and _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["kernel_checks"] = _module
    _spec.loader.exec_module(_module)
