"""Which nodes of a graph belong to its repeated blocks, from the stack of modules they ran in."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

_SEQUENTIAL = "torch.nn.modules.container.Sequential"


def find_blocks(nodes: Sequence[fx.Node], heavy: frozenset[fx.Node]) -> dict[fx.Node, str]:
    """The block that each node is in: members of the outermost containers that repeat.

    Of a list every member is a block. Of modules that only share a parent those are that use
    parameters at least twice, which leaves an embedding or a head to what lies around the blocks.
    """
    for accepts, least in ((_list_like, 1), (_siblings, 2)):
        groups = sorted(_groups(nodes, accepts), key=lambda group: group.depth)
        blocks: dict[fx.Node, str] = {}
        for group in groups:
            members = group.members
            if accepts is _siblings:
                members = {p: m for p, m in members.items() if _uses(m, heavy) >= least}
            inside = {n: path for path, member in members.items() for n in member}
            if _repeats(group, heavy, least) and blocks.keys().isdisjoint(inside):
                blocks |= inside
        if blocks:
            return blocks
    return {}


@dataclass(frozen=True)
class _Group:
    """Members (module paths) of one container, with the nodes computed in each."""

    depth: int
    members: dict[str, list[fx.Node]]


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules around a node, outermost first: path and class.

    The loss module that capture puts around the model has the model's own path. Only the inner
    one counts, or the whole model would be one of its own parts.
    """
    stack = [(path, str(kind)) for path, kind in node.meta.get("nn_module_stack", {}).values()]
    inner = [path for path, _ in stack[1:]]
    return [own for own, path in itertools.zip_longest(stack, inner) if own[0] != path]


def _list_like(parent: tuple[str, str], container: str) -> bool:
    """A container that is not called itself (ModuleList, ModuleDict), or a Sequential."""
    return container != parent[0] or parent[1] == _SEQUENTIAL


def _siblings(parent: tuple[str, str], container: str) -> bool:
    return not _list_like(parent, container)


def _groups(
    nodes: Sequence[fx.Node], accepts: Callable[[tuple[str, str], str], bool]
) -> list[_Group]:
    found: dict[tuple[str, str], _Group] = {}
    for node in nodes:
        stack = _stack(node)
        for depth, (parent, child) in enumerate(itertools.pairwise(stack)):
            container = child[0].rpartition(".")[0]
            if accepts(parent, container):
                group = found.setdefault((parent[0], container), _Group(depth, {}))
                group.members.setdefault(child[0], []).append(node)
    return list(found.values())


def _repeats(group: _Group, heavy: frozenset[fx.Node], least: int) -> bool:
    """Members that use parameters (``least`` times) are alike, and each feeds the next."""
    members = [m for m in group.members.values() if _uses(m, heavy) >= least]
    if len(members) < 2:
        return False
    kinds = Counter(tuple(sorted(str(n.target) for n in member)) for member in members)
    similar = any(_similarity(a, b) > 0.5 for a, b in itertools.pairwise(members))
    chained = all(_reaches(a, b) for a, b in itertools.pairwise(members))
    return chained and (similar or max(kinds.values()) > 1)


def _uses(member: Sequence[fx.Node], heavy: frozenset[fx.Node]) -> int:
    return sum(node in heavy for node in member)


def _similarity(a: Sequence[fx.Node], b: Sequence[fx.Node]) -> float:
    """Shared operations over all operations of two members, 1 if they do the same."""
    left, right = (Counter(str(node.target) for node in member) for member in (a, b))
    return (left & right).total() / (left | right).total()


def _reaches(source: Sequence[fx.Node], target: Sequence[fx.Node]) -> bool:
    goal, seen, pending = set(target), set(source), list(source)
    while pending:
        for user in pending.pop().users:
            if user in goal:
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False
