"""How bench/gpu.py runs: its order and budget, the report, the worker; with fakes for the GPU."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("gpu_bench")


class Answers:
    """Stands for a worker. clock_s: of how long everything has taken; a question takes 10."""

    def __init__(self) -> None:
        self.clock_s = 0.0

    def __call__(self, verb: str, name: str, seconds: float) -> Any:
        from gpu_report import Row
        from gpu_timer import Timed
        from gpu_worker import Failed, TookTooLong

        self.clock_s += 10
        if verb == "machine":
            return {"gpu": "NVIDIA Toy [1]"}
        if verb == "ceilings":
            return {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
        if verb == "compiled":
            return Timed(6.0, late=True)
        if name == "breaks":
            raise Failed("its process died, exit code 3")
        if name == "slow":
            self.clock_s += seconds - 10
            raise TookTooLong(f"no answer in {seconds:.0f} s: killed")
        wrong = ["off: result 0 is off by 7 times its tolerance"] if name == "off" else []
        over = {"eager": 1.2, "another [way]": 1.1}
        row = Row(name, 2.0, "copy", None, 3e12, 0.9, over, over_target=1.3, eager_is="in words")
        return wrong, row

    def play(self, size: int, seconds: float) -> Any:
        from gpu_peers import Rounds

        self.clock_s += seconds
        return Rounds(size, 11, 400 if size == 2 else 9, "" if size == 2 else "normed by 3")


def test_a_run_keeps_what_it_has_when_something_fails_or_time_is_out(tmp_path: Path) -> None:
    import gpu
    from gpu_report import Report, show
    from rich.console import Console

    answers, report = Answers(), Report(folder=tmp_path)
    names = ["first", "breaks", "off", "last"]
    gpu.run(names, ["first", "breaks", "off"], answers, answers.play, report,
            lambda: 375.0 - answers.clock_s)  # fmt: skip
    # 80 s of questions, then rounds of 110 s and 110 s, products over the link, and one compiled.
    found = json.loads((tmp_path / "gpu_NVIDIA_Toy_1_.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        "gather", "scatter", "first", "off", "last",
    ]  # fmt: skip
    assert report.status() == 1
    assert found["failed"] == {"case breaks": "its process died, exit code 3"}
    assert found["wrong"] == [
        "off: result 0 is off by 7 times its tolerance",
        "4 processes, 9 rounds right, then: normed by 3",
    ]
    assert found["left_out"] == {
        "1000 rounds of 2 processes": "out of time after 400, all right",
        "compiled off": "out of time",
    }
    first = found["rows"][2]
    assert first["share"] == 0.75 and first["reached"] is False
    assert first["over"]["compiled"] == 3.0 and first["late"] == ["compiled"]
    assert [done["seed"] for done in found["rounds"]] == [11, 11]
    out = io.StringIO()
    show(report, Console(file=out, width=150))
    for text in ("75.0%", "90%, 1.3x eager", "3.00", "first: eager is in words",
                 "first: 1.10 over another [way]", "launches count in compiled",
                 "2 processes: 400 of 1000 rounds right, seed 11",
                 "left out: compiled off: out of time", "failed: case breaks: its process died",
                 "wrong: off: result 0 is off by 7"):  # fmt: skip
        assert text in out.getvalue(), out.getvalue()
    assert "Liger" not in out.getvalue()


def test_what_is_slow_is_at_fault_only_where_it_had_all_its_time() -> None:
    import gpu
    from gpu_report import Report

    for left_s, at_fault in ((100.0, True), (85.0, False)):  # 40 s are gone before
        answers, report = Answers(), Report()
        gpu.run(["slow"], [], answers, answers.play, report,
                lambda left_s=left_s, answers=answers: left_s - answers.clock_s)  # fmt: skip
        assert ("case slow" in report.failed, "case slow" in report.left_out) == (
            at_fault, not at_fault,
        )  # fmt: skip
        assert report.status() == at_fault


def test_measure_shows_and_saves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu
    import gpu_peers

    answers, stopped = Answers(), []

    class Toy:
        def __init__(self, make_answer: Callable[[], Any]) -> None:
            assert make_answer.__module__ == "gpu_full"

        ask = answers

        def stop(self) -> None:
            stopped.append(True)

    monkeypatch.setattr(gpu, "Worker", Toy)
    monkeypatch.setattr(gpu, "STARTED", time.monotonic())
    monkeypatch.setattr(
        gpu_peers, "check_in_processes",
        lambda size, rounds, device, seed, seconds: gpu_peers.Rounds(size, seed, rounds),
    )  # fmt: skip
    assert gpu.measure(tmp_path / "new") == 0 and stopped == [True]
    found = json.loads((tmp_path / "new" / "gpu_NVIDIA_Toy_1_.json").read_text())
    assert not found["left_out"] and len(found["rows"]) > 30
    printed = capsys.readouterr().out
    assert "4 processes: 1000 of 1000 rounds right" in printed
    assert "case unpermute backward" in printed and "wrote " in printed


def test_every_row_is_saved_before_the_next(tmp_path: Path) -> None:
    import gpu
    from gpu_report import Report

    class Dies(Answers):
        def __call__(self, verb: str, name: str, seconds: float) -> Any:
            if name == "dies":
                raise KeyboardInterrupt
            return super().__call__(verb, name, seconds)

    answers = Dies()
    with pytest.raises(KeyboardInterrupt):
        gpu.run(["first", "dies"], [], answers, answers.play, Report(folder=tmp_path), lambda: 99.0)
    [file] = tmp_path.iterdir()
    assert [row["name"] for row in json.loads(file.read_text())["rows"]][-1] == "first"


def test_a_worker_is_replaced_after_it_hung_or_lost_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu_toy.py").write_text(
        "import os, time\n"
        "def make():\n"
        "    def answer(verb, name):\n"
        "        if verb == 'hang': time.sleep(600)\n"
        "        if verb == 'die': os._exit(3)\n"
        "        if verb == 'raise': raise ValueError(name)\n"
        "        return os.getpid()\n"
        "    return answer\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from gpu_toy import make
    from gpu_worker import Failed, Worker

    worker = Worker(make)
    try:
        first = worker.ask("pid", "", 300.0)
        with pytest.raises(Failed, match="ValueError: no such thing"):
            worker.ask("raise", "no such thing", 300.0)
        assert worker.ask("pid", "", 300.0) == first
        with pytest.raises(Failed, match="CUDA error: misaligned address"):
            worker.ask("raise", "CUDA error: misaligned address", 300.0)
        second = worker.ask("pid", "", 300.0)
        with pytest.raises(Failed, match="no answer in 1 s: killed"):
            worker.ask("hang", "", 1.0)
        with pytest.raises(Failed, match="its process died, exit code 3"):
            worker.ask("die", "", 300.0)
        assert len({first, second, worker.ask("pid", "", 300.0)}) == 3
    finally:  # or pytest waits for it
        worker.stop()
