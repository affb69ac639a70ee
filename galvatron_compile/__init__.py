"""Automatic parallel training of PyTorch models.

>>> import galvatron_compile as gc
>>> cluster = gc.ClusterProfile.preset("8xH100")
>>> parallel = gc.compile(model, cluster, example_inputs=batch, global_batch_size=512)

Read :mod:`galvatron_compile.compiler` first: ``compile`` is the list of passes in order. Names are
imported when first used, so that planning on a laptop does not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "galvatron_compile.errors",
    "ClusterProfile": "galvatron_compile.cluster",
    "GalvatronError": "galvatron_compile.errors",
    "ParallelModel": "galvatron_compile.parallel_model",
    "Plan": "galvatron_compile.plans",
    "Strategy": "galvatron_compile.strategy",
    "compile": "galvatron_compile.compiler",
    "export_safetensors": "galvatron_compile.hugging_face",
    "load_checkpoint": "galvatron_compile.checkpoint",
    "load_safetensors": "galvatron_compile.hugging_face",
    "plan": "galvatron_compile.planning",
    "price": "galvatron_compile.planning",
    "save_checkpoint": "galvatron_compile.checkpoint",
}
__all__ = [
    "CheckpointError",
    "ClusterProfile",
    "GalvatronError",
    "ParallelModel",
    "Plan",
    "Strategy",
    "compile",
    "export_safetensors",
    "load_checkpoint",
    "load_safetensors",
    "plan",
    "price",
    "save_checkpoint",
]

if TYPE_CHECKING:
    from galvatron_compile.checkpoint import load_checkpoint, save_checkpoint
    from galvatron_compile.cluster import ClusterProfile
    from galvatron_compile.compiler import compile
    from galvatron_compile.errors import CheckpointError, GalvatronError
    from galvatron_compile.hugging_face import export_safetensors, load_safetensors
    from galvatron_compile.parallel_model import ParallelModel
    from galvatron_compile.planning import plan, price
    from galvatron_compile.plans import Plan
    from galvatron_compile.strategy import Strategy


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
