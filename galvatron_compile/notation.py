"""Plans in one line of text.

    plan      := clause (";" clause)*                 a later clause overrides an earlier one
    clause    := [selectors ":"] strategy             without selectors: all layers
               | "micro" "=" integer                  number of micro-batches, 1 if left out
    selectors := selector ("," selector)*
    selector  := "all" | "embedding" | "blocks" | "norm" | "head"
               | integer | integer "-" integer        layer indices from 0, both ends included
               | layer name
    strategy  := word ("." word)*                     all of the layer's strategy, nothing inherited
    word      := "tp" integer | "dp" integer          degrees; dp left out means ranks / tp
               | "sp"                                 sequence parallel, with tp
               | "zero" ("0" | "1" | "2" | "3")       ZeRO stage
               | "recompute"                          activation recomputation

Examples: ``tp2.dp2.zero3``; ``all: dp4.zero2; 0-3: dp4.zero2.recompute``;
``blocks: tp2.sp.dp2; embedding: dp4; norm, head: dp4; micro=2``. Spaces do not matter.

*blocks* are the layers whose names count up (``h.0``, ``h.1``, …; the largest such family),
*embedding* the layers before them, *head* those after them except *norm*, which is the first of
several. Numbers are always indices and *all* is always all; for the other words a layer that is
itself called like that is meant rather than its place. ``pp``, ``cp``,
``ep`` and ``ulysses`` are understood, but raise UnsupportedError: this version does not run them.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from galvatron_compile.errors import NotationError, PlanError, UnsupportedError
from galvatron_compile.plan import Plan
from galvatron_compile.strategy import Strategy

ROLES = ("all", "embedding", "blocks", "norm", "head")
WORDS = ("tp2", "dp2", "sp", "zero0", "zero1", "zero2", "zero3", "recompute")
LATER = {
    "pp": "pipeline parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
    "ulysses": "Ulysses sequence parallel",
}


@dataclass(frozen=True)
class Span:
    """A piece of the text, without the blanks around it, and where it starts."""

    whole: str
    start: int
    text: str

    def split(self, separator: str) -> list[Span]:
        spans, start = [], self.start
        for piece in self.text.split(separator):
            blanks = len(piece) - len(piece.lstrip())
            spans.append(Span(self.whole, start + blanks, piece.strip()))
            start += len(piece) + len(separator)
        return spans

    def show(self, message: str) -> str:
        """The message, the text, and a caret under the place."""
        line = self.whole.replace("\n", " ").replace("\t", " ")
        return f"{message}\n  {line}\n  {' ' * self.start}^"

    def fail(self, message: str, candidates: Sequence[str] = ()) -> NoReturn:
        near = difflib.get_close_matches(self.text.lower(), candidates, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise NotationError(self.show(f"{message}{hint}"))


def parse(
    text: str,
    layer_names: Sequence[str],
    world_size: int,
    global_batch_size: int,
    model: str = "",
) -> Plan:
    """Read the compact notation; see the module's docstring for the grammar.

    Raises NotationError with the position, what was expected and the nearest word;
    UnsupportedError for words that this version does not run; PlanError if the batch does not
    split as the plan asks.
    """
    strategies: list[Strategy | None] = [None] * len(layer_names)
    num_micro_batches: int | None = None
    whole = Span(text, 0, text)
    for clause in whole.split(";"):
        if not clause.text:
            clause.fail("expected a clause such as 'tp2.dp2.zero3' or 'micro=4', got nothing")
        if "=" in clause.text:
            if num_micro_batches is not None:
                clause.fail("micro is given twice; keep one")
            num_micro_batches = _micro_batches(clause)
            continue
        *selectors, words = clause.split(":")
        if len(selectors) > 1:
            words.fail("expected one ':' between layers and strategy; put ';' between clauses")
        strategy = _strategy(words, world_size)
        for index in _select(selectors[0], layer_names) if selectors else range(len(layer_names)):
            strategies[index] = strategy
    missing = [index for index, strategy in enumerate(strategies) if strategy is None]
    if missing:
        first = missing[0]
        raise NotationError(
            f"no strategy for layers {_ranges(missing)} ({layer_names[first]!r} is the first); "
            f"begin with a clause for all layers, for example 'all: dp{world_size}; {text.strip()}'"
        )
    return Plan(
        model=model,
        world_size=world_size,
        global_batch_size=global_batch_size,
        num_micro_batches=num_micro_batches or 1,
        layers=tuple(layer_names),
        strategies=tuple(strategy for strategy in strategies if strategy is not None),
    )


def _micro_batches(clause: Span) -> int:
    name, *values = clause.split("=")
    if name.text.lower() != "micro":
        name.fail(f"expected 'micro=' and a number, got {name.text!r}", ["micro"])
    if len(values) != 1 or not re.fullmatch(r"[1-9][0-9]*", values[0].text):
        values[0].fail(f"expected a whole number from 1 on, got {values[0].text!r}")
    return int(values[0].text)


def _strategy(words: Span, world_size: int) -> Strategy:
    values: dict[str, int] = {}
    for word in words.split("."):
        name, value = _word(word)
        if name in values:
            word.fail(f"{name} is given twice in one strategy; put ';' between clauses")
        values[name] = value
    tp = values.get("tp", 1)
    if "dp" not in values and world_size % tp:
        words.fail(f"tp{tp} does not divide {world_size} ranks; use a divisor of {world_size}")
    dp = values.get("dp", world_size // tp)
    if tp * dp != world_size:
        fitting = f"write dp{world_size // tp}" if world_size % tp == 0 else "change tp"
        words.fail(
            f"{words.text} uses {tp * dp} ranks, but there are {world_size}; {fitting} or leave "
            "dp out"
        )
    try:
        return Strategy(tp, dp, "sp" in values, values.get("zero", 0), "recompute" in values)
    except PlanError as error:
        words.fail(str(error))


def _word(word: Span) -> tuple[str, int]:
    text = word.text.lower()
    match = re.fullmatch(r"([a-z]+?)([0-9]*)", text)
    name, digits = (match[1], match[2]) if match else ("", "")
    if name in LATER:
        without = f"leave {word.text!r} out"
        raise UnsupportedError(
            word.show(f"{LATER[name]} is not executed by this version yet; {without}")
        )
    if name in ("sp", "recompute") and not digits:
        return name, 1
    if name in ("tp", "dp") and digits and int(digits) > 0:
        return name, int(digits)
    if name == "zero" and digits in ("0", "1", "2", "3"):
        return name, int(digits)
    if name in ("tp", "dp"):
        word.fail(f"{name} needs a degree of at least 1, for example {name}2, got {word.text!r}")
    got = repr(word.text) if word.text else "nothing"
    word.fail(
        f"expected a word of a strategy (tp2, dp2, sp, zero0 to zero3, recompute), got {got}",
        WORDS,
    )


def _select(selectors: Span, layer_names: Sequence[str]) -> list[int]:
    roles = layer_roles(layer_names)
    return [i for part in selectors.split(",") for i in _selector(part, layer_names, roles)]


def _selector(
    part: Span, layer_names: Sequence[str], roles: Mapping[str, Sequence[int]]
) -> Sequence[int]:
    match = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", part.text)
    if match:
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            part.fail(f"range {part.text} runs backwards; write {last}-{first}")
        if last >= len(layer_names):
            part.fail(f"layer {last} does not exist; layers are 0-{len(layer_names) - 1}")
        return range(first, last + 1)
    role = part.text.lower()
    if role != "all" and part.text in layer_names:
        return [index for index, name in enumerate(layer_names) if name == part.text]
    if role in ROLES:
        if not roles[role]:
            part.fail(f"this model has no layers known as {role!r}; use indices or layer names")
        return roles[role]
    got = repr(part.text) if part.text else "nothing"
    part.fail(
        f"expected layers (all, embedding, blocks, norm, head, 0-{len(layer_names) - 1} or a "
        f"layer name), got {got}",
        [*ROLES, *layer_names],
    )


def layer_roles(layer_names: Sequence[str]) -> dict[str, Sequence[int]]:
    """Layer indices of every word that selects layers by their place; see the module docstring."""
    families = defaultdict[str, list[int]](list)
    for index, name in enumerate(layer_names):
        if re.search(r"[0-9]", name):
            families[re.sub(r"[0-9]+", "#", name)].append(index)
    blocks = max(families.values(), key=len, default=[])
    before = list(range(blocks[0])) if blocks else []
    after = list(range(blocks[-1] + 1, len(layer_names))) if blocks else []
    norm, head = (after[:1], after[1:]) if len(after) > 1 else ([], after)
    everything = range(len(layer_names))
    return {"all": everything, "embedding": before, "blocks": blocks, "norm": norm, "head": head}


def format(plan: Plan) -> str:
    """The plan in the compact notation: the inverse of :func:`parse`, for plans of one stage."""
    if plan.num_stages > 1:
        raise UnsupportedError(
            f"the notation has no word for the {plan.num_stages} stages of this plan; use to_json"
        )
    # Indices, since a layer's name may contain anything.
    usual = Counter(plan.strategies).most_common(1)[0][0]
    others = defaultdict[Strategy, list[int]](list)
    for index, strategy in enumerate(plan.strategies):
        if strategy != usual:
            others[strategy].append(index)
    clauses = [f"all: {usual}" if others else str(usual)]
    clauses += [f"{_ranges(indices)}: {strategy}" for strategy, indices in others.items()]
    if plan.num_micro_batches > 1:
        clauses.append(f"micro={plan.num_micro_batches}")
    return "; ".join(clauses)


def _ranges(indices: Sequence[int]) -> str:
    """``[0, 1, 2, 7]`` as ``0-2,7``."""
    parts = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(parts)
