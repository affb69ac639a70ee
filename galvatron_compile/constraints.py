"""What a caller fixes or forbids in a search, and the text that says so.

    constraints := constraint (";" constraint)*
    constraint  := name ("=" | "!=") value ("," value)*  |  name ("<=" | ">=") integer
                 | "together" "=" integer "-" integer    layers that stay in one stage

Names: ``pp``, ``micro``, ``schedule``, ``virtual``, ``tp``, ``sp`` (yes, no), ``ulysses``, ``cp``,
``ep``, ``dp``, ``zero``, ``recompute`` (none, selective, full). Examples: ``pp=4``; ``zero!=3``;
``tp<=8; recompute!=full``; ``together=0-3``.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from galvatron_compile.errors import PlanError
from galvatron_compile.plans import SCHEDULES
from galvatron_compile.strategy import RECOMPUTE, Strategy

NUMBERS = ("pp", "micro", "virtual", "tp", "ulysses", "cp", "ep", "dp", "zero")
WORDS = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "sp": ("yes", "no")}
NAMES = (*NUMBERS, *WORDS, "together")

_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Rule:
    """One constraint on one name; ``values`` of which any may hold for "=", none for "!="."""

    name: str
    operator: str
    values: tuple[int | str, ...]

    def allows(self, value: int | str) -> bool:
        if self.operator == "=":
            return value in self.values
        if self.operator == "!=":
            return value not in self.values
        return _OPERATORS[self.operator](value, self.values[0])  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{','.join(map(str, self.values))}"


@dataclass(frozen=True)
class Constraints:
    """rules: all must hold. together: (first, last) layers, both included, of one stage each."""

    rules: tuple[Rule, ...] = ()
    together: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def parse(text: str) -> Constraints:
        """PlanError for what does not parse, with the nearest name and an example."""
        rules: list[Rule] = []
        together: list[tuple[int, int]] = []
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            match = re.fullmatch(r"([A-Za-z]+)\s*(=|!=|<=|>=)\s*(.+)", part)
            if not match:
                raise PlanError(
                    f"constraint {part!r} is not understood; write for example pp=4, tp<=8, "
                    "zero!=3, recompute=none,selective or together=0-3"
                )
            name = match[1].lower()
            if name not in NAMES:
                near = difflib.get_close_matches(name, NAMES, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PlanError(
                    f"constraint {part!r}: {name!r} is not one of {', '.join(NAMES)}{hint}"
                )
            if name == "together":
                together.append(_range(part, match[2], match[3]))
            else:
                rules.append(_rule(part, name, match[2], match[3]))
        return Constraints(tuple(rules), tuple(together))

    def allows(self, name: str, value: int | str) -> bool:
        return all(rule.allows(value) for rule in self.rules if rule.name == name)

    def names(self, name: str, value: int) -> bool:
        """Whether a rule asks for this very value."""
        return any(r.name == name and r.operator == "=" and value in r.values for r in self.rules)

    def choose(self, name: str, values: Collection[int]) -> list[int]:
        """Those of ``values`` that the rules allow, ascending."""
        return sorted(value for value in values if self.allows(name, value))

    def allows_strategy(self, strategy: Strategy) -> bool:
        degrees = {name: getattr(strategy, name) for name in ("tp", "ulysses", "cp", "ep", "dp")}
        words = {
            "recompute": strategy.recompute,
            "sp": "yes" if strategy.sequence_parallel else "no",
        }
        if not all(self.allows(name, value) for name, value in {**degrees, **words}.items()):
            return False
        # One data rank has nothing to shard: every ZeRO stage is stage 0 there.
        return strategy.data_ranks == 1 or self.allows("zero", strategy.zero)

    def allows_cut(self, layer: int) -> bool:
        """Whether a stage may end with ``layer``."""
        return not any(first <= layer < last for first, last in self.together)

    def check(self, num_layers: int) -> None:
        """Raise PlanError for ranges of layers that the model does not have."""
        for first, last in self.together:
            if last >= num_layers:
                raise PlanError(
                    f"together={first}-{last}: the model has layers 0-{num_layers - 1} only"
                )

    def __str__(self) -> str:
        ranges = [f"together={first}-{last}" for first, last in self.together]
        return "; ".join([*map(str, self.rules), *ranges])


def _rule(part: str, name: str, sign: str, text: str) -> Rule:
    values = [piece.strip().lower() for piece in text.split(",")]
    if name in WORDS:
        for value in values:
            if value not in WORDS[name]:
                near = difflib.get_close_matches(value, WORDS[name], 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PlanError(
                    f"constraint {part!r}: expected one of {', '.join(WORDS[name])}{hint}"
                )
        if sign not in ("=", "!="):
            raise PlanError(f"constraint {part!r}: {name} takes = or !=, not {sign}")
        return Rule(name, sign, tuple(values))
    if not all(re.fullmatch(r"[0-9]+", value) for value in values):
        raise PlanError(f"constraint {part!r}: expected whole numbers after {name}{sign}")
    if sign in ("<=", ">=") and len(values) > 1:
        raise PlanError(f"constraint {part!r}: {sign} takes one number")
    return Rule(name, sign, tuple(int(value) for value in values))


def _range(part: str, sign: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)\s*-\s*([0-9]+)", text.strip())
    if sign != "=" or not match or int(match[2]) <= int(match[1]):
        raise PlanError(f"constraint {part!r}: write a range of layers, for example together=0-3")
    return int(match[1]), int(match[2])
