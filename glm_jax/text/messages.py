"""Messages of the OpenAI form, put in order once, so that no template and no caller needs to know the traps.

Content that is None, content in parts, tool arguments as JSON text or encoded twice, thoughts under another name: after
this module there is one form of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.errors import TextError
from glm_jax.text.argument_values import MOST_ENCODINGS
from glm_jax.text.template_values import Arguments

# The names under which clients send an assistant's thoughts back, the best known first.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TEXT_PARTS = (None, "text", "input_text", "output_text")


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns copies of OpenAI-form messages as templates want them.

    Keys that are None and empty tool_calls are dropped. Content that is missing becomes "", except beside tool calls:
    there it is None, which some templates test for, and which prints as nothing. Parts that are all text are joined to
    one text; other parts are left to the template, except in a tool's result, which is text. Thoughts under another
    name, or in parts of an assistant's content, also stand under reasoning_content. Tool arguments given as JSON text
    become an object that keeps its text.

    Raises:
        TextError: not a list of dicts, a role that is missing, content of another form, arguments that are not a JSON
            object.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TextError(f'messages must be a list of {{"role": ..., "content": ...}}, not {kind_of(messages)}')
    return [_normalize_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """Returns the declared tools, None if there are none.

    Raises:
        TextError: they are not a list of dicts.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise TextError(f"tools must be a list, not {kind_of(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TextError(f'tools[{i}] must be {{"type": "function", "function": {{...}}}}, not {kind_of(tool)}')
    return list(tools) or None


def _normalize_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TextError(f'{where} must be a dict with "role" and "content", not {kind_of(message)}')
    # The order of the keys stays: a template may print a message whole.
    result = {key: value for key, value in message.items() if value is not None or key == "content"}
    if not isinstance(result.get("role"), str):
        raise TextError(f'{where} has no "role"; it is "system", "user", "assistant" or "tool"')
    for key in REASONING_KEYS:
        if isinstance(result.get(key), list):
            result[key] = _read_parts(result[key], False, f"{where}.{key}")
    content = result.get("content")
    if result["role"] == "assistant" and isinstance(content, list | tuple):
        found, result["content"] = _without_thoughts(content)
        if found:
            result.setdefault("reasoning_content", "".join(found))
    thoughts = next((result[key] for key in REASONING_KEYS if key in result), None)
    if thoughts is not None:
        result["reasoning_content"] = thoughts
    calls = result.get("tool_calls")
    if not calls:
        result.pop("tool_calls", None)
    else:
        if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
            raise TextError(f"{where}.tool_calls must be a list, not {kind_of(calls)}")
        result["tool_calls"] = [_normalize_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = result.get("content")
    if content is None:
        content = None if calls else ""
    elif isinstance(content, list | tuple):
        content = _read_parts(content, result["role"] == "tool", f"{where}.content")
    elif not isinstance(content, str):
        raise TextError(f"{where}.content must be text or a list of parts, not {kind_of(content)}; write it as JSON")
    result["content"] = content
    return result


def _without_thoughts(parts: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """The texts of the parts of an assistant's content that are thoughts, and the other parts."""
    thoughts: list[str] = []
    others: list[Any] = []
    for part in parts:
        text = part.get("thinking") if isinstance(part, Mapping) and part.get("type") == "thinking" else None
        if isinstance(text, str):
            thoughts.append(text)
        else:
            others.append(part)
    return thoughts, others


def _read_parts(parts: Sequence[Any], is_result: bool, where: str) -> str | list[Any]:
    """The text of parts that are all text, else the parts, those with text in the one form that templates know."""
    texts = [_text_of(part) for part in parts if part is not None]
    if None not in texts:
        return "".join(text for text in texts if text is not None)
    result: list[Any] = []
    for i, (part, text) in enumerate(zip([part for part in parts if part is not None], texts, strict=True)):
        if is_result and text is None and not (isinstance(part, Mapping) and "output" in part):
            form = repr(part.get("type")) if isinstance(part, Mapping) else kind_of(part)
            raise TextError(f"{where}[{i}] is a part of type {form}; a tool's result is text")
        if text is None or isinstance(part, str):
            result.append(part)
        else:
            result.append(text if is_result else {"type": "text", "text": text})
    return result


def _text_of(part: Any) -> str | None:
    """The text of a part, None if it is something else."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS or "text" not in part:
        return None
    text = part["text"]
    return "" if text is None else text if isinstance(text, str) else None


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    """A copy of one tool call, its arguments an object, whether or not they stand in a "function" object."""
    if not isinstance(call, Mapping):
        raise TextError(f"{where} must be a dict, not {kind_of(call)}")
    if "function" in call:
        return {**call, "function": _normalize_call(call["function"], f"{where}.function")}
    if not isinstance(call.get("name"), str):
        raise TextError(f'{where} has no "name"')
    return {**call, "arguments": _read_arguments(call.get("arguments"), where)}


def _read_arguments(arguments: Any, where: str) -> Arguments:
    if isinstance(arguments, Arguments):
        return arguments
    text = None
    for _ in range(MOST_ENCODINGS):  # an object that was encoded again and again is the object
        if not isinstance(arguments, str):
            break
        text = arguments.strip() or "{}"
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{where}.arguments is not a JSON object: {error}") from error
    if arguments is None:
        arguments, text = {}, "{}"
    if not isinstance(arguments, Mapping):
        raise TextError(f"{where}.arguments must be a JSON object, not {kind_of(arguments)}")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise TextError(f"{where}.arguments has a value that is not JSON: {error}") from error
    except RecursionError as error:
        raise TextError(f"{where}.arguments nests too deeply") from error
    return Arguments(arguments, text)


def kind_of(value: Any) -> str:
    """A value's type, as error messages name it."""
    return "None" if value is None else f"a {type(value).__name__}"
