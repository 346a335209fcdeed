"""Answers parsed as they stream: thoughts, text, tool calls, in the format of the model that writes.

However the text is cut into deltas, the joined events are the same. What is held back is a tail that may yet become a
delimiter, or a delimiter and what may yet be the name of a call: a model may speak of its own delimiters, and what
cannot be the head of a call is text at once. The text of an open call comes when the call is complete.

The parser drops the newlines before the thoughts and before the answer, and the white space after them; it keeps white
space around a tool call only where answer text follows. Thoughts end at their closing delimiter, and also where calls
begin; text that reaches neither is all thoughts. They open again at `<think>` at the beginning of a line or after a
call, and in an answer that has thought before also right after a word or a sentence; elsewhere `<think>` is text.
Inside a call's value only the end of the value is a delimiter, so a value may contain `</tool_call>`. A call that is
cut off or malformed is a MalformedToolCall, never a ToolCall; so is one that was never closed before the next, and a
section of calls without a call. Other text between the calls of a section is answer. Names are not checked against the
declared tools: a caller may want to answer the model that there is no such tool.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.text.answer_format import END, GLM, RESTART, AnswerFormat
from glm_jax.text.events import ContentDelta, Event, MalformedToolCall, ReasoningDelta, ToolCall
from glm_jax.text.tool_schemas import read_tools

SENTENCE_ENDS = ".!?\u2026\u3002\uff01\uff1f"
LINE_TAIL = 64  # characters of the current line that say whether thoughts may open here


class _Part(enum.Enum):
    """What is being read."""

    START = enum.auto()  # white space and the delimiter that opens thoughts, or neither
    REASONING = enum.auto()
    CONTENT = enum.auto()
    OPENED = enum.auto()  # a section of calls, before its first
    CALL = enum.auto()


class StreamParser:
    """Parses one assistant turn.

    Args:
        in_thinking: the prompt ended inside open thoughts.
        parse_tools: False leaves the delimiters of calls as text, in thoughts and answer.
        tools: the declared tools, `{"type": "function", "function": {...}}` each. Where the format writes arguments as
            plain text (GLM), their schemas decide which values are strings; values without a schema are JSON if they
            can be, else strings. Their names and parameters also mend calls that are nearly of the model's form.
        answer_format: how the model writes.
        first_call: how many calls the conversation has already; ids that the parser makes (Kimi K2) count on from it.
    """

    def __init__(
        self,
        in_thinking: bool = False,
        parse_tools: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer_format: AnswerFormat = GLM,
        first_call: int = 0,
    ):
        self._calls, self._think = answer_format.calls, answer_format.think
        self._parse_tools = parse_tools
        self._tools = read_tools(tools or ())
        self._lookaheads = self._calls.lookaheads(self._tools)
        self._next_call = first_call
        self._part = _Part.START
        self._first = _Part.REASONING if in_thinking else _Part.CONTENT
        self._unclosed = False  # thoughts ended where calls begin: their closing delimiter may still come
        self._in_section = False
        self._spoke_of_section = False  # its opening delimiter was text; calls may still come, and its closing one
        self._state = END  # of the open call
        self._buffer = ""  # not read yet: between two deltas what may become a delimiter, or the head of a call
        self._call: list[str] = []  # the text of the open call, or of the section before its first, delimiters included
        self._space = {_Part.REASONING: "", _Part.CONTENT: ""}  # white space that goes out if text follows it
        self._begun: set[_Part] = set()
        self._closed = ""  # the delimiter that closed a call, as long as only white space has come after it
        self._line = ""  # the last characters of the answer's current line

    def push(self, delta: str) -> list[Event]:
        """Returns the events that this delta completes."""
        self._buffer += delta
        events: list[Event] = []
        if self._part is _Part.START and not self._start():
            return events
        at = 0
        while True:
            start, delimiter = self._next_delimiter(at)
            events += self._take(self._buffer[at:start])
            if delimiter is None:
                self._buffer = self._buffer[start:]
                return events
            events += self._switch(delimiter)
            at = start + len(delimiter)

    def finish(self) -> list[Event]:
        """Returns the last events: held text, and a call that was cut off."""
        if self._part is _Part.START:
            self._part = self._first
        held, self._buffer = self._buffer, ""
        opens = (self._calls.begin, *(self._calls.section or ())[:1])
        if self._part in (_Part.CALL, _Part.OPENED) or (self._parse_tools and held.startswith(opens)):
            cut_off = "".join(self._call) + held
            self._call = []
            return [MalformedToolCall(cut_off)]
        return self._take(held)

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

    def _next_delimiter(self, at: int) -> tuple[int, str | None]:
        """Where the text from a place of the buffer ends, and the delimiter there; None if more text must come."""
        delimiters = self._delimiters()
        search = _search(delimiters)
        place = at
        while (found := search.search(self._buffer, place)) is not None:
            counts = self._counts(found, at)
            if counts is None:
                return found.start(), None
            if counts:
                return found.start(), found.group()
            self._spoke_of_section = self._spoke_of_section or found.group() in (self._calls.section or ())
            place = found.end()
        return len(self._buffer) - _partial_delimiter(self._buffer, place, delimiters), None

    def _delimiters(self) -> tuple[str, ...]:
        """The delimiters that may count now."""
        if self._part is _Part.CALL:
            inside = self._calls.states[self._state]
            # Where thoughts end outside a value, what they began is no call.
            ends_thoughts = self._unclosed and self._think is not None and self._calls.begin in inside
            return (*inside, *(self._think[1:] if self._think is not None and ends_thoughts else ()))
        section = self._calls.section or ()
        if self._part is _Part.OPENED:
            return (self._calls.begin, *section[1:])
        begins = (*section[:1], self._calls.begin) if self._parse_tools else ()
        ends = (*(section[1:] if self._in_section else ()), *([self._closed] if self._closed else []))
        if self._think is None:
            return (*begins, *ends)
        opening, closing = self._think
        if self._part is _Part.REASONING:
            return (closing, *begins)
        return (opening, *([closing] if self._unclosed else []), *begins, *ends)

    def _counts(self, found: re.Match[str], at: int) -> bool | None:
        """Whether what was found is a delimiter here and not text; None if only more text can tell.

        Args:
            found: in the buffer.
            at: where the text before it begins that is not filed yet.
        """
        delimiter = found.group()
        if self._part is _Part.CONTENT and delimiter == self._closed:
            return not self._buffer[at : found.start()].strip()
        if self._part is _Part.CONTENT and self._think is not None and delimiter == self._think[0]:
            line = (self._line + self._buffer[at : found.start()]).rpartition("\n")[2][-LINE_TAIL:]
            if not line.strip():
                return True
            return _Part.REASONING in self._begun and (line[-1].isalnum() or line[-1] in SENTENCE_ENDS)
        lookahead = self._lookaheads.get(delimiter)
        return True if lookahead is None else lookahead.follows(self._buffer, found.end())

    def _take(self, text: str) -> list[Event]:
        """Files text that has no delimiter in it."""
        if self._part in (_Part.CALL, _Part.OPENED):
            self._call.append(text)
            return []
        part = self._part
        if part is _Part.CONTENT:
            self._line = (self._line + text).rpartition("\n")[2][-LINE_TAIL:]
        text = self._space[part] + text
        if part not in self._begun:
            text = text.lstrip("\r\n")
        visible = text.rstrip()
        self._space[part] = text[len(visible) :]
        if not visible:
            return []
        self._begun.add(part)
        self._closed = ""
        return [ReasoningDelta(visible) if part is _Part.REASONING else ContentDelta(visible)]

    def _switch(self, delimiter: str) -> list[Event]:
        """Moves on past a delimiter."""
        if self._part is _Part.CALL:
            return self._inside(delimiter)
        self._line = ""
        if delimiter == self._closed:  # written twice
            return []
        self._closed = ""
        if self._think is not None and delimiter in self._think:
            self._part = _Part.REASONING if delimiter == self._think[0] else _Part.CONTENT
            self._unclosed = False
            return []
        self._unclosed = self._unclosed or self._part is _Part.REASONING
        if delimiter == self._calls.begin:
            self._open_call()
            return []
        section = "".join(self._call) + delimiter if self._part is _Part.OPENED else ""
        self._in_section = self._calls.section is not None and delimiter == self._calls.section[0]
        self._spoke_of_section = False
        self._part, self._call = (_Part.OPENED, [delimiter]) if self._in_section else (_Part.CONTENT, [])
        return [MalformedToolCall(section)] if section else []

    def _open_call(self) -> None:
        self._part, self._state, self._call = _Part.CALL, next(iter(self._calls.states)), [self._calls.begin]

    def _inside(self, delimiter: str) -> list[Event]:
        """Moves on past a delimiter inside a call."""
        if self._think is not None and delimiter == self._think[1]:
            unclosed, self._call = MalformedToolCall("".join(self._call)), []
            self._part, self._unclosed = _Part.CONTENT, False
            return [unclosed]
        self._state = self._calls.states[self._state][delimiter]
        if self._state == RESTART:
            unclosed = MalformedToolCall("".join(self._call))
            self._open_call()
            return [unclosed]
        self._call.append(delimiter)
        if self._state != END:
            return []
        block = "".join(self._call)
        self._part, self._call = _Part.CONTENT, []
        self._in_section = self._in_section or self._spoke_of_section
        body = block[len(self._calls.begin) : -len(delimiter)]
        found: ToolCall | None = self._calls.read(body, self._tools, self._next_call)
        if found is None:
            return [MalformedToolCall(block)]
        self._next_call += 1
        self._closed = delimiter
        return [found]


@functools.cache
def _search(delimiters: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, delimiters)) or "(?!)")


def _partial_delimiter(text: str, start: int, delimiters: tuple[str, ...]) -> int:
    """Length of the longest end of `text`, not before `start`, that begins one of the delimiters."""
    longest = max(map(len, delimiters), default=1) - 1
    for size in range(min(longest, len(text) - start), 0, -1):
        if any(delimiter.startswith(text[-size:]) for delimiter in delimiters):
            return size
    return 0
