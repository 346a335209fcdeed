"""Arguments of tool calls as JSON values, with the help of the declared tools' schemas."""

from __future__ import annotations

import json
from typing import Any

from glm_jax.text.tool_schemas import ToolSchema, Types, types_of

MOST_ENCODINGS = 4  # of arguments that were encoded as JSON again and again


def read_json(text: str) -> Any:
    """Returns the JSON value that a text is; line breaks inside strings are let pass.

    Raises:
        ValueError: it is none, or has NaN, infinity, half of a surrogate pair or too much nesting.
    """
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("too much nesting") from error
    return value


def read_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object that a text is, {} for a blank text, None for anything else.

    An object that was encoded more than once, so that it is the text of a JSON string, counts as the object.
    """
    if not text.strip():
        return {}
    value: Any = text
    for _ in range(MOST_ENCODINGS):
        try:
            value = read_json(value)
        except ValueError:
            return None
        if not isinstance(value, str):
            break
    return value if isinstance(value, dict) else None


def read_value(text: str, types: Types | None) -> Any:
    """Returns an argument's value: the text as it is where only strings are allowed, else JSON if it is JSON.

    Where the schema allows strings among other types, JSON counts only if it is of one of the other types. Where it
    allows none, line breaks inside the strings of JSON are let pass.

    Args:
        text: as the model wrote it.
        types: that the schema allows; None if it does not say.
    """
    if types == frozenset({"string"}):
        return text
    try:
        value = json.loads(text.strip(), strict=types is None or "string" in types)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, infinity, half surrogate pairs
    except (ValueError, RecursionError):
        return text
    if types is not None and "string" in types and (isinstance(value, str) or not types_of(value) & types):
        return text
    return value


def decode_values(arguments: dict[str, Any], tool: ToolSchema | None) -> dict[str, Any]:
    """Returns arguments in which a string that the schema does not allow is the allowed JSON value that it encodes."""
    if tool is None:
        return arguments
    return {name: _decoded(value, tool.types.get(name)) for name, value in arguments.items()}


def _decoded(value: Any, types: Types | None) -> Any:
    if types is None or "string" in types or not isinstance(value, str):
        return value
    decoded = read_value(value, types)
    return decoded if types_of(decoded) & types else value
