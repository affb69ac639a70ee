"""Sentences about two plans: which is faster, and what each difference in shape does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from galvatron_compile.plans import Plan
from galvatron_compile.prediction import (
    CAUSES,
    MEMORY_PARTS,
    GroupPrediction,
    Prediction,
    schedule_name,
    stage_noun,
)
from galvatron_compile.quantities import change, count, duration, percent, size, spans
from galvatron_compile.schedules import bubble_share
from galvatron_compile.strategy import Strategy

if TYPE_CHECKING:
    from galvatron_compile.comparison import Comparison

_SAME_TIME = 0.0005  # relative step times that count as equal
_WORTH_NAMING = 0.03  # of all that changed
_MOST_NAMED = 4
_SPLIT_STATES = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")


def verdict(comparison: Comparison) -> str:
    a, b = comparison.a, comparison.b
    one, two = comparison.predictions
    if a == b and a.predicted == b.predicted:
        return "The plans are the same."
    silent = [name for name, p in (("A", one), ("B", two)) if not p.step_ms]
    if silent or one.step_ms is None or two.step_ms is None:
        who = " and ".join(silent)
        return (
            f"{who} predict{'s' if len(silent) == 1 else ''} no step time, so only shapes are "
            "compared; galvatron-compile price predicts one."
        )
    if (a.global_batch_size, one.seq) != (b.global_batch_size, two.seq):
        return _by_rate(comparison, one.step_ms, two.step_ms)
    gain = 1 - two.step_ms / one.step_ms
    times = f"{duration(two.step_ms)} a step against {duration(one.step_ms)}"
    whose = _on_other_ranks(a, b)
    if abs(gain) < _SAME_TIME:
        text = f"A and B are equally fast{whose}: {times}."
    else:
        how = "faster" if gain > 0 else "slower"
        text = f"B is {percent(abs(gain))} {how}{whose}: {times}."
    causes = _named(one.causes, two.causes, CAUSES, duration)
    return f"{text} {_sentence(causes)}" if causes else text


def reasons(comparison: Comparison) -> tuple[str, ...]:
    found = [_pipeline(comparison), _cuts(comparison), *_strategies(comparison)]
    return tuple(text for text in [*found, _memory(comparison)] if text)


def _by_rate(comparison: Comparison, step_a_ms: float, step_b_ms: float) -> str:
    """The verdict for steps of different work: by sequences (or tokens) a second."""
    one, two = comparison.predictions
    work = [plan.global_batch_size * 1e3 for plan in (comparison.a, comparison.b)]
    unit = "sequences"
    if one.seq and two.seq:
        work, unit = [work[0] * one.seq, work[1] * two.seq], "tokens"
    rates = work[0] / step_a_ms, work[1] / step_b_ms
    gain = rates[1] / rates[0] - 1
    whose = _on_other_ranks(comparison.a, comparison.b)
    return (
        f"The steps do different work, so rates are compared: B trains {percent(abs(gain))} "
        f"{'more' if gain >= 0 else 'fewer'} {unit} a second{whose} ({count(round(rates[1]))} "
        f"against {count(round(rates[0]))})."
    )


def _pipeline(comparison: Comparison) -> str:
    """Pipeline degree, micro-batches and schedule, through the bubble that they leave."""
    a, b = comparison.a, comparison.b
    changes = []
    for name, before, after in (
        ("pp", str(a.pp), str(b.pp)),
        ("micro-batches", str(a.num_micro_batches), str(b.num_micro_batches)),
        ("schedule", _schedule(a), _schedule(b)),
    ):
        changes += [f"{name} {before} → {after}"] if before != after else []
    if not changes or a.pp == b.pp == 1:
        return ""
    idle = [percent(_idle_share(plan)) for plan in (a, b)]
    return (
        f"{', '.join(changes)}: equal stages would idle {idle[0]} of the step in A, {idle[1]} in B."
    )


def _schedule(plan: Plan) -> str:
    virtual = f" with {plan.virtual} stages a group" if plan.virtual > 1 else ""
    return f"{schedule_name(plan)}{virtual}" if plan.pp > 1 else "none"


def _idle_share(plan: Plan) -> float:
    """Of a balanced pipeline: fill and drain over the whole step; see schedules.bubble_share."""
    if plan.pp == 1:
        return 0.0
    lost = float(bubble_share(plan.schedule, plan.virtual)) * (plan.pp - 1)
    return lost / (plan.num_micro_batches + lost)


def _cuts(comparison: Comparison) -> str:
    """Stages of as many groups cut at other layers."""
    a, b = comparison.a, comparison.b
    if a.pp != b.pp or a.virtual != b.virtual or a.stages == b.stages:
        return ""
    slowest = [_slowest(plan, p) for plan, p in zip((a, b), comparison.predictions, strict=True)]
    text = "Stages are cut at other layers"
    return (
        f"{text}; the slowest is {slowest[0]} in A, {slowest[1]} in B."
        if all(slowest)
        else text + "."
    )


def _slowest(plan: Plan, prediction: Prediction) -> str:
    times = [
        group.forward_ms + group.backward_ms
        for group in prediction.groups
        if group.forward_ms is not None and group.backward_ms is not None
    ]
    if len(times) != plan.pp:
        return ""
    index = times.index(max(times))
    layers = count(len(plan.group_layers(index)), "layer")
    return f"{stage_noun(plan)} {index} ({layers}, {duration(times[index])} a micro-batch)"


def _strategies(comparison: Comparison) -> list[str]:
    """The changes of most layers, each with what its parts do."""
    layers = defaultdict[str, list[int]](list)
    for (before, after), pairs in comparison.changed_strategies.items():
        layers["; ".join(_effects(before, after))] += [i for i, _ in pairs]
    changed = sorted(layers.items(), key=lambda item: -len(item[1]))
    texts = [
        f"Layer{'s' if len(where) > 1 else ''} {spans(sorted(where))}: {effects}."
        for effects, where in changed[:_MOST_NAMED]
    ]
    left = sum(len(where) for _, where in changed[_MOST_NAMED:])
    return [*texts, f"{count(left, 'more layer')} differ; the table has them."] if left else texts


def _effects(before: Strategy, after: Strategy) -> list[str]:
    """What differs between strategies, and what follows."""
    more = after.tp > before.tp
    found = []
    if before.tp != after.tp:
        effect = (
            "more communication in every layer, fewer bytes a rank"
            if more
            else "less communication in every layer, more bytes a rank"
        )
        found.append(f"tp {before.tp} → {after.tp}, {effect}")
    for name in ("ulysses", "cp", "ep", "dp"):
        degrees = getattr(before, name), getattr(after, name)
        found += [f"{name} {degrees[0]} → {degrees[1]}"] if degrees[0] != degrees[1] else []
    if before.sequence_parallel != after.sequence_parallel:
        on = after.sequence_parallel
        effect = "divided over" if on else "repeated on"
        found.append(
            f"sequence parallel {'on' if on else 'off'}, activations {effect} the tp ranks"
        )
    if before.zero != after.zero:
        found.append(f"ZeRO-{before.zero} → ZeRO-{after.zero}, {_zero_effect(before, after)}")
    if before.recompute != after.recompute:
        order = ("none", "selective", "full")
        grows = order.index(after.recompute) > order.index(before.recompute)
        effect = (
            "more work, fewer activations kept" if grows else "less work, more activations kept"
        )
        found.append(f"recompute {before.recompute} → {after.recompute}, {effect}")
    return found


def _zero_effect(before: Strategy, after: Strategy) -> str:
    if max(before.zero, after.zero) < 3:
        return "states divided further" if after.zero > before.zero else "states divided less"
    if after.zero == 3:
        return "parameters divided, but gathered for every use"
    return "parameters whole, so gathered no more"


def _memory(comparison: Comparison) -> str:
    one, two = (prediction.groups for prediction in comparison.predictions)
    if not one or not two or not all(group.parts for group in (*one, *two)):
        return ""
    if len(one) == len(two):
        pairs = list(zip(one, two, strict=True))
        index = max(
            range(len(pairs)), key=lambda i: abs(pairs[i][1].total_bytes - pairs[i][0].total_bytes)
        )
        before, after = pairs[index]
        where = f" on {comparison.noun} {index}" if len(one) > 1 else " a rank"
    else:
        before, after = (max(g, key=lambda group: group.total_bytes) for g in (one, two))
        where = (
            f" where most is needed ({size(after.total_bytes)} against {size(before.total_bytes)})"
        )
    difference = after.total_bytes - before.total_bytes
    if abs(difference) < 0.001 * before.total_bytes:
        return ""
    parts = _named(*_comparable(before, after), MEMORY_PARTS, size)
    how = "more" if difference > 0 else "less"
    detail = f": {', '.join(parts)}" if parts else ""
    return f"B needs {size(abs(difference))} {how}{where}{detail}."


def _comparable(
    before: GroupPrediction, after: GroupPrediction
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Their memory by parts, with states joined if one of the two does not divide them."""
    both = before.parts, after.parts
    if not any("state_bytes" in parts for parts in both):
        return both
    joined = []
    for parts in both:
        states = sum(parts.get(key, 0.0) for key in (*_SPLIT_STATES, "state_bytes"))
        rest = {key: value for key, value in parts.items() if key not in _SPLIT_STATES}
        joined.append({**rest, "state_bytes": states})
    return joined[0], joined[1]


def _named(
    before: Mapping[str, float],
    after: Mapping[str, float],
    names: Mapping[str, str],
    shown: Callable[[float], str],
) -> list[str]:
    """What changed most, greatest first: ``saved activations −5.9 GiB``."""
    if not before or not after:
        return []
    changes = {key: after.get(key, 0.0) - before.get(key, 0.0) for key in names}
    whole = sum(abs(value) for value in changes.values())
    kept = [key for key in names if abs(changes[key]) > _WORTH_NAMING * whole]
    kept.sort(key=lambda key: -abs(changes[key]))
    return [f"{names[key]} {change(shown(changes[key]))}" for key in kept[:_MOST_NAMED]]


def _sentence(parts: Sequence[str]) -> str:
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _on_other_ranks(a: Plan, b: Plan) -> str:
    if a.world_size == b.world_size:
        return ""
    return f" on {count(b.world_size, 'rank')} instead of {count(a.world_size)}"
