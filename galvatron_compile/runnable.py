"""What the runtime executes today; the planner knows more."""

from __future__ import annotations

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.plans import Plan
from galvatron_compile.strategy import Strategy

LATER = {
    "ulysses": "Ulysses sequence parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
}
NOT_RUN = (
    f"pipeline stages, {', '.join(LATER.values())}, selective recompute, which this version plans "
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
    if plan.pp > 1 or plan.num_stages > 1:
        raise UnsupportedError(
            f"a plan of {plan.num_stages} pipeline stages is not executed by this version yet; "
            "leave pp and stages out, or plan again with pp=1"
        )
    for name, strategy in zip(plan.layers, plan.strategies, strict=True):
        reason = why_not(strategy)
        if reason is not None:
            raise UnsupportedError(f"layer {name!r} with {strategy}: {reason}")
