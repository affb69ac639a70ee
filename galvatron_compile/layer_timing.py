"""Times of layer graphs on the device at hand, measured by running them, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from galvatron_compile.job import Job
from galvatron_compile.work import Cores

T = TypeVar("T")
FormKey = tuple[int, int, bool]  # class index, tensor-parallel degree, sequence parallel
TimingKey = tuple[int, int, bool, int]  # … and the micro-batch size on one rank

Clock = Callable[[], float]
Forward = Callable[[], Callable[[], Any]]  # runs forward, returns what runs backward

LONGEST_RUN_MS = 200.0  # forward and backward; what takes longer is extrapolated from less


@dataclass(frozen=True)
class LayerTiming:
    """Time of one forward and one backward of a layer's computation, collectives left out."""

    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class Experiment:
    """One form of a layer to time at some batch sizes.

    text: describes all that the time depends on but the batch size and the device.
    sizes: local batches whose times are wanted, ascending; may be empty if none fits.
    first: the batch size to begin with, which is quick and need not be one of ``sizes``.
    prepare: batch size -> a function that runs forward and returns one that runs backward.
    """

    form: FormKey
    text: str
    sizes: tuple[int, ...]
    first: int
    prepare: Callable[[int], Forward]

    def next_size(self, size: int, timing: LayerTiming) -> int | None:
        """The size to time after ``size`` took ``timing``; None if no other says more.

        As large as wanted and as LONGEST_RUN_MS allows if times grow with the size. Launches are
        most of the time of small sizes, so that the next time may allow a yet larger one.
        """
        total_ms = max(timing.forward_ms + timing.backward_ms, 1e-3)
        largest, affordable = max(self.sizes, default=size), int(size * LONGEST_RUN_MS / total_ms)
        within = [s for s in self.sizes if size < s <= affordable]
        if within and (within[-1] >= 2 * size or within[-1] == largest):
            return within[-1]
        return affordable if 2 * size <= affordable < largest else None


def interpolate(
    timings: Mapping[TimingKey, LayerTiming], form: FormKey, batch: float
) -> LayerTiming | None:
    """The time at a batch size between (or beyond) measured ones, linear in the batch size.

    From a single size, or where noise made the larger of two the quicker one, beyond it: in
    proportion.
    """
    sizes = sorted(key[3] for key in timings if key[:3] == form)
    if not sizes:
        return None
    if batch in sizes:
        return timings[(*form, int(batch))]
    if len(sizes) == 1:
        only, share = timings[(*form, sizes[0])], batch / sizes[0]
        return LayerTiming(only.forward_ms * share, only.backward_ms * share)
    above = next((k for k, size in enumerate(sizes) if size > batch), len(sizes) - 1)
    low, high = sizes[max(0, above - 1)], sizes[max(1, above)]
    first, second = timings[(*form, low)], timings[(*form, high)]
    share = (batch - low) / (high - low)

    def between(a: float, b: float) -> float:
        if share > 1 and b < a:
            return b * batch / high
        return max(a + share * (b - a), 0.0)

    return LayerTiming(
        between(first.forward_ms, second.forward_ms),
        between(first.backward_ms, second.backward_ms),
    )


def measure_layers(
    experiments: Iterable[Experiment],
    job: Job,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[TimingKey, LayerTiming]:
    """Time every experiment on all ranks at once, so that sharing of the machine counts.

    Collective. The result is the mean over ranks, the same on every rank. A size for which any
    rank has not enough memory, and all larger ones, are left out on every rank. Rank 0 reads and
    writes the cache (``cache_dir``, one JSON file a machine); nothing is cached if it is None.
    """
    experiments = list(experiments)
    cores = job.cores()
    place, clock = _machine(job, cores), _clock(job, cores)
    cached = job.gather(_read_cache(cache_dir, place) if job.rank == 0 else {})[0]
    timings: dict[TimingKey, LayerTiming] = {}
    for done, experiment in enumerate(experiments):
        size: int | None = experiment.first
        while size is not None:
            timing = _timing(experiment, size, job, cached, clock)
            if timing is None:
                break
            timings[(*experiment.form, size)] = timing
            size = experiment.next_size(size, timing)
        if progress is not None:
            progress(done + 1, len(experiments))
    if job.rank == 0 and cache_dir is not None:
        _write_cache(cache_dir, place, cached)
    return timings


def _timing(
    experiment: Experiment, size: int, job: Job, cached: dict[str, list[float]], clock: Clock
) -> LayerTiming | None:
    """From the cache, or measured and put there; None if some rank has not enough memory."""
    name = hashlib.sha256(f"{experiment.text} batch={size}".encode()).hexdigest()[:24]
    if name not in cached:
        made: list[Forward] = []
        # All ranks are ready before any is timed: preparing takes longer than timing, and a rank
        # that is timed while others have nothing to do has more of a shared machine.
        if not all(job.everyone(partial(_prepare, experiment.prepare, size, job.device, made))):
            return None
        each = job.everyone(partial(_time, made[0], job.device, clock))
        known = [times for times in each if times is not None]
        if len(known) < len(each):
            return None
        cached[name] = [statistics.fmean(times) for times in zip(*known, strict=True)]
    return LayerTiming(*cached[name])


def _prepare(
    prepare: Callable[[int], Forward], size: int, device: torch.device, made: list[Forward]
) -> bool:
    """Put what is to be timed into ``made``; False if the memory does not suffice."""
    found = _attempt(lambda: prepare(size), device)
    if found is not None:
        made.append(found)
    return found is not None


def _time(
    forward: Forward, device: torch.device, clock: Clock
) -> tuple[float, float] | None:
    """Forward and backward in ms; None if the memory does not suffice."""
    return _attempt(lambda: _means(forward, clock), device)


def _attempt(step: Callable[[], T], device: torch.device) -> T | None:
    try:
        return step()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for this on GPUs only."""
    signs = ("can't allocate memory", "bad_alloc", "ALLOC_FAILED", "out of memory")
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in signs)


_LEAST_S, _MOST_S, _ENOUGH_RUNS = 0.1, 0.4, 9


def _means(forward: Forward, clock: Clock) -> tuple[float, float]:
    """Of repeated runs after one to warm up, which go on for a while, so that ranks that share the
    machine run beside each other. A run of a second or more is its own warm-up.

    Not the median: a step is a sum of many such runs, with all that now and then delays one.
    """
    pairs: list[tuple[float, float]] = []
    start_s = time.perf_counter()
    while len(pairs) < 2 or _goes_on(len(pairs), time.perf_counter() - start_s):
        start = clock()
        backward = forward()
        middle = clock()
        backward()
        pairs.append((middle - start, clock() - middle))
        if sum(pairs[0]) > 1:
            break
    kept = pairs[1:] or pairs
    forward_s, backward_s = zip(*kept, strict=True)
    return statistics.fmean(forward_s) * 1e3, statistics.fmean(backward_s) * 1e3


def _goes_on(num_runs: int, elapsed_s: float) -> bool:
    return elapsed_s < _LEAST_S or (num_runs < _ENOUGH_RUNS and elapsed_s < _MOST_S)


def _clock(job: Job, cores: Sequence[Cores]) -> Clock:
    """Seconds; on a GPU when it is done with all that it was given.

    Where ranks of one thread share cores they have them in turns, some for longer than others, and
    who is done leaves them to the rest. There it is this process's CPU time, times how long that
    takes while all ranks are busy.
    """
    if job.device.type == "cuda":
        return partial(_after_device, job.device)
    crowding = _crowding(job, cores)
    if crowding == 1 or cores[job.rank].num_threads > 1:  # of several threads some may be idle
        return time.perf_counter
    return lambda: time.process_time() * crowding


def _crowding(job: Job, cores: Sequence[Cores]) -> float:
    """Threads for each core that this rank may use, at least 1."""
    if not cores:
        return 1.0
    mine = cores[job.rank]
    num_threads = sum(each.num_threads for each in cores if each.pool == mine.pool)
    return max(1.0, num_threads / mine.num_cores)


def _after_device(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


_METHOD = "method4"  # times that were taken in another way than now are not comparable


def _machine(job: Job, cores: Sequence[Cores]) -> str:
    """Everything about the machine and the software that a time depends on."""
    device = (
        torch.cuda.get_device_name(job.device)
        if job.device.type == "cuda"
        else f"{os.uname().machine}-{os.cpu_count()}cpu-{torch.get_num_threads()}threads"
    )
    crowding = f"{_crowding(job, cores):g}acore"
    where = f"{device} torch{torch.__version__} ranks{job.world_size} {crowding} {_METHOD}"
    return where.replace("/", "-")


def _read_cache(cache_dir: Path | None, place: str) -> dict[str, list[float]]:
    path = cache_dir / f"{place}.json" if cache_dir else None
    if path is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:  # half-written by a process that died: measure again
        return {}


def _write_cache(cache_dir: Path, place: str, cached: Mapping[str, list[float]]) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = cache_dir / f".{place}.{os.getpid()}.json"
    temporary.write_text(json.dumps(cached))
    temporary.replace(cache_dir / f"{place}.json")


def default_cache_dir() -> Path:
    """``$GALVATRON_CACHE``, or ``galvatron_compile`` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("GALVATRON_CACHE", str(Path(base) / "galvatron_compile")))
