"""What the declared tools say about their arguments: names, JSON types, which arguments a call must have.

The part of JSON Schema that decides how a written argument is read: `type`, `enum`, `const`, `$ref` into `$defs`,
`definitions` or any other place of the same schema, `allOf`, `anyOf`, `oneOf`, `nullable`. What a schema does not say
restricts nothing; a reference that leads nowhere, or in a circle, says nothing. Requests are validated elsewhere: this
module passes over a tool of another form.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Types = frozenset[str]  # names of JSON types
DEEPEST = 40  # schemas within schemas that are looked into


@dataclasses.dataclass(frozen=True)
class ToolSchema:
    """One declared tool.

    Attributes:
        types: parameter -> the JSON types that its schema allows; None if the schema does not say.
        required: the parameters that every call has.
        closed: whether calls have no other parameters.
    """

    types: Mapping[str, Types | None]
    required: frozenset[str] = frozenset()
    closed: bool = True

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call may have these arguments, by their names and JSON types."""
        if not self.required <= arguments.keys() or (self.closed and not arguments.keys() <= self.types.keys()):
            return False
        allowed = ((self.types.get(name), value) for name, value in arguments.items())
        return all(types is None or bool(types_of(value) & types) for types, value in allowed)


Tools = Mapping[str, ToolSchema]  # by the tool's name


def read_tools(tools: Iterable[Any]) -> dict[str, ToolSchema]:
    """Returns what the declared tools say, by name."""
    found: dict[str, ToolSchema] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(function, Mapping) and isinstance(name, str) and name:
            found[name] = _read_tool(function.get("parameters"))
    return found


def _read_tool(parameters: Any) -> ToolSchema:
    reader = _Reader(parameters)
    schemas: dict[str, list[Any]] = {}
    required: set[str] = set()
    closed = True
    for schema, certain in reader.parts(parameters):
        properties = schema.get("properties")
        for name, value in properties.items() if isinstance(properties, Mapping) else ():
            schemas.setdefault(str(name), []).append(value)
        names = schema.get("required")
        if certain and isinstance(names, list):
            required |= {name for name in names if isinstance(name, str)}
        closed = closed and not schema.get("additionalProperties")
    types = {name: reader.any_of(values) for name, values in schemas.items()}
    return ToolSchema(types, frozenset(required), closed)


class _Reader:
    """Reads schemas that stand in one document. Each reference is followed once, however often it is met."""

    def __init__(self, root: Any):
        self._root = root
        self._types: dict[str, Types | None] = {}  # by reference
        self._passed: set[str] = set()

    def parts(self, schema: Any, certain: bool = True, depth: int = 0) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """The schemas that one schema is put together from, and whether each holds for every value."""
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            return
        yield schema, certain
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._passed:
            self._passed.add(reference)
            yield from self.parts(_resolve(reference, self._root), certain, depth + 1)
        for key in ("allOf", "anyOf", "oneOf"):
            for option in _listed(schema.get(key)):
                yield from self.parts(option, certain and key == "allOf", depth + 1)

    def types(self, schema: Any, depth: int = 0) -> Types | None:
        """The JSON types that a schema allows, None if it does not say; `number` includes `integer`."""
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            return None
        statements: list[Types | None] = [_declared(schema.get("type"))]
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        statements.append(frozenset().union(*map(types_of, _listed(values))) or None)
        if isinstance(schema.get("$ref"), str):
            statements.append(self._referenced(schema["$ref"], depth))
        statements += [self.types(part, depth + 1) for part in _listed(schema.get("allOf"))]
        for key in ("anyOf", "oneOf"):
            if _listed(schema.get(key)):
                statements.append(self.any_of(schema[key], depth + 1))
        result: Types | None = None
        for types in statements:
            if types is not None:  # statements that contradict each other allow nothing; the first of them is taken
                result = types if result is None else (result & types or result)
        return result | {"null"} if result is not None and schema.get("nullable") is True else result

    def any_of(self, schemas: list[Any], depth: int = 0) -> Types | None:
        """The JSON types that one of several schemas allows."""
        found = [self.types(schema, depth) for schema in schemas]
        return None if any(types is None for types in found) else frozenset().union(*(types or () for types in found))

    def _referenced(self, reference: str, depth: int) -> Types | None:
        if reference not in self._types:
            self._types[reference] = None  # what a reference in a circle says
            self._types[reference] = self.types(_resolve(reference, self._root), depth + 1)
        return self._types[reference]


def _declared(declared: Any) -> Types | None:
    names = {name for name in ([declared] if isinstance(declared, str) else _listed(declared)) if isinstance(name, str)}
    return frozenset(names | {"integer"} if "number" in names else names) or None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolve(reference: str, root: Any) -> Any:
    """The schema that a reference within its document leads to, None if it leads nowhere."""
    path, _, pointer = reference.partition("#")
    if path:
        return None
    place = root
    for step in filter(None, pointer.split("/")):
        key = urllib.parse.unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(place, Mapping):
            place = place.get(key)
        elif isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            place = place[int(key)]
        else:
            return None
    return place


def types_of(value: Any) -> Types:
    """The names that JSON Schema has for a value's type."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    names = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return frozenset({names[type(value)]} if type(value) in names else ())
