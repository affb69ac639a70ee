"""One model on one set of ranks under many plans, against the same model in one process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from models import BATCH, Case, Promote, make

from galvatron_compile.compiler import Setting, build, understand
from galvatron_compile.job import Job
from galvatron_compile.mesh import Mesh
from galvatron_compile.notation import parse
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.fuse import Wish, fuse
from galvatron_compile.passes.lower import Traced, lower
from galvatron_compile.passes.rewrite import make_mesh
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.precision import Precision
from galvatron_compile.printer import fingerprint


@dataclass(frozen=True)
class Outcome:
    """Largest relative differences from the single process."""

    loss: float = 0.0
    gradient: float = 0.0
    worst_gradient: str = ""
    trained: float = 0.0


def compare(
    model_name: str, plans: list[str], train: list[str]
) -> dict[str, dict[str, float | str]]:
    """Run on every rank. Captures and shards once, then builds and checks every plan.

    A plan behind "fused " runs with every fused operator that can be put in.
    """
    case = make(model_name)
    with Promote():
        expected = reference(case)
        layered = understand(case.model, case.batch, None, Precision())
    initial = {name: value.detach().clone() for name, value in case.model.named_parameters()}
    job = Job.current(case.model)
    names, model = [layer.name for layer in layered.layers], fingerprint(layered)
    bare = {text: with_rest(text.removeprefix("fused "), len(names)) for text in plans}
    parsed = {
        text: parse(plan, names, job.world_size, BATCH, model=model) for text, plan in bare.items()
    }
    # The form of a class depends on its own degree alone, so all plans can share the table.
    shardings = shard(layered, {s for plan in parsed.values() for s in plan.strategies})
    outcomes, traced = {}, Traced()
    for text, plan in parsed.items():
        restore(case.model, initial)
        job = Job.current(case.model)
        mesh = make_mesh(layered, plan, job.world_size, job.rank)
        wish: Wish = "always" if text.startswith("fused ") else "never"
        parallel = assemble(layered, plan, shardings, mesh, job, traced, wish)
        outcomes[text] = one(parallel, case, expected, 3 if text in train else 1)
    return {text: asdict(outcome) for text, outcome in outcomes.items()}


def with_rest(text: str, num_layers: int) -> str:
    """``stages=2,*`` with the number of layers that are left."""
    found = re.search(r"stages=([\d,]*),\*", text)
    if found is None:
        return text
    rest = num_layers - sum(map(int, found[1].split(",")))
    return text.replace(",*", f",{rest}")


def assemble(
    layered: Any, plan: Any, shardings: Any, mesh: Mesh, job: Job, traced: Traced, wish: Wish
) -> ParallelModel:
    from galvatron_compile.compiler import Decision

    setting = Setting(job, None, Precision(), None, False)  # type: ignore[arg-type]
    program = build(layered, Decision(plan, shardings, None), mesh, setting)
    program, fusions = fuse(program, None, wish)
    assert wish == "never" or fusions.num_taken, fusions
    lowered = lower(program, traced=traced)
    assert not lowered.remarks, lowered.remarks  # every layer is traced
    return ParallelModel(lowered, Precision())


def reference(case: Case) -> Mapping[str, Any]:
    """Loss and gradients of the global batch, then the parameters after three AdamW steps."""
    model = case.model
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    losses = []
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(3):
        optimizer.zero_grad()
        out = model(**case.batch)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = gradients or {
            name: value.grad.clone()
            for name, value in model.named_parameters()
            if value.grad is not None
        }
        optimizer.step()
    optimizer.zero_grad()
    trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    restore(model, start)
    return {"losses": losses, "gradients": gradients, "trained": trained}


def restore(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
            parameter.grad = None


def one(
    parallel: ParallelModel, case: Case, expected: Mapping[str, Any], num_steps: int
) -> Outcome:
    local = parallel.local_batch(case.batch)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-4)
    loss_error, gradient_error, worst = 0.0, 0.0, ""
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = float(parallel.step(local))
        loss_error = max(loss_error, abs(loss / float(expected["losses"][step]) - 1))
        if step == 0:
            got = parallel.full_gradients()
            gradient_error, worst = largest(got, expected["gradients"])
        optimizer.step()
    trained = 0.0
    if num_steps == 3:
        state = parallel.full_state_dict()
        trained, _ = largest(
            {name: value for name, value in state.items() if name in expected["trained"]},
            expected["trained"],
        )
    return Outcome(loss_error, gradient_error, worst, trained)


def largest(
    got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """Largest |difference| relative to the largest entry of the wanted tensor, on rank 0.

    Floored at a thousandth of the largest entry of all tensors: some gradients are exactly zero
    (BERT's key bias), and their rounding noise is no error.
    """
    if not got:  # only rank 0 has them
        return 0.0, ""
    missing = set(wanted) - set(got)
    assert not missing, f"no gradient for {sorted(missing)}"
    floor = 1e-3 * max(float(value.abs().max()) for value in wanted.values())
    errors = {
        name: float((got[name] - value).abs().max()) / max(float(value.abs().max()), floor)
        for name, value in wanted.items()
    }
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name
