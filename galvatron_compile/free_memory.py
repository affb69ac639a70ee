"""How much memory this process may still take, as far as the system says."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")  # a container's limits (version 2), where there are any


def free_bytes(device: torch.device, num_sharing: int) -> int:
    """Bytes that one of ``num_sharing`` processes of this host may still allocate on ``device``.

    A GPU is one process's own; the host's memory is shared, and only half of it is offered, since
    a system that runs out of it kills a process rather than refusing.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + kept
    limits = [_host_bytes() // (2 * num_sharing), _container_bytes() // (2 * num_sharing)]
    return max(0, min(*limits, _address_space_bytes()))


def _host_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _container_bytes() -> int:
    """What the control group leaves; pages that only cache files are given back on demand."""
    limit, used, stat = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or not limit.read_text().strip().isdigit():
        return 2**62
    cached = [line.split()[1] for line in stat.read_text().splitlines() if "inactive_file" in line]
    return int(limit.read_text()) - int(used.read_text()) + sum(map(int, cached[:1]))


def _address_space_bytes() -> int:
    """What ``ulimit -v`` leaves; none of it is shared."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.exists():
        return 2**62
    return limit - int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
