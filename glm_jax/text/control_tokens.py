"""Which tokens steer a conversation, and text that can never become one of them.

A control token is a token that ends a turn, opens thoughts, brackets a tool's result: what only the chat template may
write. Everything else in a prompt comes from messages and tools, where a user, a tool or a fetched page may have
written the same characters. `Guard` puts a character that nobody uses after every character of such text with which a
control token could begin. A template may cut and join texts as it likes: the control tokens of what it renders are then
exactly those that it wrote itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from glm_jax.errors import TextError
from glm_jax.text.template_values import Arguments
from glm_jax.text.tokenizer_protocol import Tokenizer

# Delimiters that an assistant's own earlier turns may contain: templates read its thoughts out of them.
OWN_DELIMITERS = ("<think>", "</think>")
# Characters that no text should have: Unicode's noncharacters, then those for private use.
_CANDIDATES = [*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900))]
_BRACKETED = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)


def control_tokens(tokenizer: Tokenizer, template_text: str) -> dict[str, int]:
    """Returns text -> id of the tokens that only a template may write.

    Of the added tokens those that are flagged special, those in the form of markup (`<think>`, `[gMASK]`), and those
    that the template's own text contains (`/nothink`). White space is none, nor are words that someone added, which
    may well stand in a template too.

    Args:
        tokenizer: whose they are.
        template_text: what the template itself may write.
    """
    special = tokenizer.special_ids

    def steers(text: str, token_id: int) -> bool:
        if not text.strip():
            return False
        written = text in template_text and not text.strip().isalnum()
        return token_id in special or written or _BRACKETED.fullmatch(text.strip()) is not None

    return {text: i for text, i in tokenizer.added_tokens.items() if steers(text, i)}


def unused_characters(values: Any, number: int) -> list[str]:
    """Returns characters that stand in none of the texts of some values, neither as they are nor as escapes of JSON.

    Raises:
        TextError: the texts have all that come into question.
    """
    found = set(_CANDIDATES)
    for text in _texts(values):
        if not text.isascii():
            found -= set(str(text))
        if "\\u" in text:
            found -= {chr(int(digits, 16)) for digits in re.findall(r"\\u([0-9a-fA-F]{4})", text)}
    chosen = list(itertools.islice((character for character in _CANDIDATES if character in found), number))
    if len(chosen) < number:
        raise TextError("the messages contain every character that could mark what they wrote; leave one out")
    return chosen


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
        if isinstance(value, Arguments):
            yield str(value)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


class Guard:
    """Keeps the text of messages and tools from becoming control tokens.

    Args:
        tokens: the control tokens' texts.
        character: one that stands nowhere in what is guarded.
    """

    def __init__(self, tokens: Iterable[str], character: str):
        longest_first = sorted(tokens, key=len, reverse=True)
        self.character = character
        # The lookahead is for tokens of one character, which the guarding character follows but does not cut.
        self._find = re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?!{character})")
        starts = {token[0] for token in longest_first if not token[0].isalnum() and not token[0].isspace()}
        one_of_starts = f"[{''.join(map(re.escape, sorted(starts)))}]" if starts else "(?!)"
        words = [token for token in longest_first if token[0] not in starts]
        starts_of_words = [f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in words]
        self._start = re.compile("|".join([one_of_starts, *starts_of_words]))
        own = "|".join(map(re.escape, OWN_DELIMITERS))
        self._own_or_start = re.compile(f"(?P<own>{own})|{self._start.pattern}")

    def guard(self, value: Any) -> Any:
        """Returns a copy of a value (text, dicts, lists) in which no text is or begins a control token."""
        return self._guarded(value, self._start)

    def guard_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a message; the content of an assistant keeps the delimiters of thoughts."""
        result = {key: self.guard(value) for key, value in message.items()}
        if message.get("role") == "assistant":
            result["content"] = self._guarded(message["content"], self._own_or_start)
        return result

    def _guarded(self, value: Any, start: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return self._marked(value, start)
        if isinstance(value, Arguments):
            values = {self._guarded(key, start): self._guarded(inner, start) for key, inner in value.items()}
            return Arguments(values, self._marked(str(value), start))
        if isinstance(value, Mapping):
            return {self._guarded(key, start): self._guarded(inner, start) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(inner, start) for inner in value]
        return value

    def _marked(self, text: str, start: re.Pattern[str]) -> str:
        return start.sub(lambda found: found[0] + ("" if found.lastgroup == "own" else self.character), text)

    def written(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Returns a rendered text without the guarding characters, and where the template wrote control tokens."""
        text: list[str] = []
        spans: list[tuple[int, int]] = []
        size = end = 0
        for found in self._find.finditer(rendered):
            between = self._plain(rendered[end : found.start()])
            text += [between, found.group()]
            size += len(between)
            spans.append((size, size + len(found.group())))
            size, end = spans[-1][1], found.end()
        return "".join([*text, self._plain(rendered[end:])]), spans

    def _plain(self, text: str) -> str:
        escape = f"\\u{ord(self.character):04x}"  # as a template's JSON may have it
        return text.replace(self.character, "").replace(escape, "")
