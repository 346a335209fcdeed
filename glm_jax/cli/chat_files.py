"""The JSON files of `glm-jax chat`: messages and tools in OpenAI's form. What is wrong names the file and the place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_jax.errors import InputError, TextError


def read_messages(name: str) -> list[dict[str, Any]]:
    """The conversation in a file: a list of messages, or an object that has one under `messages`.

    Raises:
        InputError: the file cannot be read or is no such list; file, and line or message.
    """
    from glm_jax.text import normalize_messages

    messages = _listed(name, "messages")
    with _naming(name):
        normalize_messages(messages)
    if not messages:
        raise InputError(f"{name}: has no messages; a conversation begins with one of a user")
    return messages


def read_tools(name: str) -> list[dict[str, Any]]:
    """The tools in a file: a list of declarations, or an object that has one under `tools`.

    Raises:
        InputError: as `read_messages`.
    """
    from glm_jax.text.messages import check_tools

    tools = _listed(name, "tools")
    with _naming(name):
        check_tools(tools)
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            right = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
            raise InputError(f"{name}: tools[{number}] has no name; right would be {right}")
    return tools


def _listed(name: str, key: str) -> list[Any]:
    try:
        value = json.loads(Path(name).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}; --{key} takes a JSON file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{name}: nests too deeply") from error
    if isinstance(value, dict) and key in value:
        value = value[key]
    if not isinstance(value, list):
        raise InputError(f"{name}: holds a JSON {_KINDS[type(value)]}; a list of {key} was expected")
    return value


_KINDS = {dict: "object", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except TextError as error:
        raise InputError(f"{name}: {error}") from error
