"""Menus of every kind of layer in a family, made once and kept.

A kind is a layer class, the micro-batches in flight, and whether its stage sends at it. Menus
differ by the transient peak that is allowed and by the layouts that a pattern admits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from galvatron_compile.passes.pipeline.menu import Menu
from galvatron_compile.passes.pipeline.patterns import Item, Walk
from galvatron_compile.passes.pipeline.problem import Ints
from galvatron_compile.passes.pipeline.tables import Tables


@dataclass(frozen=True)
class LayerCosts:
    """Options of one kind of layer: [options] each."""

    options: Ints
    time_ns: Ints
    memory_bytes: Ints
    transient_bytes: Ints
    layout: Ints

    def where(self, keep: Ints) -> LayerCosts:
        return LayerCosts(
            *(self.options[keep], self.time_ns[keep], self.memory_bytes[keep]),
            *(self.transient_bytes[keep], self.layout[keep]),
        )

    def menu(self) -> Menu:
        return Menu(self.options, self.time_ns, self.memory_bytes)


Kind = tuple[int, int, bool, bool]
"""Class, micro-batches in flight, sends back, sends to the next stage."""


class Choices:
    """costs[n], kinds[n]: options and class of the kind of layer with number n."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.numbers: dict[Kind, int] = {}
        self.costs: list[LayerCosts] = []
        self.kinds: list[int] = []
        self.menus: dict[tuple[object, ...], Menu] = {}

    def menu_of(self, key: Kind) -> int:
        """Number of this kind of layer among the solver's costs."""
        if key in self.numbers:
            return self.numbers[key]
        tables, (kind, flight, back, following) = self.tables, key
        options = np.flatnonzero(tables.allowed[kind])
        time = tables.time_ns[kind, options]
        if back:
            time = time + tables.send_back_ns[kind, options]
        if following:
            time = time + tables.send_next_ns[kind, options]
        memory = tables.state_bytes[kind, options] + flight * tables.saved_bytes[kind, options]
        self.numbers[key] = len(self.costs)
        self.kinds.append(kind)
        self.costs.append(
            LayerCosts(
                *(options, time, memory),
                *(tables.transient_bytes[kind, options], tables.layout[options]),
            )
        )
        return self.numbers[key]

    def menu(self, index: int, peak: int, layouts: Walk | None) -> Menu:
        """Options of a kind of layer with a transient up to ``peak``, in some or all layouts."""
        key = (index, peak, layouts)
        if key not in self.menus:
            costs = self.costs[index]
            keep = costs.transient_bytes <= peak
            if layouts is not None:
                keep &= np.isin(costs.layout, layouts)
            self.menus[key] = costs.where(np.flatnonzero(keep)).menu()
        return self.menus[key]

    def folded_menu(self, item: Item, peak: int) -> Menu:
        """Options of a single layer with the switching on both sides of it."""
        key = (item, peak)
        if key not in self.menus:
            (_, index, before, after), (a, b) = item
            costs, kind, switch = self.costs[index], self.kinds[index], self.tables.switch
            time = costs.time_ns
            if before >= 0:
                time = time + switch(before, kind)[a, costs.layout]
            if after >= 0:
                time = time + switch(kind, after)[costs.layout, b]
            keep = np.flatnonzero(costs.transient_bytes <= peak)
            self.menus[key] = replace(costs, time_ns=time).where(keep).menu()
        return self.menus[key]

    def tied_menu(self, members: tuple[int, ...], peak: int, layout: int | None) -> Menu | None:
        """Options that all tied layers can take; None if there is none."""
        key = ("tie", members, peak, layout)
        if key not in self.menus:
            joint = self.joint(members)
            keep = joint.transient_bytes <= peak
            if layout is not None:
                keep &= joint.layout == layout
            if not keep.any():
                return None
            self.menus[key] = joint.where(np.flatnonzero(keep)).menu()
        return self.menus[key]

    def joint(self, members: tuple[int, ...]) -> LayerCosts:
        """Costs of several layers that take one option together."""
        shared = self.costs[members[0]].options
        for index in members[1:]:
            shared = np.intersect1d(shared, self.costs[index].options)
        parts = []
        for index in members:
            costs = self.costs[index]
            parts.append(costs.where(np.searchsorted(costs.options, shared)))
        return replace(
            parts[0],
            time_ns=np.sum([part.time_ns for part in parts], axis=0),
            memory_bytes=np.sum([part.memory_bytes for part in parts], axis=0),
            transient_bytes=np.max([part.transient_bytes for part in parts], axis=0),
        )
