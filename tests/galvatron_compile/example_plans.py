"""Plans with predictions that fit together, in the shape of a Llama."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from galvatron_compile import notation
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

BLOCK, VOCABULARY = 855_000_000, 1_050_000_000  # parameters of a block of 70 B, of its embedding
RATE = 4.1e11  # FLOP/ms of a rank
SEQ, HIDDEN = 8192, 8192
TOKENS = 4 * SEQ  # of a micro-batch on one rank
LIMIT = 76 * 2**30
PHI = {"gpipe": 1.0, "1f1b": 1.0, "interleaved": 0.5, "zero-bubble": 1 / 3}
STATES = {"parameter_bytes": 2, "gradient_bytes": 4, "optimizer_bytes": 12}
KEPT = {"none": 34, "selective": 26, "full": 2}  # bytes a token and hidden unit


def bare(
    num_blocks: int = 30,
    pp: int = 4,
    micro: int = 16,
    *,
    schedule: str = "1f1b",
    virtual: int = 1,
    tp: int = 8,
    dp: int = 4,
    zero: int = 1,
    recompute: str = "none",
    mixed: bool = True,
) -> Plan:
    """A plan as a person would write it. mixed: the ends and some blocks have other strategies."""
    names = ("embed_tokens", *(f"layers.{i}" for i in range(num_blocks)), "lm_head")
    usual = Strategy(tp, dp, tp > 1, zero if dp > 1 else 0, recompute)  # type: ignore[arg-type]
    strategies = [usual] * len(names)
    if mixed:
        strategies[0] = strategies[-1] = replace(usual, recompute="none", zero=min(1, usual.zero))
        for index in range(1, 1 + num_blocks // 5):
            strategies[index] = replace(usual, recompute="full")
    number = pp * virtual
    lengths = [(i + 1) * len(names) // number - i * len(names) // number for i in range(number)]
    edges = [0, *accumulate(lengths)]
    return Plan(
        model="5f3a9c1e77b0",
        world_size=usual.num_ranks * pp,
        global_batch_size=4 * dp * micro,
        num_micro_batches=micro,
        layers=names,
        strategies=tuple(strategies),
        stages=tuple(Stage(a, b) for a, b in pairwise(edges)) if number > 1 else (),
        schedule=schedule,
        virtual=virtual,
        classes=("embedding", *("block",) * num_blocks, "head"),
    )


def planned(*args: Any, **kwargs: Any) -> Plan:
    """The same as the planner would save it."""
    return predicted(bare(*args, **kwargs))


def layer_costs(plan: Plan) -> list[dict[str, float]]:
    costs = []
    for name, strategy in zip(plan.layers, plan.strategies, strict=True):
        size = BLOCK if name.startswith("layers.") else VOCABULARY
        forward = 2 * size * TOKENS / RATE / strategy.tp * (0.02 if name == "embed_tokens" else 1)
        again = {"none": 0.0, "selective": 0.08, "full": 1.0}[strategy.recompute]
        states = sum(size * each / strategy.tp for each in STATES.values())
        costs.append(
            {
                "forward_ms": forward,
                "backward_ms": (2 + again) * forward,
                "step_ms": plan.num_micro_batches * (3 + again) * forward,
                "resharding_ms": 0.0,
                "state_bytes": round(states / (strategy.dp if strategy.zero else 1)),
                "saved_bytes": round(KEPT[strategy.recompute] * TOKENS * HIDDEN / strategy.tp),
                "transient_bytes": 3 * 2**30 // strategy.tp,
            }
        )
    return costs


def in_flight(plan: Plan, group: int) -> int:
    m, pp = plan.num_micro_batches, plan.pp
    return {"gpipe": m, "1f1b": min(pp - group, m), "zero-bubble": min(pp, m)}.get(
        plan.schedule, min(m, pp * plan.virtual - group)
    )


def predicted(plan: Plan) -> Plan:
    layers, m = layer_costs(plan), plan.num_micro_batches
    groups: list[dict[str, Any]] = []
    for group in range(plan.pp):
        indices = plan.group_layers(group)
        mine = [layers[i] for i in indices]
        states = sum(layer["state_bytes"] for layer in mine)
        parts: dict[str, Any] = {k: round(states * v / 18) for k, v in STATES.items()}
        flight = in_flight(plan, group)
        parts["saved_bytes"] = round(
            sum(layer["saved_bytes"] for layer in mine) * flight / plan.virtual
        )
        parts["transient_bytes"] = max(layer["transient_bytes"] for layer in mine)
        parts["reserve_bytes"] = 2 * 2**30
        groups.append(
            {
                "layers": f"{indices[0]}-{indices[-1]}",
                "forward_ms": sum(layer["forward_ms"] for layer in mine) * 1.15,
                "backward_ms": sum(layer["backward_ms"] for layer in mine) * 1.12,
                "step_once_ms": 38.0,
                "in_flight": [flight // plan.virtual or 1] * plan.virtual,
                **parts,
                "memory_bytes": sum(parts.values()),
            }
        )
    slowest = max(groups, key=lambda g: g["forward_ms"] + g["backward_ms"])
    work = m * (slowest["forward_ms"] + slowest["backward_ms"])
    bubble = PHI[plan.schedule] * (plan.pp - 1) * work / m
    causes = {
        "compute_ms": work * 0.86, "tensor_comm_ms": work * 0.11, "context_comm_ms": 0.0,
        "expert_comm_ms": 0.0, "data_comm_ms": 31.0 + 0.03 * work, "pipeline_comm_ms": 0.0,
        "resharding_ms": 0.0, "optimizer_ms": 7.0, "bubble_ms": bubble,
    }  # fmt: skip
    step = sum(causes.values())
    written = notation.format(plan)
    limits = (48, 56, 64, 68, 72, 76, 80, 96, 120)
    curve = [
        {"memory_bytes": gib * 2**30, "step_ms": step * factor, "notation": written
         if gib == 76 else f"{written.split(';')[0]}; pp={plan.pp}; micro={m}"}
        for gib, factor in zip(
            limits, (1.31, 1.17, 1.09, 1.045, 1.02, 1.0, 0.99, 0.961, 0.96), strict=True
        )
    ]  # fmt: skip
    tokens = plan.global_batch_size * SEQ
    numbers = {
        "step_ms": step,
        "tokens_per_s": 1e3 * tokens / step,
        "mfu": 0.41,
        "memory_bytes": max(group["memory_bytes"] for group in groups),
        "memory_limit_bytes": LIMIT,
        "causes": causes,
        "groups": groups,
        "layers": layers,
        "tradeoff": curve,
        "alternatives": [
            {"notation": f"tp4.sp.dp8.zero1; pp={plan.pp}; micro={m}", "step_ms": step * 1.021,
             "behind_percent": 2.1, "why": "data-parallel communication +44 ms that backward does "
             "not hide, tensor-parallel communication −21 ms"},
            {"notation": "tp8.sp.dp16.zero3; micro=8", "step_ms": step * 1.087,
             "behind_percent": 8.7, "why": "gathers of ZeRO-3 cross nodes in every micro-batch"},
        ],
        "baselines": [
            {"name": "pure FSDP", "notation": "dp128.zero3", "step_ms": step * 1.62,
             "behind_percent": 62.0, "why": "gathers across nodes take longer than the layers"},
            {"name": "Megatron-style 3D", "notation": f"tp8.sp.dp4.zero1.recompute; pp={plan.pp}; "
             f"micro={m}", "step_ms": step * 1.28, "behind_percent": 28.0,
             "why": "all layers are recomputed"},
            {"name": "pure data parallel", "notation": "dp128", "why": "needs 1.2 TiB a rank"},
        ],
        "rejected": [
            {"family": "pp=1", "why": "does not fit: the smallest needs 81.3 GiB of 76.0 GiB"},
            {"family": "pp=16", "why": "its lower bound, 1.4 times this step, is above this plan"},
        ],
        "bound_by": "compute of stage 1 (62 %)",
        "warnings": [],
        "hardware": "128 × 8 × H100 SXM 80 GB",
        "model_name": "Llama-3-70B",
        "seq": SEQ,
        "sources": ["matrix products: data sheet × 0.62", "collectives: measured 2025-05-11"],
    }  # fmt: skip
    return replace(plan, predicted=numbers)


def of_one_stage() -> Plan:
    """A plan with just the keys that passes/pricing.py writes."""
    plan = bare(12, 1, 4, tp=2, dp=4, zero=3)
    layers = [
        {key: value for key, value in cost.items() if not key.endswith("ward_ms")}
        for cost in layer_costs(plan)
    ]
    step = sum(layer["step_ms"] for layer in layers)
    states, saved = (sum(x[key] for x in layers) for key in ("state_bytes", "saved_bytes"))
    transient = max(layer["transient_bytes"] for layer in layers)
    return replace(
        plan,
        predicted={
            "step_ms": step,
            "memory_bytes": states + saved + transient,
            "compute_ms": step * 0.83,
            "tensor_comm_ms": step * 0.09,
            "data_comm_ms": step * 0.07,
            "optimizer_ms": step * 0.01,
            "resharding_ms": 0.0,
            "transient_bytes": transient,
            "layers": layers,
        },
    )
