"""A conversation before and after a template: prepared, guarded against control tokens, rendered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from glm_jax.text.control_tokens import Guard

SPECIAL_TOKEN_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a template renders, in the one form that all templates take.

    Attributes:
        messages: see `normalize_messages`.
        tools: the declared ones; None without any.
        variables: everything else that the template sees.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    variables: Mapping[str, Any]

    def guarded(self, guard: Guard) -> Conversation:
        """The same with texts that can become no control token."""
        kept = {name: value for name, value in self.variables.items() if name in SPECIAL_TOKEN_VARIABLES}
        messages = [guard.guard_message(message) for message in self.messages]
        return Conversation(messages, guard.guard(self.tools), {**guard.guard(self.variables), **kept})


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        text: the prompt.
        generation: where in the text stands what the assistant writes, by the template's `{% generation %}` blocks.
    """

    text: str
    generation: tuple[tuple[int, int], ...] = ()


def without_brackets(text: str, before: str, after: str) -> Rendered:
    """Takes the characters around `{% generation %}` blocks out and says where they stood."""
    if before not in text:
        return Rendered(text)
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    size = 0
    for i, piece in enumerate(text.replace(after, before + after).split(before)):
        closes = piece.startswith(after)
        piece = piece.removeprefix(after)
        if closes and starts:
            spans.append((starts.pop(), size))
        elif i:
            starts.append(size)
        parts.append(piece)
        size += len(piece)
    return Rendered("".join(parts), tuple(sorted(spans)))
