"""The kernels of all_reduce.py, and the exchange of signals that sum_norm.py shares with them.

Every kernel cuts what it does among its programs so that program ``j`` of a rank reads only what
the programs ``j`` of all ranks published: it stores, tells the programs ``j`` of the peers, and
waits for theirs. So no program waits for another of its own rank, and they may run in any order.

What the parameters of all of them are::

    x, y                 contiguous; what is given, and the result in the dtype of x
    buffers, pads, state, capacity, num_slots, limit (max_polls)    as in ``peers.Symmetric``
    rank, n              of this process, of the group
    BLOCK                elements that a program moves at a time
"""

from __future__ import annotations

from galvatron_compile.kernels.base import tl, triton
from galvatron_compile.kernels.sync import buffer_of, flag_of, is_sound, signal, wait


@triton.jit
def exchange(pads, state, sound, slot, num_slots, rank, limit, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell program ``j`` of every peer that this program ``j`` has stored, and wait for the same.

    slot: 0, or n num_slots for the second exchange of one operation. Returns whether all came.
    """
    epoch = tl.load(state)
    for step in range(1, n):
        flag = slot + rank * num_slots + tl.program_id(0)
        signal(flag_of(pads, (rank + step) % n, flag), epoch, sound)
    arrived = sound
    for step in range(1, n):
        source = (rank + step) % n
        flag = flag_of(pads, rank, slot + source * num_slots + tl.program_id(0))
        arrived = wait(flag, epoch, source, state + 1, limit) & arrived
    return arrived


@triton.jit
def publish(x, mine, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store this program's blocks of ``x[:count]`` in this rank's buffer, from ``mine`` on."""
    for offset in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        places = offset + tl.arange(0, BLOCK)
        mask = places < count
        tl.store(mine + places, tl.load(x + places, mask=mask), mask=mask)


@triton.jit
def publish_shards(x, mine, size, shard, n: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store this program's blocks of every shard of ``x[:size]``; the last may be shorter."""
    for part in range(0, n):
        first = tl.cast(shard, tl.int64) * part
        publish(x + first, mine + first, tl.minimum(size - part * shard, shard), BLOCK)


@triton.jit
def sum_of_ranks(  # type: ignore[no-untyped-def]
    buffers, epoch, like, places, mask, capacity, n: tl.constexpr
):
    """float32 sum over the ranks, in rank order, of what lies at ``places`` of their buffers."""
    total = tl.load(buffer_of(buffers, 0, epoch, capacity, like) + places, mask=mask, other=0.0)
    total = total.to(tl.float32)
    for source in range(1, n):
        theirs = buffer_of(buffers, source, epoch, capacity, like)
        total += tl.load(theirs + places, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def store_sums(  # type: ignore[no-untyped-def]
    y, buffers, epoch, first, count, arrived, capacity, n: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's blocks of ``y[:count]``: sums of what lies from ``first`` on in the buffers.

    y may be that part of this rank's own buffer, if no peer reads it: it is read before.
    """
    for offset in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        places = offset + tl.arange(0, BLOCK)
        mask = places < count
        total = sum_of_ranks(buffers, epoch, y, first + places, mask, capacity, n)
        total = tl.where(arrived, total, float("nan"))
        tl.store(y + places, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def fetch(y, theirs, count, arrived, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's blocks of ``y[:count]``: what lies at ``theirs``."""
    for offset in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        places = offset + tl.arange(0, BLOCK)
        mask = places < count
        values = tl.load(theirs + places, mask=mask, other=0.0).to(tl.float32)
        values = tl.where(arrived, values, float("nan"))
        tl.store(y + places, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def one_shot_kernel(  # type: ignore[no-untyped-def]
    x, y, buffers, pads, state, size, capacity, num_slots, rank, limit, n: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All-reduce of ``size`` elements: every rank adds all of them."""
    epoch, sound = tl.load(state), is_sound(state)
    if sound:
        publish(x, buffer_of(buffers, rank, epoch, capacity, x), size, BLOCK)
    arrived = exchange(pads, state, sound, 0, num_slots, rank, limit, n)
    store_sums(y, buffers, epoch, 0, size, arrived, capacity, n, BLOCK)


@triton.jit
def two_shot_kernel(  # type: ignore[no-untyped-def]
    x, y, buffers, pads, state, size, shard, capacity, num_slots, rank, limit, n: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All-reduce of ``size`` elements, cut into shards of ``shard``; the last may be shorter.

    Rank r puts the sums of shard r into its buffer in place of its own part, which nobody else
    reads; then all ranks fetch all sums.
    """
    epoch, sound = tl.load(state), is_sound(state)
    mine = buffer_of(buffers, rank, epoch, capacity, x)
    if sound:
        publish_shards(x, mine, size, shard, n, BLOCK)
    arrived = exchange(pads, state, sound, 0, num_slots, rank, limit, n)
    first = tl.cast(shard, tl.int64) * rank
    count = tl.minimum(size - rank * shard, shard)
    if sound:
        store_sums(mine + first, buffers, epoch, first, count, arrived, capacity, n, BLOCK)
    arrived = exchange(pads, state, sound, n * num_slots, num_slots, rank, limit, n) & arrived
    for step in range(0, n):
        source = (rank + step) % n
        first = tl.cast(shard, tl.int64) * source
        theirs = buffer_of(buffers, source, epoch, capacity, x) + first
        count = tl.minimum(size - source * shard, shard)
        fetch(y + first, theirs, count, arrived, BLOCK)


@triton.jit
def reduce_scatter_kernel(  # type: ignore[no-untyped-def]
    x, y, buffers, pads, state, shard, capacity, num_slots, rank, limit, n: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x: n shards of ``shard`` elements; y: the sums of this rank's shard."""
    epoch, sound = tl.load(state), is_sound(state)
    mine = buffer_of(buffers, rank, epoch, capacity, x)
    if sound:
        publish_shards(x, mine, n * shard, shard, n, BLOCK)
    arrived = exchange(pads, state, sound, 0, num_slots, rank, limit, n)
    first = tl.cast(shard, tl.int64) * rank
    store_sums(y, buffers, epoch, first, shard, arrived, capacity, n, BLOCK)


@triton.jit
def all_gather_kernel(  # type: ignore[no-untyped-def]
    x, y, buffers, pads, state, shard, capacity, num_slots, rank, limit, n: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x: ``shard`` elements; y: those of all ranks, in rank order."""
    epoch, sound = tl.load(state), is_sound(state)
    if sound:
        publish(x, buffer_of(buffers, rank, epoch, capacity, x), shard, BLOCK)
    arrived = exchange(pads, state, sound, 0, num_slots, rank, limit, n)
    for step in range(0, n):
        source = (rank + step) % n
        theirs = buffer_of(buffers, source, epoch, capacity, x)
        fetch(y + tl.cast(shard, tl.int64) * source, theirs, shard, arrived, BLOCK)
