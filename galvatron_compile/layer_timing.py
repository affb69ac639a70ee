"""Times of layer graphs on the device at hand, measured by running them, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from galvatron_compile.job import Job

FormKey = tuple[int, int, bool]  # class index, tensor-parallel degree, sequence parallel
TimingKey = tuple[int, int, bool, int]  # … and the micro-batch size on one rank


@dataclass(frozen=True)
class LayerTiming:
    """Time of one forward and one backward of a layer's computation, collectives left out."""

    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class Experiment:
    """One layer graph to time. ``text`` describes all that its time depends on but the device."""

    key: TimingKey
    text: str
    forward: Callable[[], Any]


def interpolate(
    timings: Mapping[TimingKey, LayerTiming], form: FormKey, batch: float
) -> LayerTiming | None:
    """The time at a batch size between (or beyond) measured ones, linear in the batch size."""
    sizes = sorted(key[3] for key in timings if key[:3] == form)
    if not sizes:
        return None
    if batch in sizes:
        return timings[(*form, int(batch))]
    if len(sizes) == 1:
        only = timings[(*form, sizes[0])]
        return LayerTiming(only.forward_ms, only.backward_ms)
    above = next((k for k, size in enumerate(sizes) if size > batch), len(sizes) - 1)
    low, high = sizes[max(0, above - 1)], sizes[max(1, above)]
    first, second = timings[(*form, low)], timings[(*form, high)]
    share = (batch - low) / (high - low)

    def between(a: float, b: float) -> float:
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

    Collective. The result is the mean over ranks, the same on every rank. Rank 0 reads and writes
    the cache (``cache_dir``, one JSON file a machine); nothing is cached if it is None.
    """
    experiments = list(experiments)
    place = _machine(job)
    cached = job.gather(_read_cache(cache_dir, place) if job.rank == 0 else {})[0]
    timings: dict[TimingKey, LayerTiming] = {}
    for done, experiment in enumerate(experiments):
        name = hashlib.sha256(experiment.text.encode()).hexdigest()[:24]
        if name not in cached:
            both = job.everyone(partial(_time, experiment.forward, job.device))
            cached[name] = [statistics.fmean(times) for times in zip(*both, strict=True)]
        timings[experiment.key] = LayerTiming(*cached[name])
        if progress is not None:
            progress(done + 1, len(experiments))
    if job.rank == 0 and cache_dir is not None:
        _write_cache(cache_dir, place, cached)
    return timings


def _time(forward: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median of repeated runs after one to warm up; at most about half a second in all."""
    pairs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + 0.4
    while len(pairs) < 2 or (len(pairs) < 9 and time.perf_counter() < deadline):
        start = _now(device)
        outputs = [t for t in forward() if isinstance(t, torch.Tensor) and t.requires_grad]
        middle = _now(device)
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        pairs.append((middle - start, _now(device) - middle))
    kept = pairs[1:]
    return (
        statistics.median(pair[0] for pair in kept) * 1e3,
        statistics.median(pair[1] for pair in kept) * 1e3,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _machine(job: Job) -> str:
    """Everything about the machine and the software that a time depends on."""
    device = (
        torch.cuda.get_device_name(job.device)
        if job.device.type == "cuda"
        else f"{os.uname().machine}-{os.cpu_count()}cpu-{torch.get_num_threads()}threads"
    )
    return f"{device} torch{torch.__version__} ranks{job.world_size}".replace("/", "-")


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
