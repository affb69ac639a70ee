"""What a model holds that its program does not compute with, but a checkpoint does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from galvatron_compile.graph import Graph


@dataclass(frozen=True)
class Contents:
    """A model's state dict, and the tensors that its forward does not use.

    names: of the model's own ``state_dict()``, in its order.
    passive: parameters and buffers that no graph uses, whole on the CPU: saved and loaded, never
        trained. Buffers that are not persistent are among them, so that a state may name them.
    tied: every other name of a used or passive tensor -> the name it is kept under.
    unloaded: names in ``passive`` that were on the meta device: zeros until a state is loaded.
    """

    names: tuple[str, ...]
    passive: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]
    unloaded: frozenset[str]

    @staticmethod
    def of(model: torch.nn.Module, graph: Graph) -> Contents:
        used: dict[str, torch.Tensor] = {**graph.parameters, **graph.buffers}
        kept = {id(tensor): name for name, tensor in reversed(used.items())}
        passive: dict[str, torch.Tensor] = {}
        tied: dict[str, str] = {}
        every: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        every |= model.named_buffers(remove_duplicate=False)
        for name, tensor in every.items():
            first = kept.setdefault(id(tensor), name)
            if first != name and name not in used:
                tied[name] = first
            elif name not in used:
                passive[name] = tensor
        return Contents(
            names=tuple(model.state_dict()),
            passive={name: _on_cpu(tensor) for name, tensor in passive.items()},
            tied=tied,
            unloaded=frozenset(name for name, tensor in passive.items() if tensor.is_meta),
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """For the report: what is not trained; empty if forward uses all of the state dict."""
        kept = [name for name in self.names if self.tied.get(name, name) in self.passive]
        text = f"forward does not use {listed(kept)}: saved and loaded as they are, not trained"
        return (text,) if kept else ()

    def __str__(self) -> str:
        """What must be alike on every rank."""
        held = (
            f"{name} {list(tensor.shape)}" + (" on meta" if name in self.unloaded else "")
            for name, tensor in self.passive.items()
        )
        return f"tensors that forward does not use: {', '.join(held) or 'none'}"


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    return tensor.detach().to("cpu", copy=True)


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first ``most`` names in order, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:most])
    return shown if len(ordered) <= most else f"{shown} and {len(ordered) - most} more"


def one_name_each(names: Iterable[str], tied: Mapping[str, str]) -> list[str]:
    """One of ``names`` for every tensor; of tied ones the first name (``tied``: second -> first).

    Without its first name a tensor goes by the first of the others.
    """
    chosen: dict[str, str] = {}
    for name in names:
        kept = tied.get(name, name)
        if kept not in chosen or name == kept:
            chosen[kept] = name
    return list(chosen.values())


def untied(
    names: Collection[str], fetch: Callable[[str], torch.Tensor], tied: Mapping[str, str]
) -> str:
    """Which tied tensors are given twice and differ; empty if none do."""
    for alias, kept in tied.items():
        if alias in names and kept in names and not torch.equal(fetch(alias), fetch(kept)):
            return f"{alias} and {kept} are tied but differ in the state dict"
    return ""


def misfits(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Collection[str],
    known: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> list[str]:
    """Why a state with these names and shapes does not fit a model; empty if it does.

    wanted: must be there, under any of their names (``tied``: second name -> first). known: the
    shapes of all that may be there.
    """
    given = {tied.get(name, name) for name in shapes}
    allowed = {tied.get(name, name) for name in known}
    lacking, unexpected = set(wanted) - given, given - allowed
    found = []
    if lacking:
        found.append(f"missing: {listed(lacking)}")
    if unexpected:
        found.append(f"unexpected: {listed(unexpected)}")
    for name in sorted(shapes.keys() & known.keys()):
        if tuple(shapes[name]) != known[name]:
            given_shape = list(shapes[name])
            found.append(f"{name} has shape {given_shape}, the model's is {list(known[name])}")
    return found


def without_values(
    parameters: Collection[str], tensors: Collection[str], optional: Collection[str]
) -> str:
    """Why training cannot begin: ``parameters`` and ``tensors`` were made on meta, not loaded."""
    lacking = {*parameters, *tensors}
    what = "tensor" if tensors else "parameter"
    text = (
        f"{len(lacking)} {what}{'s have' if len(lacking) > 1 else ' has'} no values yet "
        f"({listed(lacking, 3)}): the model was made on the meta device. Call "
        "load_full_state_dict, or fill state_dict() with torch.distributed.checkpoint and call "
        "load_state_dict"
    )
    if absent := set(tensors) & set(optional):
        text += (
            f". The model's own state dict leaves out {listed(absent, 3)}, so no checkpoint "
            "holds it: give it by name beside the rest, load_full_state_dict({**state, "
            f"{min(absent)!r}: …}}), or make the model with its buffers on the CPU and only "
            "its parameters on meta (for a Hugging Face model: accelerate's "
            "init_empty_weights(include_buffers=False))"
        )
    return text
