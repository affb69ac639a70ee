"""Galvatron's plan files, ``galvatron_config_….json``, to and from :class:`Plan`.

The file encodes layers without embedding and head, one entry a layer:

    tp_sizes_enc    tensor-parallel degree, or with use_sp 1 the Ulysses degree
    dp_types_enc    1: ZeRO-3, 0: default_dp_type ("zero2" or "ddp")
    checkpoint      1: recompute the layer in backward
    cp_sizes_enc    context-parallel degree (newer files; left out where it is 1)

and vtp, vsp, embed_sdp, vcp the same of embedding and head together. Tensor parallelism there is
always with Megatron's sequence parallelism. Data parallelism is what is left of the GPUs.
"""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from galvatron_compile.errors import PlanError, UnsupportedError
from galvatron_compile.fields import Fields
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

SCHEDULES = {"pipedream_flush": "1f1b", "gpipe": "gpipe"}
DEFAULT_ZERO = {"zero2": 2, "ddp": 0}


def layer_names(num_layers: int) -> tuple[str, ...]:
    """Of a plan with embedding and head, as this package names them."""
    return ("embedding", *(f"layer.{i}" for i in range(num_layers)), "head")


def layer_classes(num_layers: int) -> tuple[str, ...]:
    return ("embedding", *["layer"] * num_layers, "head")


def is_galvatron(text: str) -> bool:
    """Whether a file's text is a plan of Galvatron's rather than one of ours."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(document, dict) and "pp_deg" in document


def load(path: str | Path, num_gpus: int) -> Plan:
    """Read a plan file. PlanError names the file and the field at fault."""
    try:
        return loads(Path(path).read_text(encoding="utf-8"), num_gpus)
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def loads(text: str, num_gpus: int) -> Plan:
    """The plan in a file's text; the file does not say for how many GPUs it is."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"not JSON: {error}") from error
    fields = Fields(document, "plan")
    pp = fields.take("pp_deg", int)
    if pp < 1 or num_gpus % pp:
        raise PlanError(f"plan.pp_deg is {pp}, which does not divide {num_gpus} GPUs")
    degrees = _numbers(fields, "tp_sizes_enc")
    count = len(degrees)
    flags = _numbers(fields, "tp_consecutive_flags", count, 1)
    if set(flags) != {1}:
        raise PlanError("plan.tp_consecutive_flags holds 0; only consecutive tp ranks are read")
    types = _numbers(fields, "dp_types_enc", count)
    ulysses = _numbers(fields, "use_sp", count, 0)
    recomputed = _numbers(fields, "checkpoint", count, 0)
    contexts = _numbers(fields, "cp_sizes_enc", count, 1)
    default = _word(fields, "default_dp_type", DEFAULT_ZERO)
    ranks = num_gpus // pp
    ends = _strategy(
        ranks,
        (fields.take("vtp", int, 1), fields.take("vsp", int, 0), fields.take("vcp", int, 1)),
        fields.take("embed_sdp", int, 0),
        default,
        0,
    )
    rows = zip(degrees, ulysses, contexts, types, recomputed, strict=True)
    layers = [
        _strategy(ranks, (tp, sp, cp), kind, default, again) for tp, sp, cp, kind, again in rows
    ]
    plan = Plan(
        model="",
        world_size=num_gpus,
        global_batch_size=fields.take("global_bsz", int),
        num_micro_batches=fields.take("chunks", int),
        layers=layer_names(count),
        strategies=(ends, *layers, ends),
        stages=_stages(_numbers(fields, "pp_division"), pp, count),
        schedule=SCHEDULES[_word(fields, "pipeline_type", SCHEDULES)],
        classes=layer_classes(count),
    )
    fields.finish()
    return plan


def dumps(plan: Plan) -> str:
    """The plan as Galvatron writes it. UnsupportedError says what the format cannot hold."""
    _check(plan)
    ends, layers = plan.strategies[0], plan.strategies[1:-1]
    default = _default_type(plan)
    lengths = [stage.last - stage.first for stage in plan.stages] or [len(plan.layers)]
    lengths[0] -= 1
    lengths[-1] -= 1
    if min(lengths) < 1:
        raise UnsupportedError(
            "Galvatron's format has at least one layer beside embedding or head on every stage"
        )
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    document: dict[str, Any] = {
        "pp_deg": plan.pp,
        "tp_sizes_enc": _joined(max(s.tp, s.ulysses) for s in layers),
        "tp_consecutive_flags": _joined(1 for _ in layers),
        "dp_types_enc": _joined(int(s.zero == 3) for s in layers),
        "use_sp": _joined(int(s.ulysses > 1) for s in layers),
        "checkpoint": _joined(int(s.recompute == "full") for s in layers),
        "global_bsz": plan.global_batch_size,
        "chunks": plan.num_micro_batches,
        "pp_division": _joined(lengths),
        "pipeline_type": names[plan.schedule],
        "default_dp_type": default,
        "vtp": max(ends.tp, ends.ulysses),
        "vsp": int(ends.ulysses > 1),
        "embed_sdp": int(ends.zero == 3),
    }
    if any(s.cp > 1 for s in plan.strategies):
        document |= {"cp_sizes_enc": _joined(s.cp for s in layers), "vcp": ends.cp}
    return json.dumps(document, indent=4)


def save(plan: Plan, path: str | Path) -> None:
    Path(path).write_text(dumps(plan), encoding="utf-8")


def _strategy(
    ranks: int, degrees: tuple[int, int, int], kind: int, default: str, recomputed: int
) -> Strategy:
    """degrees: tp or Ulysses, whether it is Ulysses, cp. kind: 1 for ZeRO-3."""
    degree, ulysses, cp = degrees
    if degree < 1 or cp < 1 or ranks % (degree * cp):
        raise PlanError(
            f"plan: degree {degree} and cp {cp} do not divide the {ranks} GPUs of a stage"
        )
    dp = ranks // (degree * cp)
    sequence = degree if ulysses else 1
    # The default type is for data parallelism; ZeRO-3 alone also divides over Ulysses ranks.
    zero = 3 if kind else DEFAULT_ZERO[default] if dp > 1 else 0
    return Strategy(
        tp=1 if ulysses else degree,
        dp=dp,
        sequence_parallel=not ulysses and degree > 1,
        zero=zero if dp * sequence * cp > 1 else 0,
        recompute="full" if recomputed else "none",
        ulysses=sequence,
        cp=cp,
    )


def _stages(lengths: list[int], pp: int, count: int) -> tuple[Stage, ...]:
    if len(lengths) != pp or sum(lengths) != count or min(lengths) < 1:
        raise PlanError(
            f"plan.pp_division must be {pp} numbers from 1 on that add up to {count} layers, got "
            f"{_joined(lengths)}"
        )
    if pp == 1:
        return ()
    # Our stages count the embedding on the first and the head on the last.
    edges = [0, *(edge + 1 for edge in accumulate(lengths))]
    edges[-1] += 1
    return tuple(Stage(first, last) for first, last in pairwise(edges))


def _check(plan: Plan) -> None:
    problem = ""
    if len(plan.layers) < 3:
        problem = "a plan without layers between embedding and head"
    elif plan.strategies[0] != plan.strategies[-1]:
        problem = (
            f"different strategies of embedding ({plan.strategies[0]}) and head "
            f"({plan.strategies[-1]}); make them equal"
        )
    elif plan.strategies[0].recompute != "none":
        problem = "recomputation of embedding and head; drop it"
    elif plan.pp > 1 and plan.schedule not in SCHEDULES.values():
        problem = f"the schedule {plan.schedule}; use 1f1b or gpipe"
    if problem:
        raise UnsupportedError(f"Galvatron's plan format cannot hold {problem}")
    for name, strategy in zip(plan.layers, plan.strategies, strict=True):
        problem = _unheld(strategy)
        if problem:
            raise UnsupportedError(
                f"Galvatron's plan format cannot hold {problem} (layer {name!r}: {strategy})"
            )


def _unheld(strategy: Strategy) -> str:
    if strategy.zero == 1:
        return "ZeRO-1; use zero2"
    if strategy.ep > 1:
        return "expert parallelism"
    if strategy.recompute == "selective":
        return "selective recomputation; use recompute or none"
    if strategy.tp > 1 and strategy.ulysses > 1:
        return "tensor parallelism together with Ulysses; use one of them"
    if strategy.tp > 1 and not strategy.sequence_parallel:
        return f"tensor parallelism without sequence parallelism; write tp{strategy.tp}.sp"
    if strategy.dp == 1 and strategy.zero == 2:
        return "ZeRO-2 without data parallelism; use zero3 or zero0"
    return ""


def _default_type(plan: Plan) -> str:
    """The one type of all that are not ZeRO-3; ZeRO-2, Galvatron's own default, where free."""
    zeros = {s.zero for s in plan.strategies if s.zero != 3 and s.dp > 1}
    if zeros == {0, 2}:
        raise UnsupportedError(
            "Galvatron's plan format cannot hold zero0 and zero2 in one plan; use zero2 for both"
        )
    return "ddp" if zeros == {0} else "zero2"


def _numbers(
    fields: Fields, name: str, count: int | None = None, default: int | None = None
) -> list[int]:
    """Comma-separated whole numbers; ``default`` for every layer if the field is left out."""
    missing = None if default is None or count is None else _joined([default] * count)
    text = fields.take(name, str, missing)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise PlanError(f"plan.{name} must be whole numbers with commas between, got {text!r}")
    if count is not None and len(words) != count:
        raise PlanError(f"plan.{name} has {len(words)} entries, tp_sizes_enc has {count}")
    return [int(word) for word in words]


def _word(fields: Fields, name: str, known: dict[str, Any]) -> str:
    word: str = fields.take(name, str)
    if word not in known:
        raise PlanError(f"plan.{name} must be one of {', '.join(known)}, got {word!r}")
    return word


def _joined(numbers: Any) -> str:
    return ",".join(map(str, numbers))
