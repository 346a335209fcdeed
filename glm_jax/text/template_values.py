"""The values that templates see where templates disagree on what they want.

A checkpoint's template may want a call's arguments as an object or as JSON text, and content that is absent as None or
as text. These values are both, so that the template decides by what it does with them. What would be printed as Python
is refused instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from glm_jax.errors import TextError


class Arguments(dict[str, Any]):
    """A call's arguments: an object that is its JSON text where a template prints it or adds it to text.

    Args:
        values: by name.
        text: as the client wrote it; by default the values as JSON.
    """

    def __init__(self, values: Mapping[str, Any], text: str | None = None):
        super().__init__(values)
        self.__text = text

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self.__text is None else self.__text

    def __add__(self, other: Any) -> str:
        return str(self) + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return other + str(self) if isinstance(other, str) else NotImplemented


class TextPart(dict[str, Any]):
    """A text part that is its text where a template prints it or adds it to text."""

    def __init__(self, text: str):
        super().__init__(type="text", text=text)

    def __str__(self) -> str:
        return str(self["text"])

    def __add__(self, other: Any) -> str:
        return str(self) + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return other + str(self) if isinstance(other, str) else NotImplemented


class Text(str):
    """Content that is text, and one text part where a template goes through its parts."""

    def __iter__(self) -> Iterator[Any]:
        return iter([TextPart(str(self))] if self else [])


class NoContent(str):
    """Content that is absent: text without a character that is also none."""

    def __new__(cls) -> NoContent:
        """Returns the empty text."""
        return super().__new__(cls, "")

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def is_none(value: Any) -> bool:
    """Jinja's test `none`."""
    return value is None or isinstance(value, NoContent)


class Parts(list[Any]):
    """Content in parts, for templates that go through them; printing them whole is refused."""

    def __init__(self, parts: Iterable[Any], where: str):
        super().__init__(
            Part(part, f"{where}[{i}]") if isinstance(part, Mapping) else part for i, part in enumerate(parts)
        )
        self._where = where

    def __str__(self) -> str:
        raise TextError(f"{self._where}: the template takes text alone, and not all of these parts are text")


class Part(dict[str, Any]):
    """One part of content; printing it whole is refused."""

    def __init__(self, part: Mapping[str, Any], where: str):
        super().__init__(part)
        self._where = where

    def __str__(self) -> str:
        raise TextError(f"{self._where}: the template has no place for a part of type {self.get('type')!r}")


def for_template(message: Mapping[str, Any], where: str, *, arguments_as_text: bool = False) -> dict[str, Any]:
    """Returns a normalised message as a template sees it.

    Args:
        message: see `normalize_messages`.
        where: what errors call it.
        arguments_as_text: the arguments of calls are text and nothing else.
    """
    result = dict(message)
    content = result["content"]
    if content is None:
        result["content"] = NoContent()
    elif isinstance(content, str):
        result["content"] = Text(content)
    elif isinstance(content, list):
        result["content"] = Parts(content, f"{where}.content")
    if arguments_as_text and result.get("tool_calls"):
        result["tool_calls"] = [_with_text(call) for call in result["tool_calls"]]
    return result


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    return {**call, "arguments": str(call["arguments"])}
