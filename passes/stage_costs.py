"""stage_costs: LayerCosts, strategies → StageCosts, the numbers that the search works on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from galvatron_compile.costs import LayerCost
from galvatron_compile.passes.layer_costs import LayerCosts
from galvatron_compile.passes.pipeline.problem import Bools, Ints, StageCosts
from galvatron_compile.passes.pricing import micro_time, once_time, whole_ns
from galvatron_compile.passes.reshard_cost import Switches, layout_of
from galvatron_compile.strategy import Strategy


def stage_costs(
    costs: LayerCosts, switches: Switches, strategies: Sequence[Strategy], count: int
) -> StageCosts:
    """Every class under every strategy on the ranks of one stage, in ``count`` micro-batches."""
    shape = (len(costs.layered.classes), len(strategies))
    numbers = {name: np.zeros(shape, dtype=np.int64) for name in _FIELDS}
    allowed = np.zeros(shape, dtype=np.bool_)
    batch = costs.workload.global_batch_size
    slowdown = costs.cluster.overlap_slowdown
    for index in range(shape[0]):
        for option, strategy in enumerate(strategies):
            if batch % (count * strategy.dp) or costs.why_not(index, strategy) is not None:
                continue
            allowed[index, option] = True
            cost = costs.cost(index, strategy, count)
            for name, value in _numbers(cost, slowdown).items():
                numbers[name][index, option] = value
    layouts = list(dict.fromkeys(map(layout_of, strategies)))
    return StageCosts(
        strategies=tuple(strategies),
        allowed=allowed,
        layout=np.array([layouts.index(layout_of(s)) for s in strategies], dtype=np.int64),
        switch_ns=_switches(costs, switches, strategies, allowed, len(layouts), count),
        **numbers,
    )


_FIELDS = (
    *("micro_ns", "step_ns", "state_bytes", "saved_bytes", "transient_bytes"),
    *("forward_send_ns", "backward_send_ns"),
)


def _numbers(cost: LayerCost, overlap_slowdown: float) -> dict[str, int]:
    return {
        "micro_ns": whole_ns(micro_time(cost, overlap_slowdown).step_ms),
        "step_ns": whole_ns(once_time(cost, overlap_slowdown).step_ms),
        "state_bytes": cost.state_bytes,
        "saved_bytes": cost.saved_bytes,
        "transient_bytes": cost.transient_bytes,
        "forward_send_ns": whole_ns(cost.forward_send_ms),
        "backward_send_ns": whole_ns(cost.backward_send_ms),
    }


def _switches(
    costs: LayerCosts,
    switches: Switches,
    strategies: Sequence[Strategy],
    allowed: Bools,
    num_layouts: int,
    count: int,
) -> dict[tuple[int, int], Ints]:
    """(class before, class after) -> [layouts, layouts] ns; pairs that never switch left out."""
    layers = costs.layered.layers
    batch = costs.workload.global_batch_size // count
    found: dict[tuple[int, int], Ints] = {}
    layouts = list(dict.fromkeys(map(layout_of, strategies)))
    for cut in range(len(layers) - 1):
        pair = layers[cut].class_index, layers[cut + 1].class_index
        if pair in found:
            continue
        # One strategy of every layout that both classes can have.
        usable = [
            {layout_of(s): s for s, ok in zip(strategies, allowed[index], strict=True) if ok}
            for index in pair
        ]
        times = np.zeros((num_layouts, num_layouts), dtype=np.int64)
        for row, source in enumerate(layouts):
            for column, target in enumerate(layouts):
                if source != target and source in usable[0] and target in usable[1]:
                    ends = usable[0][source], usable[1][target]
                    time_ms = switches.ms(cut, *ends, batch, costs.workload.world_size)
                    times[row, column] = whole_ns(time_ms)
        found[pair] = times
    return found
