"""Answers parsed as they stream: thoughts, text, tool calls, in the format of the model that writes.

However the text is cut into deltas, the joined events are the same: a tail that may yet become a delimiter is held
back. The parser drops the newlines before the thoughts and before the answer, and the white space after them; it keeps
white space around a tool call only where answer text follows. Thoughts end at their closing delimiter, and also where
calls begin; text that reaches neither is all thoughts. Inside a call's value only the end of the value is a delimiter,
so a value may contain `</tool_call>`. A call that is cut off or malformed is a MalformedToolCall, never a ToolCall; so
is a section of calls without a call. Other text between the calls of a section is answer. A call's arguments come when
the call is complete. Names are not checked against the declared tools: a caller may want to answer the model that there
is no such tool.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.text.answer_format import END, GLM, AnswerFormat
from glm_jax.text.argument_values import parameter_schemas
from glm_jax.text.events import ContentDelta, Event, MalformedToolCall, ReasoningDelta, ToolCall


class _Part(enum.Enum):
    """What is being read."""

    START = enum.auto()  # white space and the delimiter that opens thoughts, or neither
    REASONING = enum.auto()
    CONTENT = enum.auto()
    OPENED = enum.auto()  # a section of calls, before its first
    SECTION = enum.auto()  # a section of calls, after one
    CALL = enum.auto()


class StreamParser:
    """Parses one assistant turn.

    Args:
        in_thinking: the prompt ended inside open thoughts.
        parse_tools: False leaves the delimiters of calls as text, in thoughts and answer.
        tools: the declared tools, `{"type": "function", "function": {...}}` each. Where the format writes arguments as
            plain text (GLM), their schemas decide which values are strings; values without a schema are JSON if they
            can be, else strings.
        answer_format: how the model writes.
    """

    def __init__(
        self,
        in_thinking: bool = False,
        parse_tools: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer_format: AnswerFormat = GLM,
    ):
        self._calls, self._think = answer_format.calls, answer_format.think
        self._parse_tools = parse_tools
        self._schemas = parameter_schemas(tools or ())
        self._part = _Part.START
        self._first = _Part.REASONING if in_thinking else _Part.CONTENT
        self._unclosed = False  # thoughts ended where calls begin: their closing delimiter may still come
        self._in_section = False
        self._state = END  # of the open call
        self._buffer = ""  # not read yet: at most the beginning of a delimiter between two deltas
        self._call: list[str] = []  # the text of the open call, or of the section before its first, delimiters included
        self._space = {_Part.REASONING: "", _Part.CONTENT: ""}  # white space that goes out if text follows it
        self._begun: set[_Part] = set()

    def push(self, delta: str) -> list[Event]:
        """Returns the events that this delta completes."""
        self._buffer += delta
        events: list[Event] = []
        if self._part is _Part.START and not self._start():
            return events
        at = 0
        while (found := _search(self._delimiters()).search(self._buffer, at)) is not None:
            events += self._take(self._buffer[at : found.start()])
            events += self._switch(found.group())
            at = found.end()
        held = len(self._buffer) - _partial_delimiter(self._buffer[at:], self._delimiters())
        events += self._take(self._buffer[at:held])
        self._buffer = self._buffer[held:]
        return events

    def finish(self) -> list[Event]:
        """Returns the last events: held text, and a call that was cut off."""
        if self._part is _Part.START:
            self._part = self._first
        events = self._take(self._buffer)
        if self._call:
            events.append(MalformedToolCall("".join(self._call)))
        self._buffer, self._call = "", []
        return events

    def _start(self) -> bool:
        """Passes over a first delimiter of thoughts; False while it may yet come."""
        visible = self._buffer.lstrip()
        opening = self._think[0] if self._think else ""
        if len(visible) < len(opening) and opening.startswith(visible):
            return False
        self._part = self._first
        if opening and visible.startswith(opening):
            self._part = _Part.REASONING
            self._buffer = visible.removeprefix(opening)
        return True

    def _delimiters(self) -> tuple[str, ...]:
        """The delimiters that count now."""
        section = self._calls.section or ()
        if self._part is _Part.CALL:
            return tuple(self._calls.states[self._state])
        if self._part in (_Part.OPENED, _Part.SECTION):
            return (self._calls.begin, *section[1:])
        begins = (*section[:1], self._calls.begin) if self._parse_tools else ()
        closes = self._think is not None and (self._part is _Part.REASONING or self._unclosed)
        return (self._think[1], *begins) if closes and self._think else begins

    def _take(self, text: str) -> list[Event]:
        """Files text that has no delimiter in it."""
        if self._part in (_Part.CALL, _Part.OPENED):
            self._call.append(text)
            return []
        part = _Part.REASONING if self._part is _Part.REASONING else _Part.CONTENT
        text = self._space[part] + text
        if part not in self._begun:
            text = text.lstrip("\r\n")
        visible = text.rstrip()
        self._space[part] = text[len(visible) :]
        if not visible:
            return []
        self._begun.add(part)
        return [ReasoningDelta(visible) if part is _Part.REASONING else ContentDelta(visible)]

    def _switch(self, delimiter: str) -> list[Event]:
        """Moves on past a delimiter."""
        if self._part is _Part.CALL:
            return self._inside(delimiter)
        if self._think is not None and delimiter == self._think[1]:
            self._part, self._unclosed = _Part.CONTENT, False
            return []
        self._unclosed = self._unclosed or self._part is _Part.REASONING
        events: list[Event] = []
        if delimiter == self._calls.begin:
            before = "".join(self._call[1:]) if self._part is _Part.OPENED else ""
            self._part = _Part.SECTION
            events = self._take(before)
            self._part, self._state, self._call = _Part.CALL, next(iter(self._calls.states)), [delimiter]
        elif self._part in (_Part.OPENED, _Part.SECTION):  # the section's end
            events = [MalformedToolCall("".join(self._call) + delimiter)] if self._part is _Part.OPENED else []
            self._part, self._in_section, self._call = _Part.CONTENT, False, []
        else:
            self._part, self._in_section, self._call = _Part.OPENED, True, [delimiter]
        return events

    def _inside(self, delimiter: str) -> list[Event]:
        """Moves on past a delimiter inside a call."""
        self._call.append(delimiter)
        self._state = self._calls.states[self._state][delimiter]
        if self._state != END:
            return []
        block = "".join(self._call)
        self._part, self._call = (_Part.SECTION if self._in_section else _Part.CONTENT), []
        found: ToolCall | None = self._calls.read(block[len(self._calls.begin) : -len(delimiter)], self._schemas)
        return [MalformedToolCall(block) if found is None else found]


@functools.cache
def _search(delimiters: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, delimiters)) or "(?!)")


def _partial_delimiter(text: str, delimiters: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins one of the delimiters."""
    longest = max(map(len, delimiters), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(delimiter.startswith(text[-size:]) for delimiter in delimiters):
            return size
    return 0
