"""Tool calls with arguments as a JSON object: those of DeepSeek-V3 and R1, DeepSeek-V3.1, and Kimi K2.

Arguments that were encoded twice, as a whole or one by one where the tool's schema allows no string, are decoded.
"""

from __future__ import annotations

import re
from typing import Any

from glm_jax.text.argument_values import decode_values, read_object
from glm_jax.text.call_ids import name_of_call, new_call_id
from glm_jax.text.events import ToolCall
from glm_jax.text.tool_schemas import Tools

SEPARATOR = "<｜tool▁sep｜>"
ARGUMENTS = "<|tool_call_argument_begin|>"
_FENCE = "```"
_NAME = re.compile(r"[^\s<>]+")


def _call(name: str, arguments: dict[str, Any] | None, tools: Tools, call_id: str | None = None) -> ToolCall | None:
    if arguments is None or not _NAME.fullmatch(name):
        return None
    return ToolCall(name, decode_values(arguments, tools.get(name)), call_id)


def read_fenced(body: str, tools: Tools) -> ToolCall | None:
    """DeepSeek-V3 and R1: `function`, separator, name, a fenced block of JSON."""
    kind, _, rest = body.partition(SEPARATOR)
    name, fence, block = rest.partition(_FENCE)
    block = block.rstrip()
    if kind.strip() != "function" or not fence or not block.endswith(_FENCE):
        return None
    return _call(name.strip(), read_object(block.removesuffix(_FENCE).lstrip().removeprefix("json")), tools)


def read_separated(body: str, tools: Tools) -> ToolCall | None:
    """DeepSeek-V3.1: name, separator, JSON."""
    name, separator, arguments = body.partition(SEPARATOR)
    return _call(name.strip(), read_object(arguments), tools) if separator else None


def read_with_id(body: str, tools: Tools, number: int) -> ToolCall | None:
    """Kimi K2: id, separator, JSON. An id of another form is replaced by Kimi's own, with the call's number."""
    head, separator, text = body.partition(ARGUMENTS)
    arguments = read_object(text)
    if not separator or arguments is None:
        return None
    call_id = head.strip()
    named = name_of_call(call_id, arguments, tools)
    if named is None:
        return None
    if not named.keeps_id:
        call_id = new_call_id(named.name, number)
    return _call(named.name, named.arguments, tools, call_id)
