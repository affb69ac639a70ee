"""A process that does one thing after another, so that nothing it does harms the rest.

A kernel that reads where it may not leaves its process without a GPU, and one that hangs leaves it
waiting for ever. The process that asks touches no GPU; it makes a new worker after either.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

Answer = Callable[[str, str], Any]


class Failed(Exception):
    """What was asked for raised, or its process died."""


class TookTooLong(Failed):
    """There was no answer in time; the process was killed."""


class Worker:
    """make_answer: called once in the process (a function of a module, it travels by name)."""

    def __init__(self, make_answer: Callable[[], Answer]) -> None:
        self.make_answer = make_answer
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, verb: str, name: str, seconds: float) -> Any:
        """The answer, which must come in time.

        Raises:
            Failed: why there is none; TookTooLong.
        """
        if self._process is None:
            self._start()
        until = time.monotonic() + seconds
        try:
            self._pipe.send((verb, name))
            if not self._pipe.poll(max(0.0, until - time.monotonic())):
                self.stop()
                raise TookTooLong(f"no answer in {seconds:.0f} s: killed")
            fine, answer, usable = self._pipe.recv()
        except (EOFError, OSError) as error:
            process = self._process
            process.join(5)
            self.stop()
            raise Failed(f"its process died, exit code {process.exitcode}") from error
        if not usable:
            self.stop()
        if not fine:
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        """Kill the process, if there is one; a later question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._pipe.close()
            self._process = self._pipe = None

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self.make_answer))
        self._process.start()
        theirs.close()


def _serve(pipe: Any, make_answer: Callable[[], Answer]) -> None:
    """Answers (fine, answer or text of the error, whether this process can go on)."""
    answer: Answer | None = None
    while True:
        try:
            verb, name = pipe.recv()
        except EOFError:
            return
        try:
            answer = answer or make_answer()
            reply = True, answer(verb, name), True
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            # After an error of CUDA nothing works in this process.
            reply = False, f"{type(error).__name__}: {text}", not broken(error)
        pipe.send(reply)


def broken(error: BaseException) -> bool:
    """Whether CUDA is lost to the process that raised this; out of memory is not."""
    text = f"{type(error).__name__} {error}"
    return "CUDA error" in text or "Triton Error [CUDA]" in text or "AcceleratorError" in text
