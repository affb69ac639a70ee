"""Network namespaces as nodes, joined by a bridge with rate-limited links.

Every node is a namespace with one interface ``eth0``, the end of a veth pair whose other end is a
port of a bridge; the bridge lives in a namespace of its own, so the machine's network shows nothing
of all this. A token bucket (``tc tbf``) on ``eth0`` limits what a node sends, one on the port what
it receives: a full-duplex link. What a node sends to its own address goes over its loopback, as
Linux does it, without a limit.

No namespace has a name. It exists as long as this process holds it open or a process is in it, so
nothing can be left behind, whatever ends this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self, TypeVar

from galvatron_compile.emulation_child import CLONE_NEWNET, libc
from galvatron_compile.errors import GalvatronError

MAX_NODES = 250
INTERFACE = "eth0"
SUBNET = "10.0.0.0/24"
BRIDGE = "galv-bridge"
# The largest that the kernel hands to the token bucket in one piece, and the headers of the 46
# segments that it stands for, which the bucket counts too.
PACKET_BYTES = 65_536 + 8_192
BURST_S = 0.0005
QUEUE_S = 0.05

T = TypeVar("T")


class EmulationError(GalvatronError):
    """A cluster cannot be emulated here, or not so; the message names the cause and the cure."""


def why_not() -> str | None:
    """Why this process cannot emulate a cluster, or None where it can. Takes about 0.05 s."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, and this is {sys.platform}"
    missing = [name for name in ("ip", "tc") if _find(name) is None]
    if missing:
        return (
            f"the command {' and '.join(missing)} is missing; install the package iproute2 "
            "(apt-get install iproute2)"
        )
    try:
        with Network(1) as network:
            network.set_rate(1e9)
    except PermissionError:
        return (
            "no permission to make network namespaces; run as root, in a container with "
            "docker run --privileged"
        )
    except OSError as error:
        return f"this kernel refuses a network namespace: {error}"
    except EmulationError as error:
        return str(error)
    return None


class Namespace:
    """A network namespace without a name, with its loopback up."""

    def __init__(self) -> None:
        """OSError where the system does not permit it."""
        self.fd = _in_a_thread(_new_namespace)
        try:
            self.tool("ip", ["link set lo up"])
        except BaseException:
            self.close()
            raise

    def tool(self, name: str, lines: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        """Commands of ``ip`` or ``tc``, executed inside. EmulationError if one fails."""

        def work() -> subprocess.CompletedProcess[str]:
            libc("setns", self.fd, CLONE_NEWNET)  # of this thread; the child inherits it
            return subprocess.run(
                [_find(name) or name, "-batch", "-"],
                input="\n".join(lines) + "\n",
                pass_fds=pass_fds,
                capture_output=True,
                text=True,
            )

        done = _in_a_thread(work)
        if done.returncode != 0:
            raise EmulationError(
                f"this kernel or its settings refuse what an emulated cluster needs: {name} said "
                f"{(done.stderr or done.stdout).strip()!r} to {'; '.join(lines)!r}"
            )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Network:
    """``num_nodes`` namespaces that reach each other through a bridge; no limits at first."""

    def __init__(self, num_nodes: int) -> None:
        with ExitStack() as stack:
            self._switch = stack.enter_context(Namespace())
            self._switch.tool("ip", [f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up"])
            self.nodes = [stack.enter_context(Namespace()) for _ in range(num_nodes)]
            for index, node in enumerate(self.nodes):
                self._connect(index, node)
            self._stack = stack.pop_all()

    @property
    def namespace_fds(self) -> list[int]:
        """Of all nodes. The bridge's namespace never has a process."""
        return [node.fd for node in self.nodes]

    def set_rate(self, rate_bits_per_s: float | None) -> None:
        """Limit every link, in each direction, at once; None lifts the limit."""
        limit = _discipline(rate_bits_per_s)
        ports = [f"qdisc replace dev port{i} root {limit}" for i in range(len(self.nodes))]
        self._switch.tool("tc", ports)
        for node in self.nodes:
            node.tool("tc", [f"qdisc replace dev {INTERFACE} root {limit}"])

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, index: int, node: Namespace) -> None:
        pair = f"link add port{index} type veth peer name {INTERFACE} netns /proc/self/fd/{node.fd}"
        up = f"link set port{index} master {BRIDGE} up"
        self._switch.tool("ip", [pair, up], pass_fds=[node.fd])
        address = node_address(index)
        # One congestion control on all machines. Reno is part of every kernel; BBR, the default of
        # some, stops sending every ten seconds to measure the round trip.
        node.tool(
            "ip",
            [
                f"address add {address}/24 dev {INTERFACE}",
                f"link set {INTERFACE} up",
                f"route change {SUBNET} dev {INTERFACE} src {address} congctl reno",
            ],
        )


def node_address(index: int) -> str:
    return f"10.0.0.{index + 1}"


def burst_bytes(rate_bits_per_s: float) -> int:
    """What an idle link lets through at once, before its rate shows.

    Small, so that short messages feel the rate too; no less than a packet, which would be cut up
    into segments (of 1,448 bytes: communication then takes half a core, bench/LOG.md), nor than
    what passes until a late timer refills the bucket.
    """
    return max(PACKET_BYTES, int(rate_bits_per_s / 8 * BURST_S))


def _discipline(rate_bits_per_s: float | None) -> str:
    if rate_bits_per_s is None:
        return "pfifo limit 1000"
    burst = burst_bytes(rate_bits_per_s)
    return f"tbf rate {rate_bits_per_s:.0f}bit burst {burst} latency {QUEUE_S * 1e3:.0f}ms"


def _new_namespace() -> int:
    libc("unshare", CLONE_NEWNET)  # of this thread alone, which ends with this function
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _in_a_thread(work: Callable[[], T]) -> T:
    """``work()`` in a thread made for it: a thread that changed its namespace is never reused."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _find(name: str) -> str | None:
    """The path of a command; those of the superuser are not in everybody's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
