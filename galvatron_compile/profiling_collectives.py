"""Measuring communication, alone and beside computation, on all ranks at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from galvatron_compile.curves import KINDS, CollectiveCurve, rising
from galvatron_compile.gather_scatter import all_gather, reduce_scatter
from galvatron_compile.stopwatch import Stopwatch
from galvatron_compile.torch_private import new_local_group

_ITEM_BYTES = 4  # float32
_MAX_SIZES = 6  # group sizes per tier: enough for a curve, few enough for a thousand ranks


def groups_of(rank: int, num_nodes: int, per_node: int) -> list[tuple[str, tuple[int, ...]]]:
    """The groups this rank is in, one per tier and size: (tier, its ranks).

    Inside a node, neighbours; across nodes, ranks strided evenly over the whole job. Sizes are the
    divisors of the ranks of a node, and of all ranks.
    """
    world_size = num_nodes * per_node
    found = []
    for size in _divisors(per_node):
        start = rank // size * size
        found.append(("node", tuple(range(start, start + size))))
    for size in _divisors(world_size) if num_nodes > 1 else []:
        stride = world_size // size
        found.append(("cluster", tuple(range(rank % stride, world_size, stride))))
    return found


def _divisors(number: int) -> list[int]:
    sizes = [size for size in range(2, number + 1) if number % size == 0]
    if len(sizes) <= _MAX_SIZES:
        return sizes
    return sorted(
        {sizes[round(i * (len(sizes) - 1) / (_MAX_SIZES - 1))] for i in range(_MAX_SIZES)}
    )


@contextmanager
def group_among(ranks: tuple[int, ...]) -> Iterator[dist.ProcessGroup | None]:
    """A process group of these ranks that ends with the block; None is the default group."""
    if len(ranks) == dist.get_world_size():
        yield None
        return
    group = new_local_group(ranks)
    try:
        yield group
    finally:
        dist.barrier()  # a peer of this group may still be inside its last collective
        dist.destroy_process_group(group)


def measure_group(
    watch: Stopwatch,
    tier: str,
    ranks: tuple[int, ...],
    group: dist.ProcessGroup | None,
    payloads_bytes: Sequence[int],
    source: str,
) -> list[CollectiveCurve]:
    """Every collective but p2p over ``group`` of ``ranks``; every rank calls with its own group."""
    curves = []
    for kind in KINDS:
        if kind != "p2p":
            points = _sweep(watch, payloads_bytes, _collective(watch, kind, ranks, group))
            curves.append(CollectiveCurve(kind, tier, len(ranks), points, source))
    return curves


def measure_p2p(
    watch: Stopwatch, tier: str, per_node: int, payloads_bytes: Sequence[int], source: str
) -> CollectiveCurve:
    """Neighbours in pairs (in a node), or the same place in neighbouring nodes; all at once."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    step = 1 if tier == "node" else per_node
    place = (rank % per_node if tier == "node" else rank) // step
    peer = rank + step if place % 2 == 0 else rank - step
    same_node = peer // per_node == rank // per_node
    paired = 0 <= peer < world_size and (tier == "cluster" or same_node)

    def make(payload_bytes: int) -> tuple[int, Callable[[], object]]:
        tensor = torch.zeros(payload_bytes // _ITEM_BYTES, device=watch.device)
        if not paired:
            return payload_bytes, lambda: None
        if place % 2 == 0:
            return payload_bytes, lambda: dist.send(tensor, peer)
        return payload_bytes, lambda: dist.recv(tensor, peer)

    return CollectiveCurve("p2p", tier, 2, _sweep(watch, payloads_bytes, make), source)


def _sweep(
    watch: Stopwatch,
    payloads_bytes: Sequence[int],
    make: Callable[[int], tuple[int, Callable[[], object]]],
) -> tuple[tuple[float, float], ...]:
    """Ascending payloads, until one call would take longer than a measurement may."""
    points: list[tuple[float, float]] = []
    for payload_bytes in payloads_bytes:
        if watch.predicts_over(points, payload_bytes):
            break
        exact_bytes, call = make(payload_bytes)
        points.append((float(exact_bytes), watch.ms(call)))
    return rising(points)


def _collective(
    watch: Stopwatch, kind: str, ranks: tuple[int, ...], group: dist.ProcessGroup | None
) -> Callable[[int], tuple[int, Callable[[], object]]]:
    """payload bytes -> (bytes after rounding to whole parts, one call)."""
    size = len(ranks)

    def make(payload_bytes: int) -> tuple[int, Callable[[], object]]:
        part = max(1, payload_bytes // _ITEM_BYTES // size)
        whole = torch.zeros(part * size, device=watch.device)
        mine = torch.zeros(part, device=watch.device)
        other = torch.zeros_like(whole)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "all_gather": lambda: all_gather(whole, mine, group).wait(),
            "reduce_scatter": lambda: reduce_scatter(mine, whole, group).wait(),
            "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
            "broadcast": lambda: dist.broadcast(whole, ranks[0], group=group),
        }
        return part * size * _ITEM_BYTES, calls[kind]

    return make


def measure_overlap(
    watch: Stopwatch,
    compute: Callable[[], object],
    compute_ms: float,
    payload_bytes: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[float, float, float]:
    """(joint, compute, communication) factors of :class:`galvatron_compile.facts.Overlap`.

    All-reduces over ``group`` (all ranks; every rank calls with its own) run beside ``compute``
    (one call takes ``compute_ms``): as long as it, then three times as long to see what computation
    suffers, then a third as long. There are three at least, one behind the other as gradients are
    summed: a lone one would show how late it starts beside computation, not how slow it is.
    """
    reduces = 3
    numel = payload_bytes // _ITEM_BYTES
    tensors = [torch.zeros(numel, device=watch.device) for _ in range(3 * reduces)]
    reduce_ms = watch.ms(lambda: dist.all_reduce(tensors[0], group=group))
    calls = max(1, round(reduces * reduce_ms / compute_ms))

    def run(times: tuple[int, int]) -> tuple[float, float, float]:
        return _together(watch, compute, times[0] * calls, tensors[: times[1] * reduces], group)

    # In turns, and the least of each: what else the machine does must not hit one of them only.
    mixes = ((1, 0), (0, 1), (1, 1), (1, 3), (3, 1))
    run((1, 1))  # warms up threads and streams
    # On slow links a round takes long and varies little.
    num_rounds = 1 if watch.late else 5 if reduce_ms < 100 else 3
    rounds = [[run(mix) for mix in mixes] for _ in range(num_rounds)]
    least = [[min(times) for times in zip(*mix, strict=True)] for mix in zip(*rounds, strict=True)]
    flat = watch.agree([time for mix in least for time in mix])
    alone, reduced, both, beside, under = (flat[i : i + 3] for i in range(0, 15, 3))
    compute_alone_ms, communication_alone_ms = alone[0], reduced[1]
    low, high = sorted((compute_alone_ms, communication_alone_ms))
    return (
        max(1.0, 1 + (both[2] - high) / low),
        max(1.0, beside[0] / compute_alone_ms),
        max(1.0, under[1] / communication_alone_ms),
    )


def _together(
    watch: Stopwatch,
    compute: Callable[[], object],
    calls: int,
    tensors: list[torch.Tensor],
    group: dist.ProcessGroup | None,
) -> tuple[float, float, float]:
    """Start all-reduces of ``tensors``, compute beside them: ms until (computed, reduced, both)."""
    watch.barrier()
    if watch.device.type == "cuda":
        return _together_cuda(compute, calls, tensors, group)
    reduced_s = 0.0
    start_s = time.perf_counter()
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]

    def wait() -> None:
        nonlocal reduced_s
        for work in works:
            assert work is not None
            work.wait()
        reduced_s = time.perf_counter() - start_s

    waiter = threading.Thread(target=wait)
    waiter.start()
    for _ in range(calls):
        compute()
    computed_s = time.perf_counter() - start_s
    waiter.join()
    return 1e3 * computed_s, 1e3 * reduced_s, 1e3 * max(computed_s, reduced_s)


def _together_cuda(
    compute: Callable[[], object],
    calls: int,
    tensors: list[torch.Tensor],
    group: dist.ProcessGroup | None,
) -> tuple[float, float, float]:
    start, computed, reduced = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    side = torch.cuda.Stream()
    start.record()
    side.wait_event(start)
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    with torch.cuda.stream(side):  # waits there, so that the computing stream does not
        for work in works:
            assert work is not None
            work.wait()
        reduced.record()
    for _ in range(calls):
        compute()
    computed.record()
    torch.cuda.synchronize()
    both = start.elapsed_time(computed), start.elapsed_time(reduced)
    return float(both[0]), float(both[1]), float(max(both))
