"""Gloo ranks that live as long as the test session, so that a case costs milliseconds.

Starting a process that imports torch takes seconds; a :class:`RankPool` pays that once. Functions
travel by value (cloudpickle), because test modules cannot be imported in the children. Run as a
script, this file is the child: ``python -P tests/ranks.py FD RANK WORLD_SIZE PORT``.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=60)
GRACE_S = 5.0  # after one rank failed, how long its peers get to fail or finish by themselves
TESTS = str(Path(__file__).resolve().parent)


class RankError(RuntimeError):
    """A rank died, hung, or raised something that cannot be sent back."""


class RankPool:
    """``world_size`` gloo processes on this machine, one thread each, started when first used.

    Every case gets a new default process group (about 0.1 s for 4 ranks), so groups made by a case
    end with it. After a death or a hang all ranks are ended and the next case starts new ones.
    """

    def __init__(
        self, world_size: int, timeout_s: float = 120.0, environment: dict[str, str] | None = None
    ) -> None:
        self.world_size = world_size
        self.environment = environment or {}
        self.timeout_s = timeout_s
        self._case = 0
        self._store: dist.TCPStore | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None
    ) -> list[Any]:
        """``function(*args)`` on every rank; returns what each returned, by rank.

        Inside, ``torch.distributed`` is initialised. The exception of the rank that failed first
        is raised here, with that rank's traceback as a note.

        Raises:
            RankError: a rank died, or did not answer in ``timeout_s``.
        """
        outcomes = self.outcomes(function, *args, timeout_s=timeout_s)
        failed = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
        if failed:
            raise min(failed, key=lambda failure: failure.order).exception
        return outcomes

    def errors(
        self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None
    ) -> list[Exception | None]:
        """The exception each rank raised, or None where it returned; for tests of refusals."""
        outcomes = self.outcomes(function, *args, timeout_s=timeout_s)
        return [o.exception if isinstance(o, _Failure) else None for o in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None
    ) -> list[Any]:
        """As :meth:`run`, with a ``_Failure`` in the place of a rank that raised."""
        self._start()
        self._case += 1
        payload = _dumps((self._case, function, args))
        try:
            for rank, connection in enumerate(self._connections):
                try:
                    connection.send_bytes(payload)
                except OSError as error:
                    raise self._death(rank) from error
            return self._collect(timeout_s or self.timeout_s)
        except BaseException:
            self.close()  # ranks may still be inside the case: never reuse them
            raise

    def close(self) -> None:
        """End the ranks. The pool starts new ones when it is used again."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes, self._connections, self._store = [], [], None

    def _collect(self, timeout_s: float) -> list[Any]:
        outcomes: dict[int, Any] = {}
        num_failed = 0
        deadline = time.monotonic() + timeout_s
        while len(outcomes) < self.world_size:
            waiting = {c: r for r, c in enumerate(self._connections) if r not in outcomes}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready and not num_failed:
                late = ", ".join(str(rank) for rank in waiting.values())
                for rank in waiting.values():
                    self._processes[rank].send_signal(signal.SIGUSR1)  # prints its stacks
                time.sleep(0.5)
                raise RankError(
                    f"rank {late} of {self.world_size} gave no answer in {timeout_s:g} s: "
                    "look at its stack above for a collective that not every rank reaches"
                )
            if not ready:  # blocked in a collective that the failed rank will never join
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                outcomes[rank] = self._receive(rank, connection, num_failed)
                if isinstance(outcomes[rank], _Failure):
                    num_failed += 1
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        missing = set(range(self.world_size)) - outcomes.keys()
        if missing:
            self.close()
        for rank in missing:
            error = RankError(f"rank {rank} was ended: it waited for a rank that had failed")
            outcomes[rank] = _Failure(error, self.world_size)
        return [outcomes[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int, connection: Connection, num_failed: int) -> Any:
        try:
            ok, value, trace = cloudpickle.loads(connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death(rank) from error
        if ok:
            return value
        value.add_note(f"on rank {rank} of {self.world_size}:\n{trace}")
        return _Failure(value, num_failed)

    def _death(self, rank: int) -> RankError:
        code = self._processes[rank].wait(timeout=10)
        return RankError(f"rank {rank} of {self.world_size} died with exit code {code}")

    def _start(self) -> None:
        if self._processes and all(process.poll() is None for process in self._processes):
            return
        self.close()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        environment |= self.environment
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(self.world_size):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-P", __file__, *map(str, (theirs.fileno(), rank))]
            command += [str(self.world_size), str(self._store.port)]
            self._processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            )
            theirs.close()
            self._connections.append(Connection(ours.detach()))


class _Failure:
    """What a rank raised, and the place of its answer among the failures (0: first)."""

    def __init__(self, exception: Exception, order: int) -> None:
        self.exception = exception
        self.order = order


def _dumps(value: object) -> bytes:
    """Pickle with everything defined under tests/ by value."""
    modules = [m for m in list(sys.modules.values()) if _under_tests(m)]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(value))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _under_tests(module: Any) -> bool:
    path = getattr(module, "__file__", None)
    return isinstance(path, str) and path.startswith(TESTS + os.sep) and path != __file__


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
    while True:
        case, function, args = cloudpickle.loads(requests.get())
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        case_store = dist.PrefixStore(f"case{case}", store)
        failed = False
        try:
            dist.init_process_group(
                "gloo", timeout=GROUP_TIMEOUT, world_size=world_size, rank=rank, store=case_store
            )
            reply = cloudpickle.dumps((True, function(*args), ""))
        except BaseException as error:  # SystemExit and pytest's outcomes too: all go to the parent
            reply, failed = _failure(error), True
        connection.send_bytes(reply)
        if failed and dist.is_initialized():
            dist.destroy_process_group()  # peers waiting for this rank fail now, not in a minute


def _failure(error: BaseException) -> bytes:
    trace = traceback.format_exc()
    try:
        reply = bytes(cloudpickle.dumps((False, error, trace)))
        assert isinstance(error, Exception)
        cloudpickle.loads(reply)  # some exceptions pickle but cannot be made again
        return reply
    except Exception:
        described = RankError(f"{type(error).__name__}: {error}")
        return bytes(cloudpickle.dumps((False, described, trace)))


def _read(connection: Connection, requests: queue.SimpleQueue[bytes]) -> None:
    """Hand over requests; when the parent is gone, so is this rank, whatever it is doing."""
    while True:
        try:
            requests.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), *map(int, sys.argv[2:5]))
