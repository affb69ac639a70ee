"""What an emulated cluster starts besides its ranks: the way into a node, and the guard.

Run as a script, with nothing but the standard library (start-up is paid by every rank)::

    python -I -S emulation_child.py enter PARENT NAMESPACE_FD CORES GROUP COMMAND…
    python -I -S emulation_child.py guard NAMESPACE_FDS [GROUP…]

``enter`` turns this process into a rank. ``guard`` outlives the launcher: when its standard input
closes, because the launcher closed it or died of whatever cause, it ends every process that is left
in the nodes, and removes the ranks' control groups. A process cannot hide from it in another
session or process group, because what is looked up is the network namespace that a process is in.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PATIENCE_S = 10.0


def libc(function: str, *arguments: int) -> None:
    """Call a function of the C library that Python 3.11 has no name for.

    Raises:
        OSError: with the errno of the call.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def enter(
    parent: int, namespace_fd: int, cores: Sequence[int], group: str, command: list[str]
) -> None:
    """Become ``command`` in a network namespace, and end when the launcher ends.

    group: the folder of the control group to be in; "" for the launcher's.
    """
    import resource  # not on Windows, where the command line still has to start

    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request above was made
        os._exit(1)
    libc("setns", namespace_fd, CLONE_NEWNET)
    os.close(namespace_fd)
    if group:
        with open(os.path.join(group, "cgroup.procs"), "w") as processes:
            processes.write("0")  # whoever writes it
    if cores:
        os.sched_setaffinity(0, cores)
    # A rank that hangs is aborted for its stacks: no core files.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.execvp(command[0], command)


def guard(namespace_fds: Sequence[int], groups: Sequence[str]) -> None:
    """Wait for the end of standard input, then end all processes in the namespaces; remove groups.

    The open descriptors keep the namespaces' identities from being given to other namespaces.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    end_processes(namespace_fds)
    remove_groups(groups)


def remove_groups(folders: Sequence[str], patience_s: float = PATIENCE_S) -> list[OSError]:
    """Control groups whose processes have ended; what went wrong with those that stay.

    The kernel takes a moment to forget the processes. Groups that are gone already are fine.
    """
    deadline = time.monotonic() + patience_s
    found = [_remove_group(folder, deadline) for folder in folders]
    return [error for error in found if error is not None]


def _remove_group(folder: str, deadline: float) -> OSError | None:
    while True:
        try:
            os.rmdir(folder)
            return None
        except FileNotFoundError:
            return None
        except OSError as error:
            waits = error.errno in (errno.EBUSY, errno.ENOTEMPTY)
            if not waits or time.monotonic() > deadline:
                return error
        time.sleep(0.002)


def end_processes(namespace_fds: Sequence[int], patience_s: float = PATIENCE_S) -> list[int]:
    """SIGKILL every process in the namespaces until none is left; returns those that stay."""
    deadline = time.monotonic() + patience_s
    while True:
        left = processes_in(namespace_fds)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.002)


def processes_in(namespace_fds: Sequence[int]) -> list[int]:
    """Ids of the processes in these network namespaces, this one excepted."""
    wanted = {(found.st_dev, found.st_ino) for found in map(os.fstat, namespace_fds)}
    pids = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            found = os.stat(f"/proc/{name}/ns/net")
        except OSError:  # it ended, is a zombie, or is not ours to look at
            continue
        if (found.st_dev, found.st_ino) in wanted:
            pids.append(int(name))
    return pids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        guard(_numbers(sys.argv[2]), sys.argv[3:])
    else:
        launcher, node, pinned, folder, *rank = sys.argv[2:]
        enter(int(launcher), int(node), _numbers(pinned), folder, rank)
