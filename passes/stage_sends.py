"""stage_sends: LayerCosts, Plan → what every stage of a pipeline group sends.

A cut within a node takes the time of that tier; the closed form (passes.messages) has one time for
all cuts, that of the slower tier if one of them crosses nodes.
"""

from __future__ import annotations

from galvatron_compile.passes.layer_costs import LayerCosts
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.work import SendWork


def stage_sends(costs: LayerCosts, plan: Plan, group: int) -> tuple[SendWork, ...]:
    """In the order of the group's stages. costs: as for passes.stage_work."""
    stages = plan.stages or (Stage(0, len(plan.layers)),)
    return tuple(
        _sends(costs, plan, group, stages[number], number < len(stages) - 1, number > 0)
        for number in range(group, len(stages), plan.pp)
    )


def _sends(
    costs: LayerCosts, plan: Plan, group: int, stage: Stage, onward: bool, back: bool
) -> SendWork:
    sent = _carried(costs, plan, stage.last - 1)[0] * onward
    returned = _carried(costs, plan, stage.first)[1] * back
    ahead, behind = (_shares_node(costs, plan, group, other) for other in (group + 1, group - 1))
    return SendWork(
        _message_ms(costs, sent, ahead),
        _message_ms(costs, returned, behind),
        sent,
        returned,
        activations_in_node=onward and ahead,
        gradients_in_node=back and behind,
    )


def _message_ms(costs: LayerCosts, num_bytes: int, in_node: bool) -> float:
    ranks = costs.workload.world_size
    apart = ranks if in_node else max(ranks, costs.cluster.ranks_per_node)
    return costs.cluster.group_ms("p2p", num_bytes, 2, apart)


def _carried(costs: LayerCosts, plan: Plan, layer: int) -> tuple[int, int]:
    """Bytes of a layer's outputs and inputs on one rank."""
    index, strategy = costs.layered.layers[layer].class_index, plan.strategies[layer]
    sharded = costs.shardings.get(index, strategy)
    local = costs.local_batch(strategy, plan.num_micro_batches)
    sent, returned = costs.messages.bytes_carried(index, sharded)
    return int(sent * local), int(returned * local)


def _shares_node(costs: LayerCosts, plan: Plan, group: int, other: int) -> bool:
    """Whether every rank of ``group`` finds its neighbour in the ``other`` on its own node."""
    ranks, per_node = costs.workload.world_size, costs.cluster.ranks_per_node
    mine, theirs = group * ranks, other % plan.pp * ranks
    return all((mine + at) // per_node == (theirs + at) // per_node for at in range(ranks))
