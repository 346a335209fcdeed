"""How the models write an answer: the delimiters around thoughts and tool calls, and what stands in a call.

One `AnswerFormat` for each way of writing; `stream_parser` reads them all and knows none of them.

GLM-4.5 (arguments as tagged text, typed by the tools' schemas):

    <think>thoughts</think>
    answer
    <tool_call>name
    <arg_key>key</arg_key>
    <arg_value>value</arg_value>
    </tool_call>

DeepSeek-V3 and R1, DeepSeek-V3.1, and Kimi K2 (arguments as a JSON object; `/` stands for their special tokens):

    /calls begin/ /call begin/function/sep/name, a fenced block of JSON, /call end/ /calls end/
    /calls begin/ /call begin/name/sep/{"key": value}/call end/ /calls end/
    /section begin/ /call begin/functions.name:0/argument begin/{"key": value}/call end/ /section end/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from glm_jax.text.events import ToolCall
from glm_jax.text.json_calls import ARGUMENTS, SEPARATOR, read_fenced, read_separated, read_with_id
from glm_jax.text.lookahead import Lookahead, Part
from glm_jax.text.tagged_calls import read_tagged
from glm_jax.text.tool_schemas import Tools

END = ""  # the state after the delimiter that closes a call
RESTART = "restart"  # the state after a call's opening delimiter inside a call that was never closed

SPACE = r"\s{0,256}"
LINE_BREAK = r"(?:[\r\n]\s{0,256})?"
NAME = (r"[\w/@][\w.:/@#+-]{0,63}", r"(?:[\w/@][\w.:/@#+-]{0,63})?")
ID = r"[^\s<>]{0,128}"  # also without a name, or none at all
KEY = r"[^<]{0,64}"
REST_OF_NAME = r"[\w.:/@#+-]{0,64}"


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How calls are written.

    Attributes:
        begin: the delimiter before a call.
        head_ends: the delimiters of which one follows the head of a call, its name. Where none does, `begin` is text:
            a model may speak of its own delimiters.
        states: for each state inside a call, its delimiters and the state that follows each of them. The first state
            follows `begin`; END follows the call. In the state of a value only the end of the value is a delimiter, so
            that a value may contain the others as text.
        read: the text between `begin` and the closing delimiter, the declared tools and the number of the call in its
            conversation, to the call; None if it is none.
        section: the delimiters around all calls of a turn, if there are such. A call without them counts too.
        name: the form of a head, where no tool is declared under it.
        head_prefix: what a head may begin with, beside a declared name, where a space stands before it.
        key_begin: the delimiter before a key, where calls have such; a head may end with it too, if a key follows.
        key_ends: the delimiters of which one follows a key, also one in the head whose opening delimiter is missing.
        followed: delimiters inside a call that count only where one of these, or a new call, follows.
    """

    begin: str
    head_ends: tuple[str, ...]
    states: Mapping[str, Mapping[str, str]]
    read: Callable[[str, Tools, int], ToolCall | None]
    section: tuple[str, str] | None = None
    name: Part = NAME
    head_prefix: str | None = None
    key_begin: str | None = None
    key_ends: tuple[str, ...] = ()
    followed: Mapping[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)

    def lookaheads(self, tools: Tools) -> dict[str, Lookahead]:
        """What must follow a delimiter for it to be one, by delimiter.

        Args:
            tools: the declared ones. A space between `begin` and an undeclared name makes `begin` text, so that
                prose that mentions it is not held back.
        """
        names: list[tuple[Part, ...]] = [(LINE_BREAK, self.name, SPACE)]
        if tools:
            names.append((SPACE, [*tools], SPACE))
        if self.head_prefix is not None:
            names.append((SPACE, [self.head_prefix], REST_OF_NAME, SPACE))
        heads: list[tuple[Part, ...]] = [(*name, [*self.head_ends]) for name in names]
        heads.append((SPACE, [end for end, after in self.states["head"].items() if after == END]))  # an empty call
        if self.key_begin is not None:
            key = ([self.key_begin], KEY, [self.begin, self.key_begin, *self.key_ends, *self.head_ends])
            heads += [(*name, *key) for name in names]
            for declared, tool in tools.items():
                if not tool.types:
                    continue
                known = ([*tool.types], SPACE, [*self.key_ends])
                heads += [
                    (SPACE, [declared], SPACE, *known),
                    (SPACE, [declared], SPACE, [self.key_begin], SPACE, *known),
                ]
        calls: list[tuple[Part, ...]] = [([self.begin], *head) for head in heads]
        found = {self.begin: Lookahead.of(*heads)}
        if self.section is not None:
            found[self.section[0]] = Lookahead.of((SPACE, [self.section[1]]), *((SPACE, *call) for call in calls))
        for delimiter, sequences in self.followed.items():
            written = [tuple(part for text in texts for part in (SPACE, [text])) for texts in sequences]
            found[delimiter] = Lookahead.of(*written, *((SPACE, *call) for call in calls))
        return found


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """How an answer is written.

    Attributes:
        think: the delimiters around thoughts; None if there are no thoughts.
        calls: how calls are written.
    """

    think: tuple[str, str] | None
    calls: CallFormat

    @property
    def delimiters(self) -> tuple[str, ...]:
        """Everything that has to reach the parser, even where the tokenizer has it as a special token."""
        inside = [delimiter for state in self.calls.states.values() for delimiter in state]
        return (*(self.think or ()), *(self.calls.section or ()), self.calls.begin, *inside)

    def without_thoughts(self) -> AnswerFormat:
        """The same for a model that has no delimiters for thoughts."""
        return dataclasses.replace(self, think=None)


THINK = ("<think>", "</think>")
_BEGIN, _END = "<tool_call>", "</tool_call>"
_IN_CALL = {"<arg_key>": "key", _END: END, _BEGIN: RESTART}

GLM = AnswerFormat(
    THINK,
    CallFormat(
        begin=_BEGIN,
        head_ends=("</arg_key>", "<arg_value>", _END),
        key_begin="<arg_key>",
        key_ends=("</arg_key>", "<arg_value>"),
        states={
            "head": {"<arg_key>": "key", "</arg_key>": "after key", "<arg_value>": "value", _END: END},
            "key": {**_IN_CALL, "</arg_key>": "after key", "<arg_value>": "value"},
            "after key": {**_IN_CALL, "<arg_value>": "value", "</arg_value>": "after value"},
            "value": {"</arg_value>": "after value"},
            "after value": _IN_CALL,
        },
        read=lambda body, tools, number: read_tagged(body, tools),
        followed={"</arg_value>": (("<arg_key>",), (_END,), ("</arg_key>", "<arg_key>"), ("</arg_key>", _END))},
    ),
)


def _json_states(begin: str, separator: str, end: str) -> dict[str, dict[str, str]]:
    """A head, then JSON after the separator; inside a JSON string only its end is a delimiter."""
    return {
        "head": {separator: "arguments", end: END},
        "arguments": {'"': "string", end: END, begin: RESTART},
        "string": {'"': "arguments", '\\"': "string", "\\\\": "string"},
    }


_CALL_BEGIN, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"

DEEPSEEK_V3 = AnswerFormat(
    THINK,
    CallFormat(
        begin=_CALL_BEGIN,
        head_ends=(SEPARATOR, _CALL_END),
        states=_json_states(_CALL_BEGIN, SEPARATOR, _CALL_END),
        read=lambda body, tools, number: read_fenced(body, tools),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        head_prefix="function",
    ),
)
DEEPSEEK_V31 = AnswerFormat(
    THINK,
    dataclasses.replace(
        DEEPSEEK_V3.calls, read=lambda body, tools, number: read_separated(body, tools), head_prefix=None
    ),
)

_KIMI_BEGIN, _KIMI_END = "<|tool_call_begin|>", "<|tool_call_end|>"

KIMI_K2 = AnswerFormat(
    THINK,
    CallFormat(
        begin=_KIMI_BEGIN,
        head_ends=(ARGUMENTS, _KIMI_END),
        states=_json_states(_KIMI_BEGIN, ARGUMENTS, _KIMI_END),
        read=read_with_id,
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        name=ID,
        head_prefix="functions",
    ),
)
