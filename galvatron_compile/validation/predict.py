"""Predictor: measured runs → what the planner's own cost model expects of them.

A run becomes a decoder of its shape, a plan in our notation and a cluster; the price is that of
passes.plan_prices, which plans are searched by. What the run's framework and GPU differ in is in
:mod:`.software` and :mod:`.hardware`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import understand
from galvatron_compile.errors import GalvatronError, PlanError
from galvatron_compile.facts import Fact, Overlap
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.models import DecoderShape, load_shape
from galvatron_compile.passes.layer_costs import LayerCosts, Workload
from galvatron_compile.passes.layer_estimate import Estimator, Execution, Tallies
from galvatron_compile.passes.messages import Messages
from galvatron_compile.passes.plan_prices import Pricer
from galvatron_compile.passes.reshard_cost import Switches
from galvatron_compile.passes.sharding.table import ShardingTable, shard
from galvatron_compile.validation.hardware import Hardware
from galvatron_compile.validation.kernels import Kernels
from galvatron_compile.validation.run import Dtype, Prediction, Run
from galvatron_compile.validation.software import Software

CAPTURED_BLOCKS = 2
"""Blocks of a decoder are alike, so few are captured (it is checked) and repeated."""

_EMBEDDING, _BLOCK, _NORM, _HEAD = range(4)
Form = tuple[int, bool]


@dataclass
class _Model:
    """One shape in one dtype, captured; ``forms`` and counts are added when needed."""

    layered: LayeredGraph
    forms: dict[Form, ShardingTable] = field(default_factory=dict)
    counts: Tallies = field(default_factory=dict)

    @staticmethod
    def of(run: Run, software: Software) -> _Model:
        shape = replace(run.shape, layers=CAPTURED_BLOCKS)
        model = load_shape(run.model, shape, run.seq, software.dtype())
        layered = understand(
            model.module, model.example_inputs, model.loss_fn, software.precision()
        )
        classes = [layer.class_index for layer in layered.layers]
        if classes != [_EMBEDDING, *[_BLOCK] * CAPTURED_BLOCKS, _NORM, _HEAD]:
            raise PlanError(f"the blocks of {run.model} were not captured as one class: {classes}")
        return _Model(layered)

    def pricer(
        self, run: Run, software: Software, cluster: ClusterProfile, micro_batch: int
    ) -> Pricer:
        strategy = run.strategy
        form = strategy.tp, strategy.sequence_parallel
        if form not in self.forms:
            self.forms[form] = shard(self.layered, [strategy])
        shardings = self.forms[form]
        first, block, *_, norm, head = self.layered.layers
        layered = replace(self.layered, layers=(first, *[block] * run.layers, norm, head))
        kernels = Kernels(software, software.softmax_is_eager(run, micro_batch), run.vocab)
        execution = Execution(kernels, software.exposed, software.backward_dispatch)
        estimator = Estimator(layered, shardings, cluster, self.counts, execution)
        ranks = run.num_gpus // run.pp
        costs = LayerCosts(
            layered=layered,
            shardings=shardings,
            cluster=cluster,
            workload=Workload(ranks, run.global_batch, (1,), software.precision(), run.pp),
            timings={},
            estimator=estimator,
            messages=Messages(layered, cluster, estimator),
        )
        return Pricer(costs, Switches(layered, shardings, cluster), cluster.memory_bytes)


class Predictor:
    """Predicts runs; what several of them share (captured models, counts) is made once.

    table: the file of the runs, for measurements that lie beside it.
    """

    def __init__(self, table: Path | None = None) -> None:
        self.hardware = Hardware.beside(table)
        self._models: dict[tuple[DecoderShape, int, Dtype], _Model] = {}

    def predict(self, run: Run, profile_path: Path | None = None) -> Prediction:
        """Step time and memory of the fullest rank; GalvatronError, naming the row, if it cannot.

        Of several possible micro-batches the fastest that fits in memory counts, as a run's
        authors would have taken it; if none fits, the fastest.
        """
        try:
            return self.predict_with(run, Software.of(run), profile_path)
        except GalvatronError as error:
            text = str(error)
            named = text if text.startswith("row ") else f"row {run.row}: {text}"
            raise type(error)(named) from error

    def predict_with(
        self, run: Run, software: Software, profile_path: Path | None = None
    ) -> Prediction:
        """As :meth:`predict`, with other assumptions about the software."""
        cluster = adapted(self.hardware.cluster(run, profile_path), software)
        model = self._model(run, software)
        found = []
        for micro_batch in run.micro_batches:
            pricer = model.pricer(run, software, cluster, micro_batch)
            price = pricer.evaluate(run.plan(micro_batch))
            used = max(price.group_bytes)
            found.append((used > pricer.capacity_bytes, price.total_ns, used))
        _, total_ns, used = min(found)
        return Prediction(total_ns / 1e6, float(used + int(cluster.reserve_bytes.value)))

    def _model(self, run: Run, software: Software) -> _Model:
        key = replace(run.shape, layers=CAPTURED_BLOCKS), run.seq, software.compute
        if key not in self._models:
            self._models[key] = _Model.of(run, software)
        return self._models[key]


def adapted(cluster: ClusterProfile, software: Software) -> ClusterProfile:
    """The cluster as this software drives it; what was measured stays."""
    if software.host_ms is not None and not cluster.launch_overhead_ms.source.startswith("meas"):
        source = f"default: {software.name}, see galvatron_compile.validation.software"
        cluster = replace(cluster, launch_overhead_ms=Fact(software.host_ms, source))
    if software.overlap is not None:
        factors = cluster.overlap
        joint = Overlap(
            software.overlap, factors.compute, factors.communication,
            f"default: {software.name}, see galvatron_compile.validation.software",
        )  # fmt: skip
        within = cluster.node_overlap and replace(cluster.node_overlap, joint=software.overlap)
        cluster = replace(cluster, overlap=joint, node_overlap=within)
    return cluster
