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
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from glm_jax.text.argument_values import read_value
from glm_jax.text.events import ToolCall

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> parameter name -> schema
END = ""  # the state after the delimiter that closes a call


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How calls are written.

    Attributes:
        begin: the delimiter before a call.
        states: for each state inside a call, its delimiters and the state that follows each of them. The first state
            follows `begin`; END follows the call. In the state of a value only the end of the value is a delimiter, so
            that a value may contain the others as text.
        read: the text between `begin` and the closing delimiter, and the schemas, to the call; None if it is none.
        section: the delimiters around all calls of a turn, if there are such. A call without them counts too.
    """

    begin: str
    states: Mapping[str, Mapping[str, str]]
    read: Callable[[str, Schemas], ToolCall | None]
    section: tuple[str, str] | None = None


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


# -- GLM-4.5 ----------------------------------------------------------------------------------------------------------

_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_NAME = re.compile(r"\s*([^\s<>]+)\s*(?=<arg_key>|$)")


def _read_tagged(body: str, schemas: Schemas) -> ToolCall | None:
    name = _NAME.match(body)
    if name is None:
        return None
    known = schemas.get(name[1], {})
    arguments: dict[str, Any] = {}
    at = name.end()
    while (pair := _ARGUMENT.match(body, at)) is not None:
        key = pair[1].strip()
        arguments[key] = read_value(pair[2], known.get(key))
        at = pair.end()
    return None if body[at:].strip() else ToolCall(name[1], arguments)


GLM = AnswerFormat(
    ("<think>", "</think>"),
    CallFormat(
        begin="<tool_call>",
        states={"call": {"<arg_value>": "value", "</tool_call>": END}, "value": {"</arg_value>": "call"}},
        read=_read_tagged,
    ),
)


# -- arguments as JSON ------------------------------------------------------------------------------------------------


def _json_states(separator: str, end: str) -> dict[str, dict[str, str]]:
    """A head, then JSON after the separator; inside a JSON string nothing but its end is a delimiter."""
    return {
        "head": {separator: "arguments", end: END},
        "arguments": {'"': "string", end: END},
        "string": {'"': "arguments", '\\"': "string", "\\\\": "string"},
    }


def _read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that stands in a text, {} for none at all; line breaks inside strings are let pass."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, infinity, half surrogate pairs
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _call(name: str, arguments: str, call_id: str | None = None) -> ToolCall | None:
    values = _read_object(arguments)
    return ToolCall(name, values, call_id) if values is not None and re.fullmatch(r"[^\s<>]+", name) else None


THINK = ("<think>", "</think>")
_SEPARATOR, _CALL_END = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"


def _read_fenced(body: str, schemas: Schemas) -> ToolCall | None:
    kind, _, rest = body.partition(_SEPARATOR)
    name, fence, block = rest.partition(_FENCE)
    block = block.rstrip()
    if kind.strip() != "function" or not fence or not block.endswith(_FENCE):
        return None
    return _call(name.strip(), block.removesuffix(_FENCE).lstrip().removeprefix("json"))


def _read_separated(body: str, schemas: Schemas) -> ToolCall | None:
    name, separator, arguments = body.partition(_SEPARATOR)
    return _call(name.strip(), arguments) if separator else None


DEEPSEEK_V3 = AnswerFormat(
    THINK,
    CallFormat(
        begin="<｜tool▁call▁begin｜>",
        states=_json_states(_SEPARATOR, _CALL_END),
        read=_read_fenced,
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
)
DEEPSEEK_V31 = AnswerFormat(THINK, dataclasses.replace(DEEPSEEK_V3.calls, read=_read_separated))

_ARGUMENTS = "<|tool_call_argument_begin|>"
_CALLED = re.compile(r"([^\s<>]+):[0-9]+")


def _read_with_id(body: str, schemas: Schemas) -> ToolCall | None:
    head, separator, arguments = body.partition(_ARGUMENTS)
    call_id = head.strip()
    called = _CALLED.fullmatch(call_id.removeprefix("functions."))
    return _call(called[1], arguments, call_id) if separator and called else None


KIMI_K2 = AnswerFormat(
    THINK,
    CallFormat(
        begin="<|tool_call_begin|>",
        states=_json_states(_ARGUMENTS, "<|tool_call_end|>"),
        read=_read_with_id,
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
)
