"""What every rank of an emulated cluster does: profile it, search, and train under every plan.

Started by bench/emulated_cluster.py in the nodes. The model is captured once, every plan is lowered
once, and all link speeds are served by one start of the processes: a link speed changes the
profile, and with it the predictions and the plan that is chosen, but no program. Rank 0 writes one
JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from emulated.plans import BATCH_SIZE, TOPOLOGIES, batch, model

from galvatron_compile import ClusterProfile, Plan, notation
from galvatron_compile.cluster_json import dumps
from galvatron_compile.compiler import build, understand
from galvatron_compile.decisions import Setting, decide, obey
from galvatron_compile.emulation import set_link_rate
from galvatron_compile.job import Job
from galvatron_compile.mesh import Groups
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.lower import Traced, lower
from galvatron_compile.passes.rewrite import make_mesh
from galvatron_compile.precision import Precision
from galvatron_compile.profiling import Sizes, measure
from galvatron_compile.recordings import Recordings

KIB, MIB = 1024, 1024**2
SIZES = Sizes(
    (64, 256, 512), (64, 256), 4, 32 * MIB,
    (4 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB), 0.15, 60.0,
)  # fmt: skip


STEPS_A_TURN = 3


class Compiler:
    """``gc.compile`` of one model for many plans and profiles, which captures it once."""

    def __init__(self, width: int) -> None:
        self.job = Job.current(torch.nn.Module())
        self.precision, self.traced = Precision.parse(None), Traced()
        # One set for all plans: with a set for each, seventy threads of gloo on every rank looked
        # a hundred times a second whether something had come.
        self.groups: Groups = {}
        example = {key: value[:2] for key, value in batch().items()}
        self.layered = understand(model(width), example, None, self.precision)

    def setting(self, cluster: ClusterProfile) -> Setting:
        return Setting(self.job, cluster, self.precision, None, True, self.job.cores())

    def search(self, cluster: ClusterProfile) -> tuple[Plan, str]:
        """The plan that the search finds, and its report."""
        found = decide(self.layered, BATCH_SIZE, self.setting(cluster), None)
        return found.plan, str(found.report)

    def priced(self, text: str, cluster: ClusterProfile) -> Plan:
        return obey(self.layered, BATCH_SIZE, self.setting(cluster), text, None).plan

    def program(self, text: str, cluster: ClusterProfile) -> ParallelModel:
        setting = self.setting(cluster)
        decision = obey(self.layered, BATCH_SIZE, setting, text, None)
        ranks = self.job.world_size, self.job.rank
        mesh = make_mesh(self.layered, decision.plan, *ranks, groups=self.groups)
        program = build(self.layered, decision, mesh, setting)
        lowered = self.job.together(lambda: lower(program, traced=self.traced))
        return ParallelModel(lowered, self.precision)


class Contender:
    """A program with AdamW, and what was measured of it on this rank since it was last asked."""

    def __init__(self, parallel: ParallelModel) -> None:
        self.parallel, self.local = parallel, parallel.local_batch(batch())
        # One pass over memory, which is how the planner prices an update.
        self.optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-4, fused=True)
        self.losses: list[float] = []
        self.step_ms: list[float] = []
        self.optimizer_ms: list[float] = []
        self.recorded: Recordings | None = None

    def turn(self) -> None:
        """Some steps, of which the first is not timed: training never changes its model, but here
        others ran before, and caches and freed memory are full of theirs."""
        for step in range(STEPS_A_TURN):
            self.train()
            if step == 0:
                self.step_ms.pop()
                self.optimizer_ms.pop()

    def train(self) -> None:
        """One step, timed on this rank; all ranks start together."""
        dist.barrier()
        start = time.perf_counter()
        loss = self.parallel.step(self.local)
        stepped = time.perf_counter()
        self.optimizer.step()
        self.parallel.zero_grad()
        self.optimizer_ms.append(1e3 * (time.perf_counter() - stepped))
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.losses.append(float(loss))

    def record(self) -> None:
        """Time and memory of every action of one more step, on all ranks."""
        self.recorded = self.parallel.profile(
            self.local, optimizer=self.optimizer, warm_up=1, repetitions=1
        )

    def take(self, warm_up: int) -> list[dict[str, Any]]:
        """What every rank measured, on every rank."""
        assert self.recorded is not None
        recorded = self.recorded.ranks[dist.get_rank()]
        spent_ms: dict[str, float] = defaultdict(float)
        for event in recorded.events:
            spent_ms[event.kind] += event.end_ms - event.start_ms
        mine = {
            "group": self.parallel._program.mesh.group,
            "step_ms": self.step_ms[warm_up:],
            "optimizer_ms": self.optimizer_ms[warm_up:],
            "peak_bytes": recorded.peak_bytes,
            "recorded_ms": dict(spent_ms),
        }
        self.step_ms, self.optimizer_ms = [], []
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return ranks


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.perf_counter()
        self.compiler = Compiler(TOPOLOGIES[options.topology].width)
        self.contenders: dict[str, Contender] = {}
        self.say("captured")

    def say(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - self.start:5.0f} s: {text}")

    def at(self, rate: float, names: tuple[str, ...]) -> dict[str, Any]:
        """Everything at one link speed."""
        dist.barrier()
        if dist.get_rank() == 0:
            set_link_rate(rate)
        dist.barrier()
        cluster = measure(sizes=SIZES)
        self.say(f"profiled {rate:g} bit/s")
        plan, report = self.compiler.search(cluster)
        chosen = notation.format(plan)
        self.say(f"chose {chosen}")
        predicted = {chosen: plan.predicted}
        for name in names:
            if name not in self.contenders:
                self.contenders[name] = Contender(self.compiler.program(name, cluster))
            predicted[name] = self.compiler.priced(name, cluster).predicted
        if chosen not in self.contenders:
            self.contenders[chosen] = Contender(self.compiler.program(chosen, cluster))
        self.say("compiled")
        results = self.compete({name: self.contenders[name] for name in predicted})
        self.say("measured")
        return {
            "rate_bits_per_s": rate,
            "chosen": chosen,
            "report": report,
            "cluster": json.loads(dumps(cluster)),
            "reserve_bytes": int(cluster.reserve_bytes.value),
            "results": [
                {"name": name, "predicted": _brief(predicted[name]), **results[name]}
                for name in predicted
            ],
        }

    def compete(self, contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
        """All plans take turns, in another order every time, so that drift hits all alike."""
        order = list(contenders.values())
        for repetition in range(self.options.warm_up + self.options.repetitions):
            random.Random(repetition).shuffle(order)
            for contender in order:
                contender.turn()
        for contender in order:
            contender.record()
        return {
            name: {
                "plan": notation.format(contender.parallel.plan),
                "losses": contender.losses,
                "ranks": contender.take(self.options.warm_up * (STEPS_A_TURN - 1)),
            }
            for name, contender in contenders.items()
        }


def _brief(predicted: Any) -> dict[str, Any]:
    """Without the lists of layers and actions."""
    kept = ("simulated", "sources")
    return {k: v for k, v in predicted.items() if isinstance(v, int | float) or k in kept}


def stay_on_node() -> None:
    """Node k of n has every n-th core, so that a stage that waits does not speed up the next one,
    which is on another node."""
    node, num_nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_nodes:
        sys.exit(f"{num_nodes} nodes need a core each, and there are {len(cores)}")
    os.sched_setaffinity(0, cores[node::num_nodes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", choices=list(TOPOLOGIES), required=True)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--plans", nargs="*", help="instead of the topology's own")
    options = parser.parse_args()
    stay_on_node()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = tuple(options.plans or TOPOLOGIES[options.topology].all())
    bench = Bench(options)
    links = [bench.at(rate, names) for rate in options.rates]
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(links, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
