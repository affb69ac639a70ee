"""Two plans of one model side by side: what differs, and why it matters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from galvatron_compile import comparison_reasons as reasons
from galvatron_compile.cluster_text import Section
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import CAUSES, Prediction, schedule_name, stage_noun
from galvatron_compile.quantities import GIB, MINUS, count, decimals, duration, size, spans
from galvatron_compile.strategy import Strategy
from galvatron_compile.text import columns

_ALIKE = 0.9  # share of layer names in common from which plans are taken to be of one model
_SAME = "="
_MANY_GROUPS = 16
_STRATEGIES = "Strategies that differ"


@dataclass(frozen=True)
class Comparison:
    """Plan B against plan A.

    Raises PlanError if the plans are of different models: their fingerprints differ, and so do the
    names of more than a tenth of their layers.
    """

    a: Plan
    b: Plan

    def __post_init__(self) -> None:
        fingerprints = self.a.model, self.b.model
        if all(fingerprints) and fingerprints[0] == fingerprints[1]:
            return
        shared, most = len(self.matched), max(len(self.a.layers), len(self.b.layers))
        if shared < _ALIKE * most:
            raise PlanError(
                f"the plans are of different models: A has {count(len(self.a.layers), 'layer')} "
                f"({self.a.layers[0]!r} to {self.a.layers[-1]!r}), B {len(self.b.layers)} "
                f"({self.b.layers[0]!r} to {self.b.layers[-1]!r}), and {shared} names are in both; "
                "compare plans of one model"
            )

    @cached_property
    def matched(self) -> tuple[tuple[int, int], ...]:
        """Layers of A and B of one name, as pairs of indices; by place where a name repeats."""
        places = defaultdict[str, list[int]](list)
        for index, name in enumerate(self.b.layers):
            places[name].append(index)
        pairs = []
        for index, name in enumerate(self.a.layers):
            if places[name]:
                pairs.append((index, places[name].pop(0)))
        return tuple(pairs)

    @property
    def noun(self) -> str:
        """What both plans' pipeline groups may be called."""
        return stage_noun(self.a if self.a.virtual > 1 else self.b)

    @cached_property
    def predictions(self) -> tuple[Prediction, Prediction]:
        return Prediction.of(self.a), Prediction.of(self.b)

    @cached_property
    def changed_strategies(self) -> Mapping[tuple[Strategy, Strategy], Sequence[tuple[int, int]]]:
        """Layers (indices in A and B) by their strategies in A and B, where these differ."""
        found = defaultdict[tuple[Strategy, Strategy], list[tuple[int, int]]](list)
        for i, j in self.matched:
            pair = self.a.strategies[i], self.b.strategies[j]
            if pair[0] != pair[1]:
                found[pair].append((i, j))
        return dict(found)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """A line for each plan."""
        plans = zip("AB", (self.a, self.b), self.predictions, strict=True)
        return tuple(f"{name}: {_head(plan, prediction)}" for name, plan, prediction in plans)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What to know before reading on: how layers were matched, what numbers rest on."""
        notes = []
        if self.a.model and self.b.model and self.a.model != self.b.model:
            notes.append(
                f"The plans carry different fingerprints ({self.a.model} and {self.b.model}), but "
                f"name {count(len(self.matched), 'layer')} alike; these were compared."
            )
        elif len(self.matched) < max(len(self.a.layers), len(self.b.layers)):
            notes.append(
                f"A has {len(self.a.layers)} layers and B {len(self.b.layers)}; the "
                f"{len(self.matched)} of the same name were compared."
            )
        one, two = self.predictions
        if one.hardware and two.hardware and one.hardware != two.hardware:
            notes.append(
                f"The times are of different hardware: A's of {one.hardware}, B's of "
                f"{two.hardware}."
            )
        for name, prediction in zip("AB", self.predictions, strict=True):
            need, limit = prediction.memory_bytes, prediction.memory_limit_bytes
            if need is not None and limit is not None and need > limit:
                notes.append(f"{name} does not fit: it needs {size(need)} of {size(limit)} a rank.")
        for warning in dict.fromkeys((*one.warnings, *two.warnings)):
            whose = [name for name, p in (("A", one), ("B", two)) if warning in p.warnings]
            notes.append(f"{' and '.join(whose)}: {warning}")
        return tuple(notes)

    @cached_property
    def verdict(self) -> str:
        """One sentence: which is faster, by how much, and through what."""
        return reasons.verdict(self)

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """What the differences in shape do: a sentence each, none for what is the same."""
        return reasons.reasons(self)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Tables: what differs in shape, strategies, time by cause, memory."""
        found = (_shape(self), _strategies(self), _causes(self), _memory(self))
        return tuple(section for section in found if section.rows)

    @staticmethod
    def num_text_columns(section: Section) -> int:
        """How many of a table's first columns are texts; the others are numbers, flush right."""
        return 3 if section.title == _STRATEGIES else 1

    def __str__(self) -> str:
        lines = [*self.heads, ""]
        lines += [f"note: {note}" for note in self.notes] + [""] * bool(self.notes)
        lines += [self.verdict, *(f"  - {reason}" for reason in self.reasons)]
        for section in self.sections:
            left = self.num_text_columns(section)
            lines += ["", section.title, columns(section.columns, section.rows, left=left)]
        return "\n".join(lines)


def _head(plan: Plan, prediction: Prediction) -> str:
    parts = [count(plan.world_size, "rank")]
    parts += [f"pp {plan.pp}, {schedule_name(plan)}"] if plan.pp > 1 else []
    parts.append(count(plan.num_micro_batches, "micro-batch", "micro-batches"))
    if prediction.step_ms is not None:
        parts.append(f"{duration(prediction.step_ms)} a step")
    if prediction.memory_bytes is not None:
        limit = prediction.memory_limit_bytes
        of_limit = f" of {size(limit)}" if limit else ""
        parts.append(f"{size(prediction.memory_bytes)}{of_limit} a rank")
    return ", ".join(parts)


def _shape(comparison: Comparison) -> Section:
    """Settings of the whole plan that differ."""
    cells = [_settings(p) for p in (comparison.a, comparison.b)]
    rows = tuple((key, cells[0][key], cells[1][key]) for key in cells[0])
    return Section("Shape", ("", "A", "B"), tuple(row for row in rows if row[1] != row[2]))


def _settings(plan: Plan) -> dict[str, str]:
    lengths = [len(plan.group_layers(group)) for group in range(plan.pp)]
    shown = ",".join(map(str, lengths))
    if len(lengths) > _MANY_GROUPS:
        shown = f"{min(lengths)} to {max(lengths)}"
    return {
        "ranks": count(plan.world_size),
        "global batch": count(plan.global_batch_size),
        "micro-batches": count(plan.num_micro_batches),
        "pipeline groups (pp)": str(plan.pp),
        "schedule": schedule_name(plan) if plan.pp > 1 else "–",
        "stages a group": str(plan.virtual),
        "layers a group": shown,
    }


def _strategies(comparison: Comparison) -> Section:
    """Layers whose strategy differs, with what that does to their time and memory."""
    one, two = (prediction.layers for prediction in comparison.predictions)
    priced = bool(one and two)
    rows = []
    for (before, after), pairs in comparison.changed_strategies.items():
        row = [spans(i for i, _ in pairs), str(before), str(after)]
        if priced:
            for key, scale in (("step_ms", 1.0), ("state_bytes", GIB), ("saved_bytes", GIB)):
                sums = [sum(one[i].get(key, 0.0) for i, _ in pairs)]
                sums.append(sum(two[j].get(key, 0.0) for _, j in pairs))
                row.append(_change(sums[0] / scale, sums[1] / scale))
        rows.append(tuple(row))
    heads = ("step ms", "states GiB", "saved GiB a micro-batch") if priced else ()
    return Section(_STRATEGIES, ("layers", "A", "B", *heads), tuple(rows))


def _causes(comparison: Comparison) -> Section:
    one, two = (prediction.causes for prediction in comparison.predictions)
    if not one or not two:
        return Section("Time by cause (ms)", (), ())
    pairs = [(CAUSES[k], one.get(k, 0.0), two.get(k, 0.0)) for k in CAUSES if k in one or k in two]
    pairs.append(("the whole step", sum(one.values()), sum(two.values())))
    return _numbers("Time by cause (ms)", "cause", pairs)


def _memory(comparison: Comparison) -> Section:
    one, two = comparison.predictions
    noun = comparison.noun
    if not one.groups or len(one.groups) != len(two.groups):
        return Section("", (), ())
    pairs = [
        (f"{noun} {index}" if comparison.a.pp > 1 else "every rank", before, after)
        for index, (before, after) in enumerate(
            (x.total_bytes / GIB, y.total_bytes / GIB)
            for x, y in zip(one.groups, two.groups, strict=True)
        )
    ]
    return _numbers("Memory of a rank (GiB)", noun, pairs)


def _numbers(title: str, noun: str, pairs: Sequence[tuple[str, float, float]]) -> Section:
    """A table of numbers and their differences; without rows if nothing differs."""
    places = decimals(value for _, *values in pairs for value in values)
    rows = [
        (name, f"{a:,.{places}f}", f"{b:,.{places}f}", _change(a, b, places))
        for name, a, b in pairs
    ]
    same = all(row[-1] == _SAME for row in rows)
    return Section(title, (noun, "A", "B", f"B {MINUS} A"), () if same else tuple(rows))


def _change(before: float, after: float, places: int | None = None) -> str:
    places = decimals((before, after)) if places is None else places
    text = f"{after - before:+,.{places}f}"
    return text.replace("-", MINUS) if any(digit in text for digit in "123456789") else _SAME
