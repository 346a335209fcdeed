"""GLM's tool calls: a name, then tagged keys and values; what models get wrong about the tags is mended if it is clear.

    name <arg_key>key</arg_key> <arg_value>value</arg_value> ...

A closing tag of a value counts only where another argument or the end of the call follows, so that a value may contain
it. Mended are: a key's tag written twice, a stray closing tag of a key, a missing `<arg_value>` (the text up to
`</arg_value>` is the value), a missing `</arg_key>` before `<arg_value>`, and a missing `<arg_key>` where the name or
the text before is followed by one of the tool's declared parameters. Anything else is no call: arguments are never left
out, and a key never contains `<`.
"""

from __future__ import annotations

import re
from typing import Any

from glm_jax.text.argument_values import read_value
from glm_jax.text.events import ToolCall
from glm_jax.text.tool_schemas import Tools

_TAG = re.compile(r"</?arg_(?:key|value)>")
_NAME = re.compile(r"[^\s<>]+")
_STRAY = r"\s*(?:</arg_key>\s*)*"
_KEY = re.compile(_STRAY + r"(?:<arg_key>\s*)+([^<>]*)(?:</arg_key>|(?=<arg_value>))")
_UNOPENED_KEY = re.compile(r"\s*([^\s<>]+)\s*</arg_key>")
_OPENING = re.compile(r"\s*(?:</?arg_key>\s*)*<arg_value>")
_NEXT_IS_A_KEY_OR_THE_END = re.compile(_STRAY + r"(?:<arg_key>|\Z)")
_TRAILING = re.compile(_STRAY + r"\Z")
_VALUE_END = "</arg_value>"


def read_tagged(body: str, tools: Tools) -> ToolCall | None:
    """Returns the call that the text between `<tool_call>` and `</tool_call>` is, None if it is none."""
    head = _read_head(body, tools)
    if head is None:
        return None
    name, key, at = head
    known = tools[name].types if name in tools else {}
    arguments: dict[str, Any] = {}
    while True:
        if key is None:
            found = _KEY.match(body, at) or _unopened_key(body, at, known)
            if found is None:
                break
            key, at = found[1].strip(), found.end()
        read = _read_value(body, at, known)
        if not key or read is None:
            return None
        text, at = read
        value = read_value(text, known.get(key))
        if key in arguments and arguments[key] != value:
            return None
        arguments[key] = value
        key = None
    rest = _TRAILING if arguments else re.compile(r"\s*\Z")
    return ToolCall(name, arguments) if rest.match(body, at) else None


def _read_head(body: str, tools: Tools) -> tuple[str, str | None, int] | None:
    """The name, the key that is glued to it if there is one, and where the rest begins."""
    tag = _TAG.search(body)
    end = len(body) if tag is None else tag.start()
    head = body[:end].strip()
    if tag is not None and tag.group() in ("</arg_key>", "<arg_value>"):
        glued = [
            (name, key)
            for name, tool in tools.items()
            for key in tool.types
            if head.startswith(name) and head[len(name) :].strip() == key
        ]
        if len(glued) == 1:
            ((name, key),) = glued
            return name, key, end
    return (head, None, end) if _NAME.fullmatch(head) else None


def _unopened_key(body: str, at: int, known: Any) -> re.Match[str] | None:
    """A declared parameter's name before `</arg_key>`, whose opening tag is missing."""
    found = _UNOPENED_KEY.match(body, at)
    return found if found is not None and found[1] in known else None


def _read_value(body: str, at: int, known: Any) -> tuple[str, int] | None:
    """A value's text and where it ends, None if it has no end."""
    opening = _OPENING.match(body, at)
    start = at if opening is None else opening.end()
    end = body.find(_VALUE_END, start)
    while end >= 0:
        after = end + len(_VALUE_END)
        if _NEXT_IS_A_KEY_OR_THE_END.match(body, after) or _unopened_key(body, after, known):
            break
        end = body.find(_VALUE_END, after)
    if end < 0:
        return None
    text = body[start:end]
    if opening is None:
        text = text.strip().removeprefix("</arg_key>").strip()
        return (text, after) if text and not _TAG.search(text) else None
    if _VALUE_END not in text and text.lstrip().startswith("<arg_value>"):  # the opening tag was written twice
        text = text.lstrip().removeprefix("<arg_value>")
    return text, after
