"""Limits on CPU time as both versions of the kernel's interface show them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from galvatron_compile.control_groups import PERIOD_US, ControlGroup

OTHERS = (
    "24 30 0:22 / /proc rw,nosuid shared:5 - proc proc rw",
    "25 30 0:23 / /odd rw - fuse.odd source rw,note=a - b",
    "33 31 0:30 / {there}/cpuacct rw,relatime - cgroup cgroup rw,cpuacct",
)
CGROUP = {1: "9:name=systemd:/\n2:cpuacct,cpu:{path}\n0::/elsewhere\n", 2: "0::{path}\n"}
MOUNT = {
    # The second version is mounted beside the first, as on many machines, and controls no time.
    1: "41 31 0:38 / {there}/unified rw - cgroup2 cgroup2 rw\n"
    "32 31 0:29 {root} {there} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct",
    2: "41 31 0:38 {root} {there} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate",
}


@dataclass
class Machine:
    """Files as the kernel would show them: groups below ``top``, this process in ``path``."""

    version: int
    folder: Path

    def __post_init__(self) -> None:
        self.top = self.folder / "groups"
        self.proc = self.folder / "proc"
        self.proc.mkdir(parents=True)

    def group(self, path: str, limit: str | None = None, handed_on: str = "") -> Path:
        """limit: quota and period in µs, quota "max" for none."""
        folder = self.top / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.subtree_control").write_text(handed_on + "\n")
        if limit is not None and self.version == 1:
            quota, period = limit.replace("max", "-1").split()
            (folder / "cpu.cfs_quota_us").write_text(quota + "\n")
            (folder / "cpu.cfs_period_us").write_text(period + "\n")
        elif limit is not None:
            (folder / "cpu.max").write_text(limit + "\n")
        return folder

    def own(self, path: str, root: str = "/") -> ControlGroup:
        """path: of this process's group, root: of what is mounted, as the kernel calls them."""
        lines = (*OTHERS, MOUNT[self.version])
        text = "\n".join(lines).format(root=root, there=self.top)
        (self.proc / "mountinfo").write_text(text + "\n")
        (self.proc / "cgroup").write_text(CGROUP[self.version].format(path=path))
        found = ControlGroup.own(self.proc)
        assert found is not None and found.version == self.version
        return found


@pytest.fixture(params=[1, 2])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(request.param, tmp_path)


def test_the_limits_above_a_group_hold_too(machine: Machine) -> None:
    machine.group("pods", "150000 100000")
    for name, limit in (("a", "max 100000"), ("b", "400000 100000"), ("c", "5000 10000")):
        machine.group(f"pods/{name}", limit)
    found = {name: machine.own(f"/pods/{name}").quotas() for name in "abc"}
    assert {name: [quota.cpus for quota in quotas] for name, quotas in found.items()} == {
        "a": [1.5], "b": [4.0, 1.5], "c": [0.5, 1.5],
    }  # fmt: skip
    assert found["a"][0] == found["b"][1] == found["c"][1], "the same group limits all"
    assert len({quotas[0].group for quotas in found.values()}) == 3


def test_without_a_limit_there_is_no_quota(machine: Machine) -> None:
    machine.group("")
    machine.group("pods/a", "max 100000")
    machine.group("pods")
    assert machine.own("/pods/a").quotas() == ()


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/docker/x/inner", "/docker/x", 0.25),  # a container sees its own part of the tree
        ("/docker/x", "/docker/x", 0.5),
        ("/", "/../..", 0.5),  # entered from outside: its name does not say where it is
    ],
)
def test_the_mount_of_a_container_is_its_part_of_the_tree(
    machine: Machine, path: str, root: str, expected: float
) -> None:
    machine.group("", "50000 100000")
    machine.group("inner", "25000 100000")
    assert machine.own(path, root).quotas()[0].cpus == expected


def test_a_new_group_has_its_limit_and_is_seen_by_who_is_in_it(machine: Machine) -> None:
    machine.group("", handed_on="cpu memory")
    machine.group("slice", "max 100000", handed_on="memory pids")
    machine.group("slice/session", "max 100000")
    own = machine.own("/slice/session")
    parent = own.parent_of_new()
    assert parent is not None
    # The second version lets no group control time that has processes itself.
    assert parent == {1: machine.top / "slice/session", 2: machine.top}[machine.version]
    made = parent / "galvatron-1"
    own.make(made, 0.5)
    quotas = machine.own(f"/{made.relative_to(machine.top)}").quotas()
    assert [quota.cpus for quota in quotas] == [0.5]
    shown = {1: "cpu.cfs_period_us", 2: "cpu.max"}[machine.version]
    assert (made / shown).read_text().split()[-1] == str(PERIOD_US)


def test_where_nothing_controls_time_there_is_no_place_for_a_group(tmp_path: Path) -> None:
    machine = Machine(2, tmp_path)
    machine.group("slice", handed_on="memory")
    machine.group("")
    assert machine.own("/slice").parent_of_new() is None


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert ControlGroup.own(tmp_path) is None
    (tmp_path / "cgroup").write_text("3:memory:/\n")
    (tmp_path / "mountinfo").write_text(OTHERS[0] + "\n")
    assert ControlGroup.own(tmp_path) is None
