"""Gradients of a parameter that several pipeline stages hold."""

from __future__ import annotations

import torch
import torch.distributed as dist

from galvatron_compile.entry import gather_full
from galvatron_compile.flat import FlatBucket
from galvatron_compile.slots import Slot
from galvatron_compile.units import ParameterUnit


def sum_tied(unit: ParameterUnit) -> None:
    """Add up the gradients of all stages that hold ``unit``, so that their copies stay equal.

    Stages may lay the parameter out differently, so whole gradients are summed, one parameter at a
    time (an embedding table, once a step). Collective over the unit's axes and ``unit.tied``.
    """
    assert unit.tied is not None and unit.tied.group is not None
    for bucket in unit.buckets:
        if not bucket.requires_grad:
            continue
        if bucket.reduced is None:  # no gradient came here; other stages may have one
            bucket.reduced = torch.zeros(
                bucket.shard_numel, dtype=bucket.reduce_dtype, device=unit.device
            )
        for slot in bucket.slots:
            _sum_slot(unit, bucket, slot)


def _sum_slot(unit: ParameterUnit, bucket: FlatBucket, slot: Slot) -> None:
    assert unit.tied is not None and bucket.reduced is not None
    layout = slot.layout
    shape = layout.local_shape(unit.rank)
    numel = torch.Size(shape).numel()
    mine = bucket.reduced[slot.offset : slot.offset + numel].view(shape)
    whole = gather_full(layout, mine, unit.data, unit.tensor).contiguous().clone()
    dist.all_reduce(whole, group=unit.tied.group)
    mine.copy_(layout.take(whole, unit.rank))
    bucket.gradients.touched.add(slot.index)
