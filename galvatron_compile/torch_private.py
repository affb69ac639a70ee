"""Every use of private PyTorch interfaces, each wrapped in a small function that checks it."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

# --- capture: pytrees and shape environments (checked on torch 2.11 and 2.13) ---


def flatten_tree(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of nested tuples, lists and dicts, and the spec that puts them back."""
    leaves, spec = pytree.tree_flatten(tree)
    assert isinstance(leaves, list)
    return leaves, spec


def unflatten_tree(leaves: Sequence[Any], spec: Any) -> Any:
    return pytree.tree_unflatten(list(leaves), spec)


def tree_paths(tree: Any) -> list[tuple[object, ...]]:
    """The keys and indices that lead to each leaf."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return [
        tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path)
        for path, _ in found
    ]


def size_expression(size: Any) -> Any:
    """The sympy expression of a symbolic size, after replacements; a plain int as it is."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def shape_guards(value: torch.Tensor) -> list[tuple[Any, str | None]]:
    """(condition on the sizes, "file:line" of the model or None) for a fake tensor's trace."""
    mode = getattr(value, "fake_mode", None)
    environment = getattr(mode, "shape_env", None)
    if environment is None:
        return []
    return [(guard.expr, guard.sloc.maybe_user_loc) for guard in environment.guards]


@contextlib.contextmanager
def export_without_printing() -> Iterator[None]:
    """``torch.export`` raises its errors without printing the graph so far.

    Of a data-dependent failure it prints hundreds of lines on stderr in front of the exception
    (``torch.export._trace``, its only ``print``; checked on torch 2.11 and 2.13). What anyone else
    writes there, the model included, is untouched.
    """
    trace: Any = importlib.import_module("torch.export._trace")  # imported late: it is slow

    def only_elsewhere(*values: object, file: Any = None, **options: Any) -> None:
        if file is not sys.stderr:
            builtins.print(*values, file=file, **options)

    before = vars(trace).get("print")
    trace.print = only_elsewhere
    try:
        yield
    finally:
        if before is None:
            del trace.print
        else:
            trace.print = before


@contextlib.contextmanager
def fake_mode_of(value: torch.Tensor | None) -> Iterator[None]:
    """Operators compute shapes only, as when ``value`` was made; nothing changes if it is real.

    Torch 2.11 takes a composite operator such as ``linear`` apart in C++, where symbolic sizes are
    refused, unless the Python dispatcher is on; 2.13 does without.
    """
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        yield
        return
    with mode, enable_python_dispatcher():
        yield

def nodes_of_expression(expression: Any, symbols: Mapping[Any, fx.Node]) -> fx.Node:
    """Nodes at the end of the symbols' graph that compute a size's sympy expression.

    symbols: a node for every symbol, with its SymInt in ``meta["val"]``; new nodes get theirs.
    """
    graph = next(iter(symbols.values())).graph
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    known = len(graph.nodes)
    result = sympy_interp(PythonReferenceAnalysis, proxies, expression)
    for node in list(graph.nodes)[known:]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)
    assert isinstance(result, fx.Proxy)
    return result.node


# --- random operators: fake tensors and operator schemas (checked on torch 2.13) ---


def is_faking(values: Any) -> bool:
    """Whether a call with these values only computes shapes: a fake or meta tensor is among
    them, or a fake tensor mode is active."""
    leaves = pytree.tree_leaves(values)
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
        return True
    return torch._guards.detect_fake_mode(leaves) is not None


def schema_arguments(op: Any) -> list[tuple[str, Any]]:
    """(name, default or None) of an operator overload's arguments, in order."""
    arguments = [(argument.name, argument.default_value) for argument in op._schema.arguments]
    assert all(isinstance(name, str) for name, _ in arguments)
    return arguments


def mesh_without_groups(device_type: str, ranks: torch.Tensor, names: tuple[str, ...]) -> Any:
    """A DeviceMesh that says where shards lie and makes no process group (checked on 2.13).

    The public constructor makes one communicator per mesh dimension; for checkpoints only the
    coordinates matter.
    """
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False)
    if tuple(mesh.mesh.shape) != tuple(ranks.shape) or mesh.get_coordinate() is None:
        raise RuntimeError("DeviceMesh no longer takes _init_backend=False; update this function")
    return mesh


# --- tracing of layers: recorded operators (checked on torch 2.11 and 2.13) ---


def new_fake_mode() -> Any:
    """A mode in which tensors have shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def as_fake(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous fake tensors of the same shapes, dtypes and devices, in one mode."""
    with new_fake_mode():
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


@contextlib.contextmanager
def fake_mode(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """The mode that these fake tensors were made in; tensors made inside belong to it too."""
    mode = torch._guards.detect_fake_mode(list(tensors))
    if mode is None:
        yield
        return
    with mode, enable_python_dispatcher():
        yield


def record(function: Any, *arguments: Any) -> fx.GraphModule:
    """Every ATen operator that ``function`` runs on fake tensors, autograd's included."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.autograd.set_multithreading_enabled(False):
        module = make_fx(function, tracing_mode="real")(*arguments)
    assert isinstance(module, fx.GraphModule)
    return module


def recorded_graph() -> fx.Graph | None:
    """The graph that is being recorded at this moment, if any."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def group_timeout() -> timedelta | None:
    """How long collectives of the default process group wait for a rank; None if not told.

    ``new_group`` does not take it over: it waits 30 minutes by default (checked on 2.13).
    """
    group: Any = torch.distributed.group.WORLD
    for device in group._device_types if group is not None else ():
        timeout = getattr(group._get_backend(device).options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None


_times_made: Counter[tuple[int, ...]] = Counter()
_MANY_GROUPS = 1000  # more than a process has at a time


def new_local_group(ranks: tuple[int, ...]) -> torch.distributed.ProcessGroup:
    """A process group that only its ranks make, under a name that none of the same ranks had.

    ``new_group`` hashes the ranks and the number of living groups to a name. Where the same ranks
    had a group that is gone, gloo finds the addresses of that one in the store and fails to connect
    (checked on 2.11 and 2.13). So others are counted that do not live. All ``ranks`` have to call
    equally often.
    """
    from torch.distributed import distributed_c10d

    names: dict[Any, Any] = distributed_c10d._world.pg_names
    _times_made[ranks] += 1
    # Up to a number that does not depend on how many groups live: ranks may be in more or fewer.
    others = [object() for _ in range(_MANY_GROUPS * _times_made[ranks] - len(names))]
    names.update((other, f"none {number}") for number, other in enumerate(others))
    try:
        return torch.distributed.new_group(list(ranks), use_local_synchronization=True)
    finally:
        for other in others:
            del names[other]


# --- symmetric memory (read in the sources of torch 2.11 and 2.13; no GPU was there to run it) ---


def symmetric_views(
    num_bytes: int, device: torch.device, group: torch.distributed.ProcessGroup
) -> tuple[list[torch.Tensor], list[Any]]:
    """Every rank's ``num_bytes``, uint8, as this rank sees them, and what keeps them alive.
    Collective. RuntimeError where ranks cannot address each other's memory."""
    import torch.distributed._symmetric_memory as symmetric_memory

    whole = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(whole, group.group_name)
    views = [handle.get_buffer(r, whole.shape, whole.dtype) for r in range(handle.world_size)]
    return views, [handle, whole]


# --- pipelining: the orders of torch's schedules (checked on torch 2.13) ---


def pipelining_orders(
    name: str, pp: int, num_micro_batches: int, stages_per_rank: int
) -> list[list[tuple[str, int, int]]]:
    """What each rank computes under a schedule of ``torch.distributed.pipelining``, in order:
    ("F", "B", "I" or "W", stage, micro-batch).

    Torch 2.13's list of 1F1B skips the first forward of the last rank, though its runtime does not.
    """
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    ranks = get_schedule_ops(name, pp, num_micro_batches, num_stages_per_rank=stages_per_rank)
    orders = [
        [
            (op.computation_type.value, op.stage_index, op.microbatch_index)
            for op in rank
            if op is not None and op.microbatch_index is not None
        ]
        for rank in ranks
    ]
    kinds = {kind for order in orders for kind, _, _ in order}
    if len(orders) != pp or not kinds <= {"F", "B", "I", "W"}:
        raise RuntimeError(f"torch writes schedules in another way: {sorted(kinds)}")
    return [[(str(kind), int(stage), int(batch)) for kind, stage, batch in o] for o in orders]
