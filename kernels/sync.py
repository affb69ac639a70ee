"""Synchronisation between ranks, in pure Triton: signal, wait, barrier. Used by every peer kernel.

A *flag* is an int64 in memory that every rank can address; it holds the last epoch at which it was
set. An *epoch* is the number of an operation on one group of ranks. It is counted in device memory
(``Peers.state``), never on the host, so a captured CUDA graph counts on when it is replayed, and
flags are never cleared: a flag is up for epoch ``e`` if it holds ``e`` or more. 2**63 epochs do not
happen.

Memory order. ``signal`` is a release and ``wait`` an acquire, both at system scope, because the
other side is another device. A release orders what its own *thread* did before; Triton emits no
barrier between the stores of a block and a scalar atomic, so ``signal`` has its own:
``tl.debug_barrier()`` becomes ``bar.sync``, after which the release of one thread covers the stores
of all. ``wait`` ends with one too, for the loads that follow. The interpreter cannot show whether a
barrier is missing; the tests look for it in the machine code.

Bounded waits. A peer that has died must give an error, not a hang: after ``limit`` polls ``wait``
returns False and writes 1 + the peer's rank to ``failed``; from then on no wait of this group polls
more than once. What depends on a wait that failed is stored as NaN. A rank that waited in vain is
not *sound* any more: it stores nothing for its peers and signals nothing. If the peer was only late
it still finds what it waited for, untouched, and then fails too, for want of this rank's signals;
otherwise this rank would overwrite what the peer still reads.

Bytes: 8 for a signal and 8 for each poll; polls read this rank's own memory.
"""

from __future__ import annotations

from galvatron_compile.kernels.base import tl, triton


@triton.jit
def is_sound(state):  # type: ignore[no-untyped-def]
    """Whether no wait of this rank has failed so far; state: see ``peers.Symmetric``."""
    return tl.load(state + 1, volatile=True) == 0


@triton.jit
def signal(flag, epoch, sound):  # type: ignore[no-untyped-def]
    """Set ``flag`` (int64 pointer, here or at a peer) once all this program stored is visible.

    sound: what ``is_sound`` said before it stored; if not, the flag stays.
    """
    if sound:
        tl.debug_barrier()
        tl.atomic_xchg(flag, epoch, sem="release", scope="sys")


@triton.jit
def wait(flag, epoch, source, failed, limit):  # type: ignore[no-untyped-def]
    """Poll ``flag`` until it is up for ``epoch``; what its setter stored is then visible here.

    source: rank that sets the flag, for the error. failed: int64 pointer. limit: polls, at most.
    Returns whether the flag was up.
    """
    limit = tl.where(tl.load(failed, volatile=True) == 0, limit, 0)
    num_polls = limit * 0
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen < epoch) & (num_polls < limit):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        num_polls += 1
    if seen < epoch:
        tl.atomic_cas(failed, epoch * 0, tl.cast(source + 1, tl.int64))  # keep the first
    tl.debug_barrier()
    return seen >= epoch


@triton.jit
def barrier(pads, slot, state, rank, n, limit):  # type: ignore[no-untyped-def]
    """All ranks wait for each other; one program of each calls this.

    pads: table of the ranks' pads. slot: first of ``n`` flags in each pad; flag ``slot + r`` is
    set by rank ``r``.
    """
    epoch, sound = tl.load(state), is_sound(state)
    here = flag_of(pads, rank, slot)
    for step in range(1, n):
        signal(flag_of(pads, (rank + step) % n, slot + rank), epoch, sound)
    for step in range(1, n):
        source = (rank + step) % n
        wait(here + source, epoch, source, state + 1, limit)


@triton.jit
def flag_of(pads, rank, slot):  # type: ignore[no-untyped-def]
    """int64 pointer to flag ``slot`` in the pad of ``rank``; pads: int64 table of addresses."""
    return tl.load(pads + rank).to(tl.pointer_type(tl.int64)) + slot


@triton.jit
def buffer_of(buffers, rank, epoch, capacity, like):  # type: ignore[no-untyped-def]
    """Pointer to the buffer of ``rank`` that ``epoch`` uses, of the type of the pointer ``like``.

    Two halves of ``capacity`` bytes (a multiple of 16) are used in turn. This is enough, because
    every operation waits for a signal of each peer: if this rank is in epoch e + 2, it has finished
    e + 1, so every peer had begun e + 1, so no peer still reads or writes what belongs to e. It
    needs a rank's operations to run one after the other (``Peers.begin`` sees to it).
    """
    address = tl.load(buffers + rank) + (epoch & 1) * capacity
    # Without the hint nothing is known of the address, and accesses are narrow.
    return tl.multiple_of(tl.multiple_of(address, 16).to(like.dtype), 16)


@triton.jit
def copy_flat(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy ``count`` elements; the accesses of a block are 16 bytes wide."""
    offsets = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        mask = offsets < count - start
        values = tl.load(source + start + offsets, mask=mask)
        tl.store(target + start + offsets, values, mask=mask)


@triton.jit
def fill_with_nan(target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For what cannot be copied, since its source did not signal."""
    nothing = tl.full((BLOCK,), float("nan"), tl.float32).to(target.dtype.element_ty)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        tl.store(target + start + offsets, nothing, mask=offsets < count - start)


@triton.jit
def barrier_kernel(pads, state, slot, rank, n, limit):  # type: ignore[no-untyped-def]
    """The barrier as a launch of its own, of one program; see ``Peers.barrier``."""
    barrier(pads, slot, state, rank, n, limit)
