"""Reading a plan's JSON with errors that say where they are."""

from __future__ import annotations

import difflib
import json
from typing import Any

from galvatron_compile.errors import PlanError


class Fields:
    """Reads a JSON object field by field; every error says where it is."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise PlanError(f"{where} must be an object, got {_shown(value)}")
        self.value, self.where = value, where
        self.known: list[str] = []

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        self.known.append(name)
        if name not in self.value:
            if default is not None:
                return default
            raise PlanError(f"{self.where} lacks the field {name!r}")
        value = self.value[name]
        if type(value) is not kind:
            names = {int: "an integer", str: "a string", bool: "true or false", list: "a list"}
            expected = names.get(kind, "an object")
            raise PlanError(f"{self.where}.{name} must be {expected}, got {_shown(value)}")
        return value

    def finish(self) -> None:
        """Refuse fields that nothing read: a misspelt one must not be ignored."""
        for name in self.value:
            if name not in self.known:
                near = difflib.get_close_matches(name, self.known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
                raise PlanError(f"{self.where} has an unknown field {name!r}{hint}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
