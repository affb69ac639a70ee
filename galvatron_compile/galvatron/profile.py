"""A folder of measurements in Galvatron's format: a model's layers and a machine's links.

The names of the files vary with precision, model and machine, so they are found by pattern:

    computation_profiling_<precision>_<model>_all.json    forward ms a sample, by batch and length
    memory_profiling_<precision>_<model>_all.json         MB by tensor-parallel degree
    allreduce_bandwidth_<n>nodes_<g>gpus_per_node.json    "GB/s", consecutive or strided groups
    p2p_bandwidth_<n>nodes_<g>gpus_per_node.json          "GB/s" by pipeline degree
    sp_time_<n>nodes_<g>gpus_per_node.json                ms of all-reduce and all-to-all by MB
    overlap_coefficient.json                              slowdown of what runs at the same time
    galvatron_config_<model>_….json                       a plan (there may be none)

Its formulas take a MB for 2**20 bytes and a bandwidth of x "GB/s" for x MB per ms; so do we.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galvatron_compile.errors import ProfileError
from galvatron_compile.galvatron.reading import Source, find, line_through

PRECISIONS = ("bf16", "fp16")
_MACHINE = r"_(\d+)nodes_(\d+)gpus_per_node\.json"


@dataclass(frozen=True)
class Line:
    """Time by size: slope · size + offset, a least-squares fit."""

    slope: float
    offset: float

    def at(self, size: float) -> float:
        """Never below 0, where a fit through large sizes may lead."""
        return max(0.0, self.slope * size + self.offset)


@dataclass(frozen=True)
class Exchange:
    """Time of one collective over one group size. ms_by_mb: measured; line: fitted through them."""

    ms_by_mb: Mapping[float, float]
    line: Line

    def ms(self, size_mb: float) -> float:
        """The measured entry of exactly this size, or else the fitted line."""
        return self.ms_by_mb[size_mb] if size_mb in self.ms_by_mb else self.line.at(size_mb)


@dataclass(frozen=True)
class Ends:
    """Embedding and head together, or one of them: MB by tensor-parallel (or Ulysses) degree.

    states_mb: parameters, gradients and optimizer states; activation_mb: of one sample.
    """

    states_mb: Mapping[int, float]
    activation_mb: Mapping[int, float]


@dataclass(frozen=True)
class ModelProfile:
    """What was measured of the model at one sequence length.

    layer_ms, ends_ms: forward of one layer, of embedding and head, by samples on one GPU.
    parameter_mb: of one layer, 4 bytes a parameter. activation_mb: what one layer keeps of one
        sample, by degree; recomputed_mb: what it keeps with recomputation on one GPU.
    whole, first, last: embedding and head on one stage, or on the first and the last of several.
    """

    layer_ms: Line
    ends_ms: Line
    parameter_mb: float
    activation_mb: Mapping[int, float]
    recomputed_mb: float
    whole: Ends
    first: Ends
    last: Ends


@dataclass(frozen=True)
class GalvatronProfile:
    """A folder of Galvatron's measurements.

    models: by sequence length. bandwidth: MB/ms of gradient synchronisation by (group size,
    consecutive ranks). p2p: MB/ms by pipeline degree. all_reduce, all_to_all: by group size.
    overlap: o in max(x, b) + (o - 1) · min(x, b). files: name of the file of every part.
    """

    directory: str
    model: str
    precision: str
    num_nodes: int
    gpus_per_node: int
    models: Mapping[int, ModelProfile]
    bandwidth: Mapping[tuple[int, bool], float]
    p2p: Mapping[int, float]
    all_reduce: Mapping[int, Exchange]
    all_to_all: Mapping[int, Exchange]
    overlap: float
    files: Mapping[str, str]
    plan_path: str | None

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def element_bytes(self) -> int:
        return 2  # of bf16 and fp16, the only precisions read

    def at(self, seq_length: int) -> ModelProfile:
        """The model's measurements at this length; ProfileError if there are none."""
        if seq_length not in self.models:
            known = ", ".join(map(str, sorted(self.models)))
            raise ProfileError(
                f"{self.directory} was not measured at sequence length {seq_length}; it has "
                f"{known}: pass one of these or profile again with Galvatron"
            )
        return self.models[seq_length]

    @staticmethod
    def load(directory: str | Path, num_gpus: int | None = None) -> GalvatronProfile:
        """Read a folder. ``num_gpus`` chooses between machines if the folder holds several.

        Raises ProfileError, which names the file and the field at fault.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise ProfileError(f"there is no folder {folder}; give one with Galvatron's profiles")
        computation = find(folder, r"computation_profiling_([^_]+)_(.+)_all\.json")
        memory = find(folder, r"memory_profiling_([^_]+)_(.+)_all\.json")
        precision, model = computation.words
        if memory.words != computation.words:
            raise ProfileError(
                f"{memory.name} and {computation.name} are of different models or precisions; "
                f"give the memory profile of {model} in {precision}"
            )
        if precision not in PRECISIONS:
            raise ProfileError(
                f"{computation.name} is in {precision}; Galvatron's formulas are priced for "
                f"{' and '.join(PRECISIONS)}: profile the model in one of them"
            )
        bandwidth = find(folder, "allreduce_bandwidth" + _MACHINE, num_gpus)
        machine = tuple(int(word) for word in bandwidth.words)
        p2p = find(folder, "p2p_bandwidth" + _MACHINE, num_gpus)
        times = find(folder, "sp_time" + _MACHINE, num_gpus)
        for source in (p2p, times):
            if source.words != bandwidth.words:
                raise ProfileError(f"{source.name} and {bandwidth.name} are of different machines")
        overlap = find(folder, r"overlap_coefficient\.json")
        plans = sorted(folder.glob(f"galvatron_config_{model}_*.json"))
        return GalvatronProfile(
            directory=str(folder),
            model=model,
            precision=precision,
            num_nodes=machine[0],
            gpus_per_node=machine[1],
            models=_models(computation, memory),
            bandwidth=_bandwidth(bandwidth),
            p2p=_p2p(p2p),
            all_reduce=_exchanges(times, "allreduce"),
            all_to_all=_exchanges(times, "all2all"),
            overlap=_overlap(overlap),
            files={
                "computation": computation.name,
                "memory": memory.name,
                "bandwidth": bandwidth.name,
                "p2p": p2p.name,
                "times": times.name,
                "overlap": overlap.name,
            },
            plan_path=str(plans[0]) if plans else None,
        )


def _models(computation: Source, memory: Source) -> dict[int, ModelProfile]:
    lengths = sorted(int(text) for text in memory.table("layertype_0_sp"))
    return {length: _model(computation, memory, length) for length in lengths}


def _model(computation: Source, memory: Source, length: int) -> ModelProfile:
    layer = memory.table("layertype_0_sp", str(length))
    where = ("layertype_0_sp", str(length), "tp_activation_per_bsz_dict")
    kept: dict[str, Any] = memory.table(*where)
    degrees = {int(key): memory.number(*where, key) for key in kept if key.isdigit()}
    if not degrees:
        raise ProfileError(f"{memory.name}: {'.'.join(where)} has no degree; expected 1, 2, …")
    assert layer
    return ModelProfile(
        layer_ms=_forward(computation, "0", length),
        ends_ms=_forward(computation, "other", length),
        parameter_mb=memory.number("layertype_0_sp", str(length), "parameter_size"),
        activation_mb=degrees,
        recomputed_mb=memory.number(*where, "checkpoint"),
        whole=_ends(memory, "other_memory_pp_off_sp", length),
        first=_ends(memory, "other_memory_pp_on_first_sp", length),
        last=_ends(memory, "other_memory_pp_on_last_sp", length),
    )


def _forward(source: Source, kind: str, length: int) -> Line:
    """The file holds ms per sample; the line is fitted through batch × that (Galvatron's fit)."""
    pattern = re.compile(rf"layertype_{kind}_bsz(\d+)_seq{length}")
    points = []
    for key in source.table():
        match = pattern.fullmatch(key)
        if match:
            points.append((float(match[1]), int(match[1]) * source.number(key)))
    if len(points) < 2:
        raise ProfileError(
            f"{source.name}: needs layertype_{kind}_bsz<batch>_seq{length} for at least two "
            f"batch sizes, got {len(points)}; profile with Galvatron's batch mode"
        )
    return Line(*line_through(points))


def _ends(memory: Source, part: str, length: int) -> Ends:
    def by_degree(what: str) -> dict[int, float]:
        table = memory.table(part, str(length), what)
        return {int(key): memory.number(part, str(length), what, key) for key in table}

    return Ends(by_degree("model_states"), by_degree("activation"))


def _bandwidth(source: Source) -> dict[tuple[int, bool], float]:
    pattern = re.compile(r"allreduce_size_(\d+)_consec_([01])")
    found = {
        (int(match[1]), match[2] == "1"): source.number(key)
        for key in source.table()
        if (match := pattern.fullmatch(key))
    }
    size = int(source.words[0]) * int(source.words[1])
    if size > 1 and (size, True) not in found:
        raise ProfileError(f"{source.name} lacks the field 'allreduce_size_{size}_consec_1'")
    return found


def _p2p(source: Source) -> dict[int, float]:
    pattern = re.compile(r"pp_size_(\d+)")
    matches = [match for key in source.table() if (match := pattern.fullmatch(key))]
    return {int(match[1]): source.number(match[0]) for match in matches}


def _exchanges(source: Source, kind: str) -> dict[int, Exchange]:
    pattern = re.compile(rf"{kind}_size_(\d+)_(\d+)MB_time")
    tables: dict[int, dict[float, float]] = {}
    for key in source.table():
        match = pattern.fullmatch(key)
        if match:
            tables.setdefault(int(match[1]), {})[float(match[2])] = source.number(key)
    for size, table in tables.items():
        if len(table) < 2:
            raise ProfileError(
                f"{source.name}: needs {kind}_size_{size}_<n>MB_time for at least two sizes"
            )
    return {
        size: Exchange(table, Line(*line_through(list(table.items()))))
        for size, table in tables.items()
    }


def _overlap(source: Source) -> float:
    value = source.number("overlap_coe")
    if value < 1:
        raise ProfileError(f"{source.name}: overlap_coe is {value}; a slowdown is at least 1")
    return value
