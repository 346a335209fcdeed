"""What the parser finds in an answer: thoughts, text, tool calls, and calls that are none."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More of the thoughts."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One complete call; the arguments are JSON values, in the model's order.

    Attributes:
        name: the function's.
        arguments: by name.
        id: how the model itself calls this call (Kimi K2: `functions.name:0`), None where it gives calls no names. Its
            result is returned under this id.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class MalformedToolCall:
    """The text of a call that was cut off or cannot be read, with its opening tag."""

    text: str


Event = ReasoningDelta | ContentDelta | ToolCall | MalformedToolCall
