"""Capture of a model whose parameters are on the meta device and whose buffers are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from galvatron_compile.graph import Graph


@contextmanager
def buffers_on_meta(model: torch.nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    """Inside, the buffers are on meta if the parameters are; afterwards they are what they were.

    Operators refuse inputs of two devices, also where only shapes are computed. Yields the buffers
    that were moved by name, for :func:`with_buffers`.
    """
    first = next(model.parameters(), None)
    moved = [
        (module, name, buffer, f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and first is not None and first.is_meta
    ]
    twins = {id(buffer): buffer.to("meta") for _, _, buffer, _ in moved}  # one of each tied buffer
    try:
        for module, name, buffer, _ in moved:
            module._buffers[name] = twins[id(buffer)]
        yield {path: buffer for _, _, buffer, path in moved}
    finally:
        for module, name, buffer, _ in moved:
            module._buffers[name] = buffer


def with_buffers(graph: Graph, buffers: Mapping[str, torch.Tensor]) -> Graph:
    """``graph`` over the given buffers where it uses them; its module is changed in place."""
    used = {name: buffer for name, buffer in buffers.items() if name in graph.buffers}
    for path, buffer in used.items():
        owner, _, name = path.rpartition(".")
        setattr(graph.module.get_submodule(owner), name, buffer)
    return dataclasses.replace(graph, buffers={**graph.buffers, **used})
