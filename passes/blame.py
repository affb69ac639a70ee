"""Which line of the model is to blame when capture fails."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from galvatron_compile.torch_private import shape_guards

_LIBRARY = Path(torch.__file__).parent
_STANDARD = Path(traceback.__file__).parent
_PACKAGE = Path(sys.modules["galvatron_compile"].__file__ or "").resolve().parent
_OURS = (Path(__file__).resolve().parent, _PACKAGE)

# Batch sizes at which the conditions that a trace relied on are tried. A condition may fail at
# one of them (a trace differs where two sizes happen to be equal), not at two.
_PROBES = (3, 4, 5, 7, 8, 16, 31, 64, 127, 1000, 4096)


def is_user_file(filename: str) -> bool:
    """Neither PyTorch's, nor Python's, nor our own."""
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    if "site-packages" not in path.parts and path.is_relative_to(_STANDARD):
        return False
    return not any(path.is_relative_to(folder) for folder in (_LIBRARY.resolve(), *_OURS))


def innermost(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """``file:line: code`` of the innermost of ``frames`` (outermost first) in the user's code."""
    found = [frame for frame in frames if is_user_file(frame.filename)]
    if not found:
        return None
    code = f": {found[-1].line}" if found[-1].line else ""
    return f"{found[-1].filename}:{found[-1].lineno}{code}"


def line_of_exception(error: BaseException) -> str | None:
    """The model's line that raised ``error``, from its traceback, its causes, or its message."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    for link in reversed(chain):
        frames = traceback.extract_tb(link.__traceback__)
        if line := innermost(behind_wrapper(frames)):
            return line
    for link in chain:
        for filename, number in re.findall(r'File "([^"]+)", line (\d+)', str(link)):
            if is_user_file(filename):
                return f"{filename}:{number}"
    return None


def where(node: fx.Node) -> str:
    """``file:line`` of the model's code that made ``node``, its name if that is not known."""
    return line_of_node(node) or f"node {node.name}"


def line_of_node(node: fx.Node) -> str | None:
    """``file:line`` of the model's code that made ``node``, as far as the capture knows."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [f"{name}:{number}" for name, number in found if is_user_file(name)]
    return lines[-1] if lines else None


def behind_wrapper(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The model's frames; those in front of our own wrapper belong to whoever called us."""
    ours = [at for at, f in enumerate(frames) if f.name == "forward" and _is_ours(f.filename)]
    return frames[ours[-1] + 1 :] if ours else []


def _is_ours(filename: str) -> bool:
    return any(Path(filename).resolve().is_relative_to(folder) for folder in _OURS)


def cause_in_two_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:2]) or type(error).__name__


def broken_by_other_batches(condition: Any) -> bool:
    """Whether a trace that relied on ``condition`` is wrong for several usual batch sizes."""
    symbols = condition.free_symbols
    if len(symbols) != 1:  # only the batch is symbolic; two symbols are two spellings of it
        return False
    symbol = next(iter(symbols))
    broken = [size for size in _PROBES if condition.subs(symbol, size) == False]  # noqa: E712
    return len(broken) >= 2


def first_restriction(value: torch.Tensor) -> tuple[Any, str | None] | None:
    """The first (condition, "file:line" or None) by which the trace restricts the batch size."""
    for condition, line in shape_guards(value):
        if broken_by_other_batches(condition):
            return condition, line
    return None


class BatchWatch(TorchFunctionMode):
    """While a model is traced, notes the model's line at which its batch size stops being free.

    ``is_free`` says whether it still is; it is asked after every operator.
    """

    def __init__(self, is_free: Callable[[], bool]) -> None:
        super().__init__()
        self.is_free = is_free
        self.line: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.line is None and not self.is_free():
            frames = traceback.extract_stack()
            self.line = innermost(behind_wrapper(frames))
        return result
