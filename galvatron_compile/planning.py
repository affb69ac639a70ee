"""plan: a model and a cluster in, the fastest pipeline of layers and strategies out.

Read :func:`plan`: capture → shard → price → search → report. Nothing runs; a laptop will do.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from galvatron_compile import notation
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.constraints import Constraints
from galvatron_compile.errors import InfeasibleError, PlanError, ShapeError
from galvatron_compile.findings import infeasible, predicted, report, with_curve
from galvatron_compile.passes.pipeline.searcher import search
from galvatron_compile.planned import Planned
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.study import Say, Study

if TYPE_CHECKING:
    from galvatron_compile.models import Workable


def plan(
    model: str | Workable | Study,
    cluster: ClusterProfile | str,
    *,
    global_batch_size: int,
    seq: int | None = None,
    memory_bytes: int | None = None,
    precision: str | None = "bf16",
    constraints: str | Constraints = "",
    top: int = 5,
    keep: tuple[str, ...] = (),
    curve: bool = False,
    certify: bool = False,
    say: Say = lambda text: None,
) -> Planned:
    """The optimum of the closed form in passes.pipeline.closed_form over the whole space.

    Args:
        model: ``llama3-70b`` and other built-in names, a Hugging Face config, or
            ``package.module:callable`` (see :func:`galvatron_compile.models.load_model`); or the
            study of an earlier search (:class:`galvatron_compile.study.Study`), which captures
            and prices nothing again.
        cluster: a profile, or the name of a preset (``128x8xH100``).
        global_batch_size: samples of one optimizer step over all ranks.
        seq: tokens of a sample, for models by name.
        memory_bytes: of a rank, the framework's reserve included; the device's if not given.
        precision: None, ``"fp32"`` or ``"bf16"`` (with fp32 masters).
        constraints: what must hold, see :mod:`galvatron_compile.constraints`.
        top: how many plans are wanted, the best included.
        keep: names of pruning rules of the kind "switch" in passes.strategies that are not to
            prune.
        curve: also find the best plan at other memory limits, for ``explain``.
        certify: also solve the best plan's pipeline as a MILP by HiGHS, and say what it found.
        say: called with what is being done.

    Raises GalvatronError: nothing fits (with the smallest limit that would do), the constraints
    contradict each other, or the model cannot be captured.
    """
    start = time.process_time()
    study = _study(
        model, cluster, seq, global_batch_size, memory_bytes, precision, constraints, say
    )
    study = replace(study, keep=keep)
    say("pricing every distinct layer under every strategy")
    problems = study.problems()
    costs_s = time.process_time() - start
    say(f"searching {len(problems)} pipelines")
    start = time.process_time()
    outcome = search(problems, top)
    search_s = time.process_time() - start
    if not outcome.solved:
        raise InfeasibleError(infeasible(study, outcome))
    found = report(study, problems, outcome, top, costs_s=costs_s, search_s=search_s)
    if curve:
        say("searching at other memory limits")
        found = with_curve(study, problems, found)
    if certify:
        from galvatron_compile.passes.pipeline.certify import certify as certified

        say("certifying the best plan's pipeline with HiGHS")
        best = outcome.solved[0]
        text = f"within {best.problem.family}: {certified(best.problem, best)}"
        found = replace(found, certificate=f"{text}\nother pipelines: excluded by lower bounds")
    return found


def price(
    text: str | Plan,
    model: str | Workable | Study,
    cluster: ClusterProfile | str,
    *,
    global_batch_size: int,
    seq: int | None = None,
    memory_bytes: int | None = None,
    precision: str | None = "bf16",
    say: Say = lambda text: None,
) -> Plan:
    """A given plan (an object, or the compact notation) with ``predicted`` filled in.

    Arguments and errors as :func:`plan`; PlanError where a layer cannot run with its strategy.
    """
    degrees = (
        [strategy.tp for strategy in text.strategies]
        if isinstance(text, Plan)
        else [int(found) for found in re.findall(r"\btp([0-9]+)", text)]
    )
    # Names the plan's own degrees, so that its forms are derived however large they are.
    forms = Constraints.parse(f"tp=1,{','.join(map(str, degrees))}") if degrees else ""
    known = forms if not isinstance(model, Study) else ""
    study = _study(model, cluster, seq, global_batch_size, memory_bytes, precision, known, say)
    if isinstance(text, Plan):
        given = named_as(text, study.layer_names)
        given.check_model(
            given.model, len(study.layer_names), study.cluster.world_size, global_batch_size
        )
    else:
        ranks = study.cluster.world_size
        given = notation.parse(text, study.layer_names, ranks, global_batch_size)
    return predicted(study, given)


def named_as(given: Plan, layer_names: tuple[str, ...]) -> Plan:
    """A plan that is for any model of as many layers, with this model's names.

    Plans of Galvatron's know no final norm of its own: it runs as the head does.
    """
    if given.model or given.layers == layer_names:
        return given
    if len(given.layers) == len(layer_names) - 1 and "norm" in layer_names[-2:]:
        stages = given.stages
        if stages:
            last = stages[-1]
            stages = (*stages[:-1], Stage(last.first, last.last + 1))
        strategies = (*given.strategies, given.strategies[-1])
        return replace(
            given, layers=layer_names, strategies=strategies, stages=stages, classes=(),
            predicted={},
        )  # fmt: skip
    return replace(given, layers=layer_names) if len(given.layers) == len(layer_names) else given


def _study(
    model: str | Workable | Study,
    cluster: ClusterProfile | str,
    seq: int | None,
    global_batch_size: int,
    memory_bytes: int | None,
    precision: str | None,
    constraints: str | Constraints,
    say: Say,
) -> Study:
    if isinstance(cluster, str):
        cluster = ClusterProfile.preset(cluster)
    if isinstance(constraints, str):
        constraints = Constraints.parse(constraints)
    if isinstance(model, Study):
        if (model.cluster, model.global_batch_size) != (cluster, global_batch_size):
            raise PlanError("the study was made for another cluster or batch; make a new one")
        return model.under(constraints, memory_bytes)
    if isinstance(model, str):
        from galvatron_compile.models import load_model

        model = load_model(model, seq)
    elif seq is not None and seq != model.seq:
        raise ShapeError(f"the model was made for a sequence of {model.seq}, not {seq}")
    return Study.of(model, cluster, global_batch_size, memory_bytes, precision, constraints, say)
