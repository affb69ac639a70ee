"""The ranks of one run in an emulated cluster: started, watched, and ended together."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from galvatron_compile import emulation_child
from galvatron_compile.errors import GalvatronError, PeerError

CONTROL = "GALVATRON_EMULATION_FD"  # where a rank finds its end of the line to the launcher
NUM_LAST_LINES = 30
ABORT_S = 10.0  # what ranks that are out of time get to print their stacks

OnLine = Callable[[int, str, str], None]
SetRate = Callable[[float | None], None]


@dataclass(frozen=True)
class RankCommand:
    """How one rank is started: its node's namespace, its cores (none: all), the folder of its
    control group ("": the launcher's) and its environment."""

    node: int
    namespace_fd: int
    cores: tuple[int, ...]
    group: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class FinishedRun:
    """What the ranks of a run that went well wrote, by rank, and how long it took."""

    outputs: tuple[str, ...]
    errors: tuple[str, ...]
    wall_s: float


class _Rank:
    """One process with its three lines to the launcher."""

    def __init__(self, rank: int, how: RankCommand) -> None:
        self.rank, self.node = rank, how.node
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cores = ",".join(map(str, how.cores))
        command = [sys.executable, "-I", "-S", emulation_child.__file__, "enter", str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(how.namespace_fd), cores, how.group, *how.command],
                env={**how.environment, CONTROL: str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno(), how.namespace_fd],
                start_new_session=True,  # Ctrl-C is the launcher's to handle
            )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.streams = {"stdout": self.process.stdout, "stderr": self.process.stderr}
        self.text = {name: bytearray() for name in self.streams}
        self.num_shown = dict.fromkeys(self.streams, 0)
        self.exit_fd = os.pidfd_open(self.process.pid)
        for stream in self.streams.values():
            os.set_blocking(stream.fileno(), False)

    def read(self, name: str, on_line: OnLine | None) -> bool:
        """Take what the rank has written. False: the stream is at its end."""
        try:
            found = os.read(self.streams[name].fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self.text[name] += found
        if on_line is not None:
            self._show(name, on_line, at_end=not found)
        return bool(found)

    def _show(self, name: str, on_line: OnLine, at_end: bool) -> None:
        text, start = self.text[name], self.num_shown[name]
        end = len(text) if at_end else text.rfind(b"\n") + 1
        if end > start:
            self.num_shown[name] = end
            for line in _decode(text[start:end]).splitlines():
                on_line(self.rank, name, line)

    def close(self) -> None:
        """End the process and forget it."""
        self.process.kill()
        self.process.wait()
        os.close(self.exit_fd)
        self.control.close()
        for stream in self.streams.values():
            stream.close()


class Ranks:
    """The ranks of one run. Leaving the context ends those that still live."""

    def __init__(
        self, commands: Sequence[RankCommand], on_line: OnLine | None, set_rate: SetRate
    ) -> None:
        self._on_line, self._set_rate = on_line, set_rate
        self._started = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._ranks: list[_Rank] = []
        self._namespace_fds = sorted({how.namespace_fd for how in commands})
        try:
            for rank, how in enumerate(commands):
                self._ranks.append(_Rank(rank, how))
                self._watch(self._ranks[-1])
        except BaseException:
            self.close()
            raise

    def wait(self, timeout_s: float | None) -> FinishedRun:
        """Until all have ended with exit code 0.

        Raises:
            PeerError: a rank failed, or some did not end in ``timeout_s``; with their last lines.
        """
        deadline = None if timeout_s is None else self._started + timeout_s
        running = set(range(len(self._ranks)))
        while running:
            ended = self._pump(deadline)
            running -= ended
            failed = [rank for rank in sorted(ended) if self._exit_code(rank) != 0]
            if failed:
                raise PeerError(self._describe_failure(failed))
            if deadline is not None and time.monotonic() >= deadline and running:
                raise PeerError(self._describe_timeout(sorted(running), timeout_s or 0.0))
        wall_s = time.monotonic() - self._started
        self._stop()
        texts = [rank.text for rank in self._ranks]
        outputs, errors = ([_decode(t[name]) for t in texts] for name in ("stdout", "stderr"))
        return FinishedRun(tuple(outputs), tuple(errors), wall_s)

    def close(self) -> None:
        """End the ranks and whatever processes they have left in their nodes."""
        self._on_line = None
        self._stop()
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        self._selector.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self, rank: _Rank) -> None:
        for name, stream in rank.streams.items():
            self._selector.register(stream, selectors.EVENT_READ, (rank, name))
        self._selector.register(rank.control, selectors.EVENT_READ, (rank, "control"))
        self._selector.register(rank.exit_fd, selectors.EVENT_READ, (rank, "exit"))

    def _pump(self, deadline: float | None) -> set[int]:
        """Serve what is ready; returns the ranks that have ended since."""
        ended = set()
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(left_s):
            rank, name = key.data
            if name == "exit":
                ended.add(rank.rank)
                more = False
            elif name == "control":
                more = self._serve(rank)
            else:
                more = rank.read(name, self._on_line)
            if not more:
                self._selector.unregister(key.fileobj)
        return ended

    def _serve(self, rank: _Rank) -> bool:
        """Answer one request for another rate. False: the rank has closed its end."""
        try:
            request = rank.control.recv(1 << 12)
            if request:
                rank.control.send(json.dumps({"error": self._change_rate(request)}).encode())
            return bool(request)
        except ConnectionError:  # it died meanwhile; its exit is reported in its turn
            return False

    def _change_rate(self, request: bytes) -> str:
        try:
            self._set_rate(json.loads(request)["rate_bits_per_s"])
        except GalvatronError as error:
            return str(error)
        return ""

    def _stop(self) -> None:
        """End whatever is left in the nodes, then take what was written, to the last line."""
        for rank in self._ranks:
            rank.process.kill()
        emulation_child.end_processes(self._namespace_fds)
        for rank in self._ranks:
            for name in rank.streams:
                size = -1
                while size < len(rank.text[name]):
                    size = len(rank.text[name])
                    rank.read(name, self._on_line)

    def _exit_code(self, rank: int) -> int:
        return self._ranks[rank].process.wait()

    def _describe_failure(self, failed: list[int]) -> str:
        self._stop()
        lines = []
        for rank in failed:
            code, node = self._exit_code(rank), self._ranks[rank].node
            how = f"exited with code {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            name = f"rank {rank} of {len(self._ranks)} (node {node})"
            lines.append(f"{name} {how}; {self._last_lines(rank)}")
        return "\n".join([*lines, "the other ranks were stopped"])

    def _describe_timeout(self, late: list[int], timeout_s: float) -> str:
        """Abort the late ranks: Python's fault handler prints where each of them was."""
        for rank in late:
            self._ranks[rank].process.send_signal(signal.SIGABRT)
        deadline, waiting = time.monotonic() + ABORT_S, set(late)
        while waiting and time.monotonic() < deadline:
            waiting -= self._pump(deadline)
        self._stop()
        names = ", ".join(map(str, late))
        head = f"rank {names} of {len(self._ranks)} did not end in {timeout_s:g} s"
        return "\n".join([head, *(f"rank {rank}: {self._last_lines(rank)}" for rank in late)])

    def _last_lines(self, rank: int) -> str:
        lines = deque(_decode(self._ranks[rank].text["stderr"]).splitlines(), NUM_LAST_LINES)
        if not lines:
            return "it wrote nothing to stderr"
        return "\n".join(["the last lines of its stderr:", *(f"  {line}" for line in lines)])


def _decode(text: bytes | bytearray) -> str:
    return text.decode("utf-8", errors="replace")
