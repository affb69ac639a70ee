"""How a run in an emulated cluster fails, and that it takes everything with it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulated import FAMILY, TIMEOUT_S, alive, emulated, needed

from galvatron_compile import emulation_ranks
from galvatron_compile.errors import PeerError

pytestmark = needed


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("raise ValueError('boom')", r"^rank 1 of 3 \(node 1\) exited with code 1[^$]*Error: boom"),
        ("sys.exit('no luck')", r"^rank 1 of 3 \(node 1\) exited with code 1[^$]*no luck"),
        ("os.kill(os.getpid(), 9)", r"^rank 1 of 3 \(node 1\) was killed by SIGKILL; it wrote not"),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_last_lines(
    death: str, message: str, tmp_path: Path
) -> None:
    action = f"meet(); time.sleep(1000 * (rank != '1')); {death}"
    pids: list[str] = []
    with emulated(num_nodes=3) as cluster:
        with pytest.raises(PeerError, match=message):
            cluster.run(
                ["-c", FAMILY, action],
                timeout_s=TIMEOUT_S,
                environment={"MEETING": str(tmp_path)},
                on_line=lambda _, stream, line: pids.extend(line.split() * (stream == "stdout")),
            )
        assert len(pids) == 6 and not alive(pids)
        assert cluster.run(["-c", "print(1)"], timeout_s=TIMEOUT_S).outputs == ("1\n",) * 3


def test_last_words_without_an_end_of_line_are_shown() -> None:
    lines: list[str] = []
    with emulated(num_nodes=1) as cluster, pytest.raises(PeerError, match=r"code 3; [^$]*  last w"):
        cluster.run(
            ["-c", "import os; os.write(2, b'last words'); os._exit(3)"],
            timeout_s=TIMEOUT_S,
            on_line=lambda rank, stream, line: lines.append(line),
        )
    assert lines == ["last words"]


# Rank 1 waits until rank 0 has ended, and then for ever.
STUCK = """
import os, sys, time
from pathlib import Path
path = Path(sys.argv[1])

def is_there(pid):
    stat = Path("/proc", pid, "stat")
    return stat.exists() and ") Z " not in stat.read_text()

def stuck_in_here():
    print("stuck")
    time.sleep(1000)

if os.environ["RANK"] == "0":
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
else:
    while not path.exists() or is_there(path.read_text()):
        time.sleep(0.01)
    stuck_in_here()
"""


def test_late_ranks_are_named_with_the_place_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is up as soon as rank 1 is stuck, however long that takes."""
    passed_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s)
    monkeypatch.setattr(emulation_ranks, "time", clock)

    def on_line(rank: int, stream: str, line: str) -> None:
        nonlocal passed_s
        passed_s += 1000.0 * (line == "stuck")

    with (
        emulated(num_nodes=2) as cluster,
        pytest.raises(PeerError, match=r"^rank 1 of 2 did not end in 900 s\n[^$]*in stuck_in_here"),
    ):
        arguments = ["-c", STUCK, str(tmp_path / "pid")]
        cluster.run(arguments, timeout_s=900.0, on_line=on_line)


def test_processes_that_ranks_leave_behind_are_ended() -> None:
    """They are in other sessions and hold the rank's standard output open."""
    with emulated(num_nodes=2) as cluster:
        result = cluster.run(["-c", FAMILY, "pass"], timeout_s=TIMEOUT_S)
        pids = " ".join(result.outputs).split()
        assert len(pids) == 4 and not alive(pids)


def test_an_error_of_the_one_who_listens_ends_the_ranks() -> None:
    def on_line(rank: int, stream: str, line: str) -> None:
        pids.extend(line.split())
        raise KeyboardInterrupt

    pids: list[str] = []
    with emulated(num_nodes=2) as cluster:
        with pytest.raises(KeyboardInterrupt):
            cluster.run(["-c", FAMILY, "time.sleep(1000)"], timeout_s=TIMEOUT_S, on_line=on_line)
        assert pids and not alive(pids)


def test_lines_are_shown_whole_and_bytes_that_are_no_text_too() -> None:
    script = (
        "import os, time; os.write(1, b'one\\ntw'); time.sleep(0.05); os.write(1, b'o\\n\\xff'); "
        "os.write(2, b'three')"
    )
    lines: list[tuple[str, str]] = []
    with emulated(num_nodes=1) as cluster:
        result = cluster.run(
            ["-c", script],
            timeout_s=TIMEOUT_S,
            on_line=lambda _, stream, line: lines.append((stream, line)),
        )
    assert [line for stream, line in lines if stream == "stdout"] == ["one", "two", "\ufffd"]
    assert ("stderr", "three") in lines
    assert (result.outputs, result.errors) == (("one\ntwo\n\ufffd",), ("three",))
