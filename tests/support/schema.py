# SPDX-License-Identifier: GPL-2.0-or-later
"""As much of JSON Schema (draft 2020-12) as docs/spec/token.schema.json uses; an unknown keyword is an error."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TOKEN_SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "spec" / "token.schema.json"
TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
}
ANNOTATIONS = frozenset({"$schema", "$defs", "title"})


class Schema:
    """A schema with its definitions."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    @classmethod
    def of_tokens(cls) -> "Schema":
        """The schema of our tokens."""
        return cls(json.loads(TOKEN_SCHEMA.read_text(encoding="utf-8")))

    def faults(self, value: object) -> list[str]:
        """Where and why ``value`` is not as the schema says; empty if it is."""
        return list(self._check(self._root, value, "it"))

    def _check(self, schema: Mapping[str, Any], value: Any, where: str) -> Iterator[str]:
        for keyword, wanted in schema.items():
            if keyword in ANNOTATIONS:
                continue
            if keyword == "$ref":
                yield from self._check(self._root["$defs"][wanted.removeprefix("#/$defs/")], value, where)
            elif keyword == "oneOf":
                found = [list(self._check(choice, value, where)) for choice in wanted]
                if sum(not faults for faults in found) != 1:
                    yield from (fault for faults in found for fault in faults)
            elif keyword == "properties":
                for name in wanted.keys() & (value.keys() if isinstance(value, dict) else ()):
                    yield from self._check(wanted[name], value[name], f"{where}.{name}")
            elif keyword == "items":
                for index, item in enumerate(value if isinstance(value, list) else ()):
                    yield from self._check(wanted, item, f"{where}[{index}]")
            elif not KEYWORDS[keyword](value, wanted):
                yield f"{where}: {keyword} {wanted}"


#: Keywords that need nothing but the value; each holds for values of other types.
KEYWORDS: Mapping[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, wanted: TYPES[wanted](value),
    "const": lambda value, wanted: type(value) is type(wanted) and value == wanted,
    "enum": lambda value, wanted: value in wanted,
    "pattern": lambda value, wanted: not isinstance(value, str) or re.search(wanted, value) is not None,
    "required": lambda value, wanted: not isinstance(value, dict) or set(wanted) <= value.keys(),
    "minItems": lambda value, wanted: not isinstance(value, list) or len(value) >= wanted,
    "maxItems": lambda value, wanted: not isinstance(value, list) or len(value) <= wanted,
    "minimum": lambda value, wanted: not TYPES["integer"](value) or value >= wanted,
    "maximum": lambda value, wanted: not TYPES["integer"](value) or value <= wanted,
}
