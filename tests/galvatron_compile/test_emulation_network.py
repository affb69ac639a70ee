"""Where emulated clusters are not possible, and what is said then."""

from __future__ import annotations

import sys

import pytest
from emulated import needed, nothing_left

from galvatron_compile import emulation_network
from galvatron_compile.emulation import EmulatedCluster, emulated_cluster
from galvatron_compile.emulation_network import EmulationError, Namespace, Network, why_not

linux = pytest.mark.skipif(sys.platform != "linux", reason="speaks of what Linux lacks")


def test_another_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_not() == "network namespaces need Linux, and this is darwin"


@linux
def test_the_package_of_missing_commands_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation_network, "_find", lambda name: None)
    assert "command ip and tc is missing; install the package iproute2" in str(why_not())
    with (
        pytest.raises(EmulationError, match=r"cannot emulate a cluster here: .*iproute2"),
        emulated_cluster(EmulatedCluster()),
    ):
        raise AssertionError("it was made")


@linux
def test_a_user_who_may_not_is_told_who_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: str, *arguments: int) -> None:
        raise PermissionError(1, f"{function}: Operation not permitted")

    monkeypatch.setattr(emulation_network, "libc", refuse)
    monkeypatch.setattr(emulation_network, "_find", lambda name: f"/usr/sbin/{name}")
    assert "run as root" in str(why_not())


@linux
def test_any_other_refusal_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: str, *arguments: int) -> None:
        raise OSError(28, f"{function}: No space left on device")  # the limit of namespaces is 0

    monkeypatch.setattr(emulation_network, "libc", refuse)
    monkeypatch.setattr(emulation_network, "_find", lambda name: f"/usr/sbin/{name}")
    assert "refuses a network namespace: [Errno 28] unshare: No space" in str(why_not())


@needed
def test_a_kernel_without_what_is_needed_is_quoted() -> None:
    with (
        nothing_left(),
        Namespace() as node,
        pytest.raises(EmulationError, match=r"ip said .*Unknown device type.* to 'link add x type"),
    ):
        node.tool("ip", ["link add x type nosuchtype"])


@needed
def test_a_network_that_cannot_be_finished_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation_network, "node_address", lambda index: "10.0.0.999")
    with nothing_left(), pytest.raises(EmulationError, match=r"10\.0\.0\.999"):
        Network(2)
