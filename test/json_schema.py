"""As much of JSON Schema (2020-12) as docs/*.schema.json use; a keyword that is not known here is an error, not passed over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}
_SILENT = {"$schema", "$defs", "title", "description"}


def faults(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, at: str = "") -> Iterator[str]:
    """What in a value is not as the schema has it, a line each."""
    root = schema if root is None else root
    for keyword, wanted in schema.items():
        if keyword not in _SILENT:
            yield from _CHECKS[keyword](value, wanted, schema, root, at)


def _type(value: Any, wanted: str, schema: Any, root: Any, at: str) -> Iterator[str]:
    if not isinstance(value, _TYPES[wanted]) or (isinstance(value, bool) and wanted in ("number", "integer")):
        yield f"{at}: {value!r} is no {wanted}"


def _properties(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    for name in set(wanted) & set(value if isinstance(value, dict) else ()):
        yield from faults(value[name], wanted[name], root, f"{at}/{name}")


def _additional(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    for name in set(value if isinstance(value, dict) else ()) - set(schema.get("properties", ())):
        if wanted is False:
            yield f"{at}: {name} is not known"
        elif wanted is not True:
            yield from faults(value[name], wanted, root, f"{at}/{name}")


def _required(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    yield from (f"{at}: {name} is missing" for name in wanted if isinstance(value, dict) and name not in value)


def _items(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from faults(item, wanted, root, f"{at}/{number}")


def _any_of(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    tried = [list(faults(value, one, root, at)) for one in wanted]
    if all(tried):
        yield from min(tried, key=len)


def _reference(value: Any, wanted: str, schema: Any, root: Any, at: str) -> Iterator[str]:
    yield from faults(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, at)


def _says(holds: Any) -> Any:
    def check(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
        if not holds(value, wanted):
            yield f"{at}: {value!r}, not {wanted!r}"

    return check


_CHECKS = {
    "type": _type,
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _required,
    "items": _items,
    "minItems": _says(lambda value, wanted: not isinstance(value, list) or len(value) >= wanted),
    "maxItems": _says(lambda value, wanted: not isinstance(value, list) or len(value) <= wanted),
    "anyOf": _any_of,
    "$ref": _reference,
    "enum": _says(lambda value, wanted: value in wanted),
    "const": _says(lambda value, wanted: value == wanted),
    "minimum": _says(lambda value, wanted: not isinstance(value, int | float) or value >= wanted),
    "pattern": _says(lambda value, wanted: not isinstance(value, str) or re.search(wanted, value) is not None),
}
