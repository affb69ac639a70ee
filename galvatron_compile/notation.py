"""Plans in one line of text.

    plan      := clause (";" clause)*                 a later clause overrides an earlier one
    clause    := [selectors ":"] strategy             without selectors: all layers
               | "micro" "=" integer                  number of micro-batches, 1 if left out
               | "pp" "=" integer                     pipeline stages of nearly equally many layers
               | "stages" "=" integer ("," integer)*  … or of as many layers as given
               | "schedule" "=" ("gpipe" | "1f1b" | "interleaved" | "zero-bubble")
               | "virtual" "=" integer                stages that each rank runs, with interleaved
    selectors := selector ("," selector)*
    selector  := "all" | "embedding" | "blocks" | "norm" | "head"
               | integer | integer "-" integer        layer indices from 0, both ends included
               | layer name
    strategy  := word ("." word)*                     all of the layer's strategy, nothing inherited
    word      := "tp" integer | "dp" integer          degrees; dp left out means ranks / tp
               | "sp"                                 sequence parallel, with tp
               | "zero" ("0" | "1" | "2" | "3")       ZeRO stage
               | "ulysses" integer | "cp" integer     sequence over ranks, by heads or in a ring
               | "ep" integer                         expert parallel, over the data ranks
               | "recompute" | "selective"            activation recomputation, full or selective

Examples: ``tp2.dp2.zero3``; ``all: dp4.zero2; 0-3: dp4.zero2.recompute``;
``blocks: tp2.sp.dp2; embedding: dp4; norm, head: dp4; micro=2``; ``tp8.sp.dp4.zero1; pp=4;
micro=32``. Spaces do not matter. Degrees are those of one pipeline stage.

*blocks* are the layers whose names count up (``h.0``, ``h.1``, …; the largest such family),
*embedding* the layers before them, *head* those after them except *norm*, which is the first of
several. Numbers are always indices and *all* is always all; for the other words a layer that is
itself called like that is meant rather than its place.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NoReturn

from galvatron_compile.errors import NotationError, PlanError
from galvatron_compile.plans import SCHEDULES, Plan, Stage
from galvatron_compile.strategy import Recompute, Strategy

ROLES = ("all", "embedding", "blocks", "norm", "head")
DEGREES = ("tp", "dp", "ulysses", "cp", "ep")
WORDS = (
    *(f"{name}2" for name in DEGREES),
    *("sp", "zero0", "zero1", "zero2", "zero3", "recompute", "selective"),
)
SETTINGS = ("micro", "pp", "stages", "schedule", "virtual")


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

    Raises NotationError with the position, what was expected and the nearest word; PlanError if
    the batch does not split as the plan asks.
    """
    clauses = Span(text, 0, text).split(";")
    for clause in clauses:
        if not clause.text:
            clause.fail("expected a clause such as 'tp2.dp2.zero3' or 'micro=4', got nothing")
    settings = _settings([clause for clause in clauses if "=" in clause.text])
    stages = _stages(settings, len(layer_names))
    virtual = _integer(settings["virtual"]) if "virtual" in settings else 1
    pp = max(1, len(stages)) // virtual
    if pp < 1 or world_size % pp:
        where = settings.get("stages", settings.get("pp"))
        assert where is not None
        where.fail(f"{pp} stages do not divide {world_size} ranks; use a divisor")
    strategies: list[Strategy | None] = [None] * len(layer_names)
    for clause in clauses:
        if "=" in clause.text:
            continue
        *selectors, words = clause.split(":")
        if len(selectors) > 1:
            words.fail("expected one ':' between layers and strategy; put ';' between clauses")
        strategy = _strategy(words, world_size // pp)
        for index in _select(selectors[0], layer_names) if selectors else range(len(layer_names)):
            strategies[index] = strategy
    missing = [index for index, strategy in enumerate(strategies) if strategy is None]
    if missing:
        first = missing[0]
        raise NotationError(
            f"no strategy for layers {_ranges(missing)} ({layer_names[first]!r} is the first); "
            f"begin with a clause for all layers, for example "
            f"'all: dp{world_size // pp}; {text.strip()}'"
        )
    schedule = settings["schedule"].text.lower() if "schedule" in settings else "1f1b"
    if schedule not in SCHEDULES:
        settings["schedule"].fail(f"expected a schedule, got {schedule!r}", SCHEDULES)
    return Plan(
        model=model,
        world_size=world_size,
        global_batch_size=global_batch_size,
        num_micro_batches=_integer(settings["micro"]) if "micro" in settings else 1,
        layers=tuple(layer_names),
        strategies=tuple(strategy for strategy in strategies if strategy is not None),
        stages=stages,
        schedule=schedule,
        virtual=virtual,
    )


def _settings(clauses: Sequence[Span]) -> dict[str, Span]:
    """Clauses ``name=value`` by name."""
    found: dict[str, Span] = {}
    for clause in clauses:
        name, *values = clause.split("=")
        key = name.text.lower()
        if key not in SETTINGS:
            name.fail(f"expected one of {', '.join(SETTINGS)}, got {name.text!r}", SETTINGS)
        if key in found:
            clause.fail(f"{key} is given twice; keep one")
        if len(values) != 1:
            values[0].fail(f"expected one value after {key}=")
        found[key] = values[0]
    return found


def _stages(settings: Mapping[str, Span], num_layers: int) -> tuple[Stage, ...]:
    if "stages" in settings and "pp" in settings:
        settings["pp"].fail("pp and stages are both given; keep one")
    if "stages" in settings:
        lengths = [_integer(part) for part in settings["stages"].split(",")]
        if sum(lengths) != num_layers:
            settings["stages"].fail(
                f"the stages have {sum(lengths)} layers, the model {num_layers}"
            )
    elif "pp" in settings:
        virtual = _integer(settings["virtual"]) if "virtual" in settings else 1
        number = _integer(settings["pp"]) * virtual
        if number > num_layers:
            settings["pp"].fail(f"{num_layers} layers do not fill {number} stages; lower pp")
        lengths = [
            (i + 1) * num_layers // number - i * num_layers // number for i in range(number)
        ]
    else:
        return ()
    edges = [0, *accumulate(lengths)]
    return tuple(Stage(first, last) for first, last in pairwise(edges)) if len(edges) > 2 else ()


def _integer(value: Span) -> int:
    if not re.fullmatch(r"[1-9][0-9]*", value.text):
        value.fail(f"expected a whole number from 1 on, got {value.text!r}")
    return int(value.text)


def _strategy(words: Span, num_ranks: int) -> Strategy:
    """num_ranks: of one pipeline stage."""
    values: dict[str, int] = {}
    for word in words.split("."):
        name, value = _word(word)
        if name in values or {name, *values} >= {"recompute", "selective"}:
            word.fail(f"{name} is given twice in one strategy; put ';' between clauses")
        values[name] = value
    others = [values.get(name, 1) for name in ("tp", "ulysses", "cp")]
    product = math.prod(others)
    if "dp" not in values and num_ranks % product:
        words.fail(f"tp{others[0]} does not divide {num_ranks} ranks; use a divisor of {num_ranks}"
                   if product == others[0] else
                   f"{words.text} does not divide {num_ranks} ranks; lower a degree")
    dp = values.get("dp", num_ranks // product)
    if product * dp != num_ranks:
        fitting = f"write dp{num_ranks // product}" if num_ranks % product == 0 else "change tp"
        words.fail(
            f"{words.text} uses {product * dp} ranks, but there are {num_ranks}; {fitting} or "
            "leave dp out"
        )
    recompute: Recompute = "full" if "recompute" in values else "none"
    try:
        return Strategy(
            others[0], dp, "sp" in values, values.get("zero", 0),
            "selective" if "selective" in values else recompute,
            others[1], others[2], values.get("ep", 1),
        )  # fmt: skip
    except PlanError as error:
        words.fail(str(error))


def _word(word: Span) -> tuple[str, int]:
    text = word.text.lower()
    match = re.fullmatch(r"([a-z]+?)([0-9]*)", text)
    name, digits = (match[1], match[2]) if match else ("", "")
    if name in ("sp", "recompute", "selective") and not digits:
        return name, 1
    if name in DEGREES and digits and int(digits) > 0:
        return name, int(digits)
    if name == "zero" and digits in ("0", "1", "2", "3"):
        return name, int(digits)
    if name in DEGREES:
        word.fail(f"{name} needs a degree of at least 1, for example {name}2, got {word.text!r}")
    if name == "pp":
        word.fail("the pipeline is a clause of its own: write '; pp=2' after the strategies")
    got = repr(word.text) if word.text else "nothing"
    word.fail(
        "expected a word of a strategy (tp2, dp2, ulysses2, cp2, ep2, sp, zero0 to zero3, "
        f"recompute, selective), got {got}",
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
    """The plan in the compact notation: the inverse of :func:`parse`."""
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
    if plan.num_stages > 1:
        lengths = ",".join(str(stage.last - stage.first) for stage in plan.stages)
        clauses.append(f"stages={lengths}")
        clauses += [f"schedule={plan.schedule}"] if plan.schedule != "1f1b" else []
        clauses += [f"virtual={plan.virtual}"] if plan.virtual > 1 else []
    return "; ".join(clauses)


def _ranges(indices: Sequence[int]) -> str:
    """``[0, 1, 2, 7]`` as ``0-2,7``."""
    parts = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(parts)
