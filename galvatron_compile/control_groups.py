"""Control groups of Linux: how much CPU time this process may have, and groups for others.

A container with a CPU limit, or a rank of an emulated cluster with a share of a core, sees all
cores and gets a part of their time. Both versions of the kernel's interface say so in files: the
first in ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``, the second in ``cpu.max``
(docs.kernel.org, "CFS Bandwidth Control" and "Control Group v2").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Who waits has its time later within the period, so short ones are nearer to a core of one's own.
# But time is counted at the scheduler's ticks, of 4 ms on many kernels, and periods of less than
# two give less than was asked for (of half a core 0.34 at 2 ms, 0.50 at 8; Linux 6.18).
PERIOD_US = 8_000
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Quota:
    """A limit on CPU time: so many cores' worth, for all processes of ``group`` together.

    group: tells control groups of one kernel from each other, whatever their names are here.
    """

    group: tuple[int, int]
    cpus: float


@dataclass(frozen=True)
class ControlGroup:
    """Where the kernel shows a group's CPU time. version: 1 or 2, of its interface.

    top: the highest folder that can be seen from here, ``folder`` or one above it.
    """

    version: int
    folder: Path
    top: Path

    @staticmethod
    def own(proc: Path = PROC) -> ControlGroup | None:
        """This process's; None where there is no control of CPU time (another system, or a kernel
        without)."""
        if not (proc / "cgroup").exists():
            return None
        lines = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        names = {name: path for _, names, path in lines for name in names.split(",")}
        for version, name in ((1, "cpu"), (2, "")):
            mount = _mount(proc / "mountinfo", version)
            if name in names and mount is not None:
                root, top = mount
                path = Path(names[name])
                below = path.relative_to(root) if path.is_relative_to(root) else Path()
                return ControlGroup(version, top / below, top)
        return None

    def quotas(self) -> tuple[Quota, ...]:
        """The limits of this group and of those above it, which it shares with others."""
        found = map(self._quota, self._upwards())
        return tuple(quota for quota in found if quota is not None)

    def parent_of_new(self) -> Path | None:
        """The nearest folder in which a new group would control CPU time; None: there is none."""
        if self.version == 1:
            return self.folder
        for folder in self._upwards():
            if "cpu" in (folder / "cgroup.subtree_control").read_text().split():
                return folder
        return None

    def make(self, folder: Path, cpus: float) -> None:
        """A new group whose processes together get ``cpus`` cores' worth of time.

        Raises:
            OSError: the system does not permit it; the group may be there, without a limit.
        """
        folder.mkdir()
        quota_us = round(cpus * PERIOD_US)
        if self.version == 1:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")

    def _upwards(self) -> Iterator[Path]:
        folder = self.folder
        while folder != self.top:
            yield folder
            folder = folder.parent
        yield folder

    def _quota(self, folder: Path) -> Quota | None:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if self.version == 1 else ("cpu.max",)
        if not (folder / names[0]).exists():  # the topmost group of a machine has no such file
            return None
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        if quota in ("-1", "max"):
            return None
        state = folder.stat()
        return Quota((state.st_dev, state.st_ino), int(quota) / int(period))


def _mount(mountinfo: Path, version: int) -> tuple[Path, Path] | None:
    """Which part of the tree of groups is mounted, and where."""
    for line in mountinfo.read_text().splitlines():
        before, after = line.split(" - ", 1)
        kind, _, options = after.split(" ", 2)
        if version == 1 and kind == "cgroup" and "cpu" in options.split(","):
            break
        if version == 2 and kind == "cgroup2":
            break
    else:
        return None
    root, where = before.split(" ")[3:5]
    return Path(root), Path(where)
