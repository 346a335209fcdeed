"""GLM-4.5's output format, parsed as it streams: thoughts, answer, tool calls.

    <think>thoughts</think>
    answer
    <tool_call>name
    <arg_key>key</arg_key>
    <arg_value>value</arg_value>
    </tool_call>

However the text is cut into deltas, the joined events are the same: a tail that may yet become a tag is held back. The
thoughts and the answer lose the newlines before them and the white space after them; white space around a tool call is
kept only where answer text follows. Thoughts end at `</think>`, and also at `<tool_call>`; what stops before either is
all thoughts. Inside `<arg_value>` only `</arg_value>` is a tag, so a value may speak of `</tool_call>`. A call that is
cut off or malformed is a BrokenCall, never a ToolCall. A call's arguments come when it is complete; names are not
checked against the declared tools (a caller may want to answer the model that there is no such tool).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
NAME = re.compile(r"\s*([^\s<>]+)\s*(?=<arg_key>|$)")


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More of the thoughts."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One complete call; the arguments are JSON values, in the model's order."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BrokenCall:
    """The text of a call that was cut off or cannot be read, with its opening tag."""

    text: str


Event = ReasoningDelta | ContentDelta | ToolCall | BrokenCall


class _Part(enum.Enum):
    """What is being read."""

    START = enum.auto()  # white space and <think>, or neither
    REASONING = enum.auto()
    CONTENT = enum.auto()
    CALL = enum.auto()
    VALUE = enum.auto()  # one argument's value, inside a call


class StreamParser:
    """Parses one assistant turn.

    Args:
        in_thinking: the prompt ended inside an open `<think>`.
        parse_tools: False leaves `<tool_call>` as text, in thoughts and answer.
        tools: the declared tools, `{"type": "function", "function": {...}}` each; their schemas decide which values are
            strings. Values without a schema are JSON if they can be, else strings.
    """

    def __init__(
        self, in_thinking: bool = False, parse_tools: bool = True, *, tools: Sequence[Mapping[str, Any]] | None = None
    ):
        self._parse_tools = parse_tools
        self._schemas = _parameter_schemas(tools or ())
        self._part = _Part.START
        self._first = _Part.REASONING if in_thinking else _Part.CONTENT
        self._unclosed = False  # thoughts ended at <tool_call>: one </think> may still come
        self._buffer = ""  # not read yet: at most the beginning of a tag between two deltas
        self._call: list[str] = []  # the open call's text, tags included
        self._space = {_Part.REASONING: "", _Part.CONTENT: ""}  # white space that goes out if text follows it
        self._begun: set[_Part] = set()

    def push(self, delta: str) -> list[Event]:
        """Returns the events that this delta completes."""
        self._buffer += delta
        events: list[Event] = []
        if self._part is _Part.START and not self._start():
            return events
        while True:
            at, tag = self._next_tag()
            events += self._take(self._buffer[:at])
            self._buffer = self._buffer[at + len(tag) :]
            if not tag:
                return events
            events += self._switch(tag)

    def finish(self) -> list[Event]:
        """Returns the last events: held text, and a call that was cut off."""
        if self._part is _Part.START:
            self._part = self._first
        events = self._take(self._buffer)
        if self._call:
            events.append(BrokenCall("".join(self._call)))
        self._buffer, self._call = "", []
        return events

    def _start(self) -> bool:
        """Passes over a first `<think>`; False while it may yet come."""
        visible = self._buffer.lstrip()
        if len(visible) < len(THINK) and THINK.startswith(visible):
            return False
        self._part = self._first
        if visible.startswith(THINK):
            self._part = _Part.REASONING
            self._buffer = visible.removeprefix(THINK)
        return True

    def _tags(self) -> tuple[str, ...]:
        call = (CALL,) if self._parse_tools else ()
        if self._part is _Part.REASONING:
            return (END_THINK, *call)
        if self._part is _Part.CONTENT:
            return (END_THINK, *call) if self._unclosed else call
        return (END_VALUE,) if self._part is _Part.VALUE else (VALUE, END_CALL)

    def _next_tag(self) -> tuple[int, str]:
        """(place, tag) of the first tag; without one, the place where a tag may be beginning, and ""."""
        tags = self._tags()
        found = [(at, tag) for tag in tags if (at := self._buffer.find(tag)) >= 0]
        if found:
            return min(found)
        return len(self._buffer) - _partial_tag(self._buffer, tags), ""

    def _take(self, text: str) -> list[Event]:
        """Files text that has no tag in it."""
        if self._part in (_Part.CALL, _Part.VALUE):
            self._call.append(text)
            return []
        text = self._space[self._part] + text
        if self._part not in self._begun:
            text = text.lstrip("\r\n")
        visible = text.rstrip()
        self._space[self._part] = text[len(visible) :]
        if not visible:
            return []
        self._begun.add(self._part)
        return [ReasoningDelta(visible) if self._part is _Part.REASONING else ContentDelta(visible)]

    def _switch(self, tag: str) -> list[Event]:
        """Moves on past a tag."""
        if tag == END_THINK:
            self._part, self._unclosed = _Part.CONTENT, False
            return []
        if tag == CALL:
            self._unclosed = self._unclosed or self._part is _Part.REASONING
        self._call.append(tag)
        self._part = _Part.VALUE if tag == VALUE else _Part.CALL
        if tag != END_CALL:
            return []
        block = "".join(self._call)
        self._part, self._call = _Part.CONTENT, []
        return [self._read_call(block)]

    def _read_call(self, block: str) -> ToolCall | BrokenCall:
        """The call that a whole block, tags included, stands for."""
        body = block[len(CALL) : -len(END_CALL)]
        name = NAME.match(body)
        if name is None:
            return BrokenCall(block)
        schemas = self._schemas.get(name[1], {})
        arguments: dict[str, Any] = {}
        at = name.end()
        while (pair := ARGUMENT.match(body, at)) is not None:
            key = pair[1].strip()
            arguments[key] = _read_value(pair[2], schemas.get(key))
            at = pair.end()
        return BrokenCall(block) if body[at:].strip() else ToolCall(name[1], arguments)


def _partial_tag(text: str, tags: Iterable[str]) -> int:
    """Length of the longest end of `text` that begins one of the tags."""
    longest = max(map(len, tags), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def _parameter_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Tool name -> parameter name -> schema; what has another form is passed over: requests are checked elsewhere."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        schemas[str(function.get("name"))] = properties if isinstance(properties, Mapping) else {}
    return schemas


def _read_value(text: str, schema: Any) -> Any:
    """An argument's value: where the schema allows only strings the text as it is, else JSON if it is JSON.

    Where the schema allows strings among other types, JSON counts only if it is of one of the other types.
    """
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text.strip())
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, infinity, half surrogate pairs
    except (ValueError, RecursionError):
        return text
    if "string" in types and (isinstance(value, str) or not _json_types(value) & types):
        return text
    return value


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema allows by `type`, `anyOf`, `oneOf`, `enum` or `const`; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            options = [_types(option) for option in schema[key]]
            return set().union(*options) if all(options) else set()
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return set().union(*map(_json_types, values)) if isinstance(values, list) else set()


def _json_types(value: Any) -> set[str]:
    """The names that JSON Schema has for a value's type."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    names = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return {names[type(value)]} if type(value) in names else set()
