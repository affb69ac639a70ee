"""What the runtime executes today; the planner knows more."""

from __future__ import annotations

from galvatron_compile import schedules
from galvatron_compile.errors import PlanError, UnsupportedError
from galvatron_compile.plans import Plan
from galvatron_compile.strategy import Strategy

LATER = {
    "ulysses": "Ulysses sequence parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
}
NOT_RUN = (
    f"{', '.join(LATER.values())}, selective recompute, which this version plans "
    "(galvatron-compile plan) but does not execute yet"
)


def why_not(strategy: Strategy) -> str | None:
    """Why a layer cannot run with ``strategy`` yet; None if it can."""
    for name, what in LATER.items():
        degree = getattr(strategy, name)
        if degree > 1:
            return f"{what} is not executed by this version yet; leave {name}{degree} out"
    if strategy.recompute == "selective":
        return "selective recompute is not executed by this version yet; write recompute or nothing"
    return None


def check(plan: Plan) -> None:
    """Raise UnsupportedError, which says what to change, for a plan that does not run yet."""
    schedule = plan.schedule if plan.pp > 1 else "1f1b"
    reason = schedules.why_not(schedule, plan.pp, plan.num_micro_batches, plan.virtual)
    if reason is not None:
        raise PlanError(reason)
    for name, strategy in zip(plan.layers, plan.strategies, strict=True):
        reason = why_not(strategy)
        if reason is not None:
            raise UnsupportedError(f"layer {name!r} with {strategy}: {reason}")
