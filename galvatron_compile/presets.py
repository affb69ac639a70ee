"""Default profiles of known GPUs: data sheets, NCCL's latency model, a few published calibrations.

One line of numbers per GPU; everything else follows by the formulas below, and every number in the
resulting profile carries its source. They are for planning before there is a machine to measure.

"Calibration" in a source is a figure that this project was given by others as achieved on real
machines: bf16 products 271 of 312 TFLOP/s (A100 SXM) and 795 of 989 (H100, H200 SXM); all-reduce
over 4 nodes reaching 94 GB/s on the bus; in one node of 8 H200, 482 GB/s with in-switch reduction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.curves import KINDS, CollectiveCurve, Points, RateCurve, bus_factor
from galvatron_compile.errors import ProfileError
from galvatron_compile.facts import Device, Fact, Overlap

GB = 1e9
GIB = 1024**3
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """What a GPU's documents say, per GPU, dense (no sparsity), and what of it is achieved.

    link_bytes_per_s: NVLink or PCIe, one direction. network_bytes_per_s: all network cards of the
    usual node of 8, one direction. The *_share fields say what share of the documented peak is
    reached, with ``shares`` saying why one may believe it.
    """

    memory_bytes: int
    memory_bytes_per_s: float
    half_flops_per_s: float
    single_flops_per_s: float
    double_flops_per_s: float
    link_bytes_per_s: float
    nvlink: bool
    network_bytes_per_s: float
    datasheet: str
    matmul_share: float
    attention_share: float
    link_share: float
    all_reduce_share: float
    shares: str


_SHEETS = "https://www.nvidia.com/en-us/data-center/"
_A100_SHARES = (
    "matmul 271 of 312 TFLOP/s achieved in bf16 (calibration, A100 SXM); attention 0.63 of peak, "
    "FlashAttention-2 backward, arXiv 2307.08691; NVLink 0.76 of peak, nccl-tests on 8 A100 reach "
    "a bus bandwidth near 230 GB/s (vTrain's published all-reduce table)"
)
_HOPPER_SHARES = (
    "matmul 795 of 989 TFLOP/s achieved in bf16 (calibration, H100/H200 SXM); attention 0.35 of "
    "peak, FlashAttention-2 on Hopper, arXiv 2407.08608; all-reduce 482 of 450 GB/s with in-switch "
    "reduction (calibration, 8 H200), other collectives 0.8 of NVLink (assumption)"
)
_BLACKWELL_SHARES = "shares as on Hopper (assumption, no calibration at hand)"
_PCIE_SHARES = (
    "matmul and attention 0.8 and 0.5 of peak, PCIe 0.5 without peer-to-peer (assumptions)"
)

GPUS: dict[str, Gpu] = {
    "A100-40GB": Gpu(
        40 * GIB, 1555 * GB, 312 * TERA, 19.5 * TERA, 9.7 * TERA, 300 * GB, True, 200 * GB,
        f"{_SHEETS}a100/ (A100 SXM4 40GB; DGX A100: 8 x 200 Gb/s)",
        271 / 312, 0.63, 0.76, 0.76, _A100_SHARES,
    ),
    "A100-80GB": Gpu(
        80 * GIB, 2039 * GB, 312 * TERA, 19.5 * TERA, 9.7 * TERA, 300 * GB, True, 200 * GB,
        f"{_SHEETS}a100/ (A100 SXM4 80GB; DGX A100: 8 x 200 Gb/s)",
        271 / 312, 0.63, 0.76, 0.76, _A100_SHARES,
    ),
    "H100": Gpu(
        80 * GIB, 3350 * GB, 989 * TERA, 67 * TERA, 34 * TERA, 450 * GB, True, 400 * GB,
        f"{_SHEETS}h100/ (H100 SXM5; DGX H100: 8 x 400 Gb/s)",
        795 / 989, 0.35, 0.8, 482 / 450, _HOPPER_SHARES,
    ),
    "H200": Gpu(
        141_000_000_000, 4800 * GB, 989 * TERA, 67 * TERA, 34 * TERA, 450 * GB, True, 400 * GB,
        f"{_SHEETS}h200/ (H200 SXM; DGX H200: 8 x 400 Gb/s)",
        795 / 989, 0.35, 0.8, 482 / 450, _HOPPER_SHARES,
    ),
    "B200": Gpu(
        180_000_000_000, 8000 * GB, 2250 * TERA, 75 * TERA, 37 * TERA, 900 * GB, True, 400 * GB,
        f"{_SHEETS}dgx-b200/ and hgx/ (B200 at 1,000 W; DGX B200: 8 x 400 Gb/s)",
        795 / 989, 0.35, 0.8, 482 / 450, _BLACKWELL_SHARES,
    ),
    "L4": Gpu(
        24_000_000_000, 300 * GB, 121 * TERA, 30.3 * TERA, 0.47 * TERA, 32 * GB, False, 12.5 * GB,
        f"{_SHEETS}l4/ (PCIe gen 4 x16; fp64 1/64 of fp32; one 100 Gb/s card a node is assumed)",
        0.8, 0.5, 0.5, 0.5, _PCIE_SHARES,
    ),
    "L40S": Gpu(
        48_000_000_000, 864 * GB, 362 * TERA, 91.6 * TERA, 1.4 * TERA, 32 * GB, False, 25 * GB,
        f"{_SHEETS}l40s/ (PCIe gen 4 x16; fp64 1/64 of fp32; two 100 Gb/s cards a node assumed)",
        0.8, 0.5, 0.5, 0.5, _PCIE_SHARES,
    ),
    "A10": Gpu(
        24_000_000_000, 600 * GB, 125 * TERA, 31.2 * TERA, 0.49 * TERA, 32 * GB, False, 12.5 * GB,
        f"{_SHEETS}products/a10-gpu/ (PCIe gen 4 x16; one 100 Gb/s card a node is assumed)",
        0.8, 0.5, 0.5, 0.5, _PCIE_SHARES,
    ),
}  # fmt: skip

# 94 GB/s, the plateau of all-reduce over 4 nodes of 8 (calibration; the machine is not named: taken
# to be a DGX A100 with 200 GB/s a node), as a share of the node's network.
NETWORK_SHARE = 94 / 200
# NCCL src/graph/tuning.cc, ring algorithm, Simple protocol, in microseconds: once, then per step.
NCCL_BASE_US, NVLINK_STEP_US, PCIE_STEP_US, NETWORK_STEP_US = 8.4, 3.4, 5.7, 14.0
# Python, autograd and dispatcher take some 5 to 25 us an operator before a kernel is launched;
# PyTorch 2 on a recent CPU is near the lower end: assumed, to be measured.
HOST_MS = 0.010
# An operator in backward costs the host less: autograd's engine calls it from C++, without Python
# and without recording. Assumption.
HOST_BACKWARD = 0.5
KERNEL_RAMP_S = 5e-6  # assumption: fixed time of a kernel to start, fill the pipeline and drain
MEMORY_SHARE = 4.3 / 4.8  # a copy on one H200, torch 2.11, driver 580: 4.3 of 4.8 TB/s
_PAYLOADS_BYTES = (1024, 1024**3)  # the model is a line, so two points hold it
_SIDES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_LATENCY_SOURCE = "latency: NCCL src/graph/tuning.cc (Simple protocol); bandwidth: "
_SPEC = re.compile(r"(?:(?:(\d+)x)?(\d+)x)?(.+)", re.IGNORECASE)


def preset(name: str) -> ClusterProfile:
    """``GPU``, ``per-node x GPU`` or ``nodes x per-node x GPU``, as in ``128x8xH100``."""
    found = _SPEC.fullmatch(name.strip())
    known = {gpu.lower(): gpu for gpu in GPUS}
    if not found or found[3].lower() not in known:
        raise ProfileError(
            f"no preset {name!r}; write GPU, 8xGPU or 4x8xGPU (nodes x GPUs per node) with GPU one "
            f"of {', '.join(GPUS)}, or measure with galvatron-compile profile"
        )
    nodes, per_node = int(found[1] or 1), int(found[2] or 1)
    if nodes < 1 or per_node < 1:
        raise ProfileError(f"preset {name!r}: numbers of nodes and GPUs must be at least 1")
    model = known[found[3].lower()]
    gpu = GPUS[model]
    sheet = f"default: {gpu.datasheet}"
    return ClusterProfile(
        name=f"{nodes}x{per_node}x{model}" if nodes > 1 else f"{per_node}x{model}",
        device=Device(f"NVIDIA {model}", "cuda", gpu.memory_bytes),
        num_nodes=nodes,
        ranks_per_node=per_node,
        matmul=_rates(gpu, gpu.matmul_share, f"{sheet}; {gpu.shares}"),
        attention=_rates(gpu, gpu.attention_share, f"{sheet}; {gpu.shares}"),
        memory=Fact(gpu.memory_bytes_per_s * MEMORY_SHARE, f"{sheet}; x 4.3/4.8 as seen on H200"),
        launch_overhead_ms=Fact(HOST_MS, "default: assumption, 10 us of host time for one PyTorch "
                                         "operator with autograd, hidden under longer kernels"),
        collectives=_collectives(gpu, nodes, per_node),
        overlap=Overlap(
            1.1256, 1.1256, 1.1256,
            "default: 1.1256, the profile for 8 GPUs in the Galvatron repository "
            "(https://github.com/PKU-DAIR/Hetu-Galvatron), used for every factor",
        ),
        reserve_bytes=Fact(
            1.5 * GIB, "default: assumption, CUDA context, NCCL buffers and cuBLAS workspace"
        ),
    )  # fmt: skip


def _rates(gpu: Gpu, share: float, source: str) -> tuple[RateCurve, ...]:
    peaks = {
        "bfloat16": gpu.half_flops_per_s,
        "float16": gpu.half_flops_per_s,
        "float32": gpu.single_flops_per_s,
        "float64": gpu.double_flops_per_s,
    }
    source += "; small sizes: 5 us fixed per kernel (assumption)"
    return tuple(RateCurve(d, _ramp(peak * share), source) for d, peak in peaks.items())


def _ramp(flops_per_s: float) -> Points:
    sizes = [2.0 * side**3 for side in _SIDES]
    return tuple((flops, flops / (KERNEL_RAMP_S + flops / flops_per_s)) for flops in sizes)


def _collectives(gpu: Gpu, nodes: int, per_node: int) -> tuple[CollectiveCurve, ...]:
    found = []
    for kind in KINDS:
        for size in _sizes(per_node) if kind != "p2p" else [2] * (per_node > 1):
            found.append(_node_curve(gpu, kind, size))
        if nodes > 1:
            for size in _sizes(nodes * per_node) if kind != "p2p" else [2]:
                found.append(_cluster_curve(gpu, kind, size, nodes, per_node))
    return tuple(found)


def _sizes(limit: int) -> list[int]:
    """Powers of two, and the whole."""
    return sorted({2**i for i in range(1, limit.bit_length()) if 2**i <= limit} | {limit} - {1})


def _link(gpu: Gpu, kind: str) -> float:
    share = gpu.all_reduce_share if kind == "all_reduce" else gpu.link_share
    return gpu.link_bytes_per_s * share


def _node_curve(gpu: Gpu, kind: str, size: int) -> CollectiveCurve:
    step_us = NVLINK_STEP_US if gpu.nvlink else PCIE_STEP_US
    steps = 2 * (size - 1) if kind == "all_reduce" else size - 1
    link = _link(gpu, kind)
    source = f"default: {_LATENCY_SOURCE}{link / GB:.0f} GB/s on the bus, {gpu.shares}"
    points = _line(NCCL_BASE_US + steps * step_us, bus_factor(kind, size) / link)
    return CollectiveCurve(kind, "node", size, points, source)


def _cluster_curve(gpu: Gpu, kind: str, size: int, nodes: int, per_node: int) -> CollectiveCurve:
    """Ranks strided over nodes: ``here`` of them in each of ``over`` nodes.

    As many such groups as fill the node communicate at once and share its network; all-reduce
    follows NCCL's tree (which at 4 nodes of 8 gives 0.13 ms for 1 MiB, measured 0.12), the others
    its ring.
    """
    over = min(nodes, size)
    here = max(1, size // nodes)
    step_us = NVLINK_STEP_US if gpu.nvlink else PCIE_STEP_US
    if kind == "all_reduce":
        depth = (over - 1).bit_length()  # whole levels of the tree over nodes
        latency_us = NCCL_BASE_US + 2 * ((here - 1) * step_us + depth * NETWORK_STEP_US)
    else:
        latency_us = NCCL_BASE_US + (size - over) * step_us + (over - 1) * NETWORK_STEP_US
    # The cards of a node of 8 serve fewer ranks in a smaller node; a rank never gets more.
    network = gpu.network_bytes_per_s * NETWORK_SHARE * min(1.0, per_node / 8)
    if kind == "all_to_all":  # every rank sends (size - here) of its size parts to other nodes
        seconds_per_byte = max(
            bus_factor(kind, size) / _link(gpu, kind), (size - here) / size * per_node / network
        )
    else:
        bus = min(_link(gpu, kind), network * here / per_node)
        seconds_per_byte = bus_factor(kind, size) / bus
    source = (
        f"default: {_LATENCY_SOURCE}{network / GB:.0f} GB/s a node shared by its groups, 94 of 200 "
        f"GB/s reached over 4 nodes (calibration; machine assumed to be A100); {gpu.datasheet}"
    )
    return CollectiveCurve(kind, "cluster", size, _line(latency_us, seconds_per_byte), source)


def _line(latency_us: float, seconds_per_byte: float) -> Points:
    return tuple((b, 1e-3 * latency_us + 1e3 * b * seconds_per_byte) for b in _PAYLOADS_BYTES)
