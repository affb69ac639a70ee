"""Outlines and works of all groups in a plan's ``predicted``, so that a saved plan can be simulated
again without the model and the cluster. What equals its default is not written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.work import Cores, LayerWork, Phase, SendWork, UnitWork, Work

KEY = "work"
T = TypeVar("T")
Groups = tuple[tuple[Outline, ...], tuple[Work, ...]]


def dump(outlines: Sequence[Outline], works: Sequence[Work]) -> list[dict[str, Any]]:
    """JSON-able, one mapping per group: what ``predicted[KEY]`` holds."""
    return [
        {"outline": _written(outline), "work": _written(work)}
        for outline, work in zip(outlines, works, strict=True)
    ]


def of_plan(plan: Plan) -> Groups | None:
    """What :func:`dump` wrote; None where the plan has nothing of the kind, or something else.

    Plans are edited by people: an outline that is not the plan's own any more counts as nothing.
    """
    found = plan.predicted.get(KEY)
    if not isinstance(found, list) or len(found) != plan.pp:
        return None
    try:
        outlines = tuple(_read(Outline, _member(group, "outline")) for group in found)
        works = tuple(_read(Work, _member(group, "work")) for group in found)
        for outline, work in zip(outlines, works, strict=True):
            work.check(outline)
    except PlanError:
        return None
    stages = plan.stages or (Stage(0, len(plan.layers)),)
    for group, outline in enumerate(outlines):
        chunks = tuple(tuple(range(s.first, s.last)) for s in stages[group :: plan.pp])
        given = outline.chunks, outline.num_micro_batches, outline.pp, outline.group
        if given != (chunks, plan.num_micro_batches, plan.pp, group):
            return None
        if plan.pp > 1 and outline.schedule != plan.schedule:
            return None
    return outlines, works


def _written(noun: Any) -> Any:
    if dataclasses.is_dataclass(noun):
        return {
            field.name: _written(getattr(noun, field.name))
            for field in dataclasses.fields(noun)
            if getattr(noun, field.name) != _default(field)
        }
    if isinstance(noun, tuple):
        return [_written(item) for item in noun]
    if isinstance(noun, dict):
        return {str(key): _written(value) for key, value in noun.items()}
    return noun


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _read(kind: type[T], value: Any) -> T:
    if not isinstance(value, dict):
        raise PlanError(f"{kind.__name__} must be an object, got {value!r:.40}")
    known = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    wrong = [name for name in value if name not in known]
    if wrong:
        raise PlanError(f"{kind.__name__} has an unknown field {wrong[0]!r}")
    taken = {name: _READERS[str(known[name])](item) for name, item in value.items()}
    try:
        return kind(**taken)
    except TypeError as error:
        raise PlanError(f"{kind.__name__} lacks a field: {error}") from error


def _member(value: Any, name: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise PlanError(f"a group must have {name!r}, got {value!r:.40}")
    return value[name]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"expected a number, got {value!r:.40}")
    return value


def _exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise PlanError(f"expected {kind.__name__}, got {value!r:.40}")
        return value

    return read


def _several(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: tuple(read(item) for item in _exactly(list)(value))


def _by_layer(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def mapping(value: Any) -> Any:
        if not all(key.isdecimal() for key in _exactly(dict)(value)):
            raise PlanError(f"expected layer numbers as keys, got {value!r:.40}")
        return {int(key): read(item) for key, item in value.items()}

    return mapping


def _noun(kind: type) -> Callable[[Any], Any]:
    return lambda value: _read(kind, value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _exactly(int),
    "float": _number,
    "bool": _exactly(bool),
    "str": _exactly(str),
    "Phase": _noun(Phase),
    "Cores | None": _noun(Cores),  # None is the default and so never written
    "tuple[int, ...]": _several(_exactly(int)),
    "tuple[tuple[int, ...], ...]": _several(_several(_exactly(int))),
    "tuple[UnitOutline, ...]": _several(_noun(UnitOutline)),
    "tuple[UnitWork, ...]": _several(_noun(UnitWork)),
    "tuple[SendWork, ...]": _several(_noun(SendWork)),
    "Mapping[int, LayerOutline]": _by_layer(_noun(LayerOutline)),
    "Mapping[int, LayerWork]": _by_layer(_noun(LayerWork)),
}
"""By the annotation of the field."""
