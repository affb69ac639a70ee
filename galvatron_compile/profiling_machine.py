"""What a profile says about the machine itself: its layout, its names, its memory."""

from __future__ import annotations

import os
import platform
import socket
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from galvatron_compile.errors import ProfileError


def job_layout() -> tuple[int, int]:
    """(nodes, ranks per node), from torchrun or else from the host names."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 1, 1
    world_size = dist.get_world_size()
    mine = (os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_RANK"), socket.gethostname())
    everyone: list[tuple[str | None, str | None, str]] = [mine] * world_size
    dist.all_gather_object(everyone, mine)
    counts = [int(local) for local, _, _ in everyone if local is not None]
    if len(counts) < world_size or max(counts) > world_size:
        hosts = [host for _, _, host in everyone]
        counts = [hosts.count(host) for host in hosts]
    if len(set(counts)) > 1 or world_size % counts[0]:
        raise ProfileError(
            f"nodes have different numbers of ranks ({counts}); start torchrun with the same "
            "--nproc-per-node everywhere"
        )
    return world_size // counts[0], counts[0]


def describe_source(device: torch.device, num_nodes: int, per_node: int) -> str:
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    backend = f", {dist.get_backend()}" if dist.is_initialized() else ""
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    threads = f", {torch.get_num_threads()} thread(s) a rank" if device.type == "cpu" else ""
    return (
        f"measured on {socket.gethostname()} ({num_nodes} x {per_node} ranks, "
        f"{device_name(device)}{threads}) at {date} with torch {torch.__version__}{cuda}"
        f"{backend}, Python {platform.python_version()}"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_memory(device: torch.device, resident_bytes: int, per_node: int) -> tuple[int, int]:
    """(bytes the framework keeps, bytes a rank may use) of the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return max(0, total_bytes - free_bytes - torch.cuda.memory_reserved(device)), total_bytes
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit, where there is one
    if limit.exists() and limit.read_text().strip().isdigit():
        total_bytes = min(total_bytes, int(limit.read_text()))
    return resident_bytes, total_bytes // per_node


def resident_bytes() -> int:
    """Memory of this process so far: interpreter, torch and what else is loaded."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
