"""Emulated clusters: what is limited and what is not, and what ranks find."""

from __future__ import annotations

import json
import os

import pytest
from emulated import TIMEOUT_S, emulated, namespaces_held, needed

from galvatron_compile.emulation import (
    EmulatedCluster,
    EmulationError,
    RunningCluster,
    set_link_rate,
)
from galvatron_compile.emulation_network import burst_bytes
from galvatron_compile.errors import PeerError

NUM_BYTES = 4_000_000

# Rank argv[2] sends argv[1] bytes to rank 0 at each of the rates, waits for the answer, and prints
# the seconds, the bytes that each interface of its node has sent, and the packets.
TRANSFER = """
import json, os, socket, sys, time
from galvatron_compile.emulation import set_link_rate

def counters():
    lines = open("/proc/self/net/dev").read().splitlines()[2:]
    found = [(line.split(":")[0].strip(), line.split(":")[1].split()) for line in lines]
    return {name: (int(counts[8]), int(counts[9])) for name, counts in found}

size, sender, rates = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
rank, where = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    line = socket.create_server(where).accept()[0]
elif rank == sender:
    while True:
        try:
            line = socket.create_connection(where)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
else:
    sys.exit()
for rate in rates:
    if rank == 0:
        if rate != "as it is":
            set_link_rate(rate)
        line.sendall(b"!")
        left = size
        while left:
            left -= len(line.recv(1 << 20))
        line.sendall(b"!")
    else:
        line.recv(1)
        before, start = counters(), time.perf_counter()
        line.sendall(bytes(size))
        line.recv(1)
        wall_s, after = time.perf_counter() - start, counters()
        sent = [{name: after[name][k] - before[name][k] for name in after} for k in (0, 1)]
        print(json.dumps([wall_s, *sent]))
"""


# Rank 0 exchanges argv[1] bytes with each other rank at the same time; prints the seconds.
STAR = """
import os, socket, sys, threading, time
size, outward = int(sys.argv[1]), sys.argv[2] == "out"
rank, where = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

def send(line):
    line.sendall(bytes(size))
    line.recv(1)

def receive(line):
    left = size
    while left:
        left -= len(line.recv(1 << 20))
    line.sendall(b"!")

if rank == 0:
    server = socket.create_server(where)
    lines = [server.accept()[0] for _ in range(int(os.environ["WORLD_SIZE"]) - 1)]
    work = [threading.Thread(target=send if outward else receive, args=[l]) for l in lines]
    start = time.perf_counter()
    for line in lines:
        line.sendall(b"!")
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    print(time.perf_counter() - start)
else:
    while True:
        try:
            line = socket.create_connection(where)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    line.recv(1)
    (receive if outward else send)(line)
"""


def transfers(
    cluster: RunningCluster, sender: int, *rates: object
) -> list[tuple[float, dict[str, int], dict[str, int]]]:
    arguments = ["-c", TRANSFER, str(NUM_BYTES), str(sender), json.dumps(rates or ["as it is"])]
    result = cluster.run(arguments, timeout_s=TIMEOUT_S)
    return [tuple(json.loads(line)) for line in result.outputs[sender].splitlines()]


def least_s(rate_bits_per_s: float, num_bytes: int = NUM_BYTES) -> float:
    """No transfer can be faster; the buckets of both ends may be full at first."""
    return (num_bytes - 2 * burst_bytes(rate_bits_per_s)) * 8 / rate_bits_per_s


@needed
def test_traffic_between_nodes_is_no_faster_than_asked() -> None:
    with emulated(num_nodes=2, rate_bits_per_s=2e8) as cluster:
        [(wall_s, sent, _)] = transfers(cluster, 1)
        assert wall_s >= least_s(2e8)
        assert sent["eth0"] >= NUM_BYTES
        cluster.set_rate(1e8)
        assert transfers(cluster, 1)[0][0] >= least_s(1e8)


@needed
def test_traffic_within_a_node_does_not_touch_the_link() -> None:
    with emulated(num_nodes=2, ranks_per_node=2, rate_bits_per_s=2e8) as cluster:
        [(_, sent, _)] = transfers(cluster, 1)
        assert sent["lo"] >= NUM_BYTES
        assert sent["eth0"] < NUM_BYTES / 100
        [(wall_s, sent, _)] = transfers(cluster, 2)  # the first rank of the other node
        assert wall_s >= least_s(2e8)
        assert sent["lo"] < NUM_BYTES / 100


@needed
def test_large_packets_pass_whole() -> None:
    """Cut up into segments of 1,448 bytes they would cost half a core."""
    with emulated(num_nodes=2) as cluster:
        for _, _, packets in transfers(cluster, 1, 2e8, 4e8, 1e9):
            assert packets["eth0"] < NUM_BYTES / 10_000


@needed
@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_node_has_one_link_for_all_its_peers(direction: str) -> None:
    with emulated(num_nodes=3, rate_bits_per_s=1e8) as cluster:
        result = cluster.run(["-c", STAR, str(NUM_BYTES), direction], timeout_s=TIMEOUT_S)
    assert float(result.outputs[0]) >= least_s(1e8, 2 * NUM_BYTES)


@needed
def test_a_rank_changes_the_rate_of_all_links() -> None:
    with emulated(num_nodes=3) as cluster:
        found = transfers(cluster, 2, 2e8, None, 1e8)
    for rate, (wall_s, _, _) in zip((2e8, 1e8), found[::2], strict=True):
        assert wall_s >= least_s(rate)


@needed
def test_a_rank_is_told_what_is_wrong_with_a_rate() -> None:
    script = "from galvatron_compile.emulation import set_link_rate; set_link_rate(-5)"
    with (
        emulated(num_nodes=1) as cluster,
        pytest.raises(PeerError, match=r"EmulationError: a link of -5 bits a second; choose"),
    ):
        cluster.run(["-c", script], timeout_s=TIMEOUT_S)


def test_a_rate_is_refused_outside_a_cluster() -> None:
    with pytest.raises(EmulationError, match="start the script with galvatron-compile emulate"):
        set_link_rate(1e9)


@needed
def test_ranks_get_the_environment_of_torchrun_and_their_cores() -> None:
    script = (
        "import json, os; e = os.environ; print(json.dumps([[e[n] for n in ('RANK', 'LOCAL_RANK', "
        "'GROUP_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS', 'OURS')]"
        ", sorted(os.sched_getaffinity(0))]))"
    )
    cores = sorted(os.sched_getaffinity(0))
    lines: list[tuple[int, str, str]] = []
    with emulated(2, ranks_per_node=2, pin=True) as cluster:
        result = cluster.run(
            ["-c", script],
            timeout_s=TIMEOUT_S,
            environment={"OURS": "x"},
            on_line=lambda *line: lines.append(line),
        )
    for rank in range(4):
        local, node = str(rank % 2), str(rank // 2)
        variables, pinned = json.loads(result.outputs[rank])
        assert variables == [str(rank), local, node, "4", "2", "10.0.0.1", "1", "x"]
        assert pinned == [cores[rank % len(cores)]]
        assert (rank, "stdout", result.outputs[rank].rstrip("\n")) in lines


@needed
def test_gloo_sums_over_nodes_and_within_them() -> None:
    script = (
        "import torch, torch.distributed as dist; dist.init_process_group('gloo'); "
        "x = torch.full((1000,), 10.0 ** dist.get_rank()); dist.all_reduce(x); "
        "print(set(x.tolist())); dist.barrier(); dist.destroy_process_group()"
    )
    with emulated(2, ranks_per_node=2, rate_bits_per_s=1e9) as cluster:
        result = cluster.run(["-c", script], timeout_s=TIMEOUT_S)
    assert result.outputs == ("{1111.0}\n",) * 4


@needed
def test_an_exception_in_the_context_ends_the_cluster() -> None:
    with pytest.raises(ZeroDivisionError), emulated(num_nodes=2):
        assert len(namespaces_held()) == 3  # the bridge has one too
        raise ZeroDivisionError


@needed
def test_two_runs_at_once_are_refused() -> None:
    with emulated(num_nodes=1) as cluster:

        def again(*_: object) -> None:
            with pytest.raises(EmulationError, match="wait until that ends"):
                cluster.run(["-c", "pass"])

        assert cluster.run(["-c", "print(1)"], on_line=again).outputs == ("1\n",)
        with pytest.raises(EmulationError, match="give a script"):
            cluster.run([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_nodes": 0}, "cannot emulate 0 nodes; choose a number from 1 to 250"),
        ({"num_nodes": 251}, "cannot emulate 251 nodes"),
        ({"ranks_per_node": 0}, "every node needs at least one"),
        ({"rate_bits_per_s": 9e4}, "100kbit"),
        ({"rate_bits_per_s": float("nan")}, "nan bits a second"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        EmulatedCluster(**settings)  # type: ignore[arg-type]
