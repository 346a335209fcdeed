"""What a tokenizer is to the rest of the package, and what its implementations share.

Nothing here adds a beginning or an end of sequence: GLM's prefix `[gMASK]<sop>` is the chat template's business. Ids
that no token has (the embedding is padded beyond the vocabulary) decode to nothing. "Special" is what the tokenizer's
own files flag as special; GLM's `<think>`, `<tool_call>` and their kin are added tokens without the flag, so they
survive `skip_special=True`. Padding, truncation and batches are left out: the callers work on lists of ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from glm_jax.errors import TextError


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the tokens that their files flag as special; `decode(skip_special=True)` drops exactly these."""

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Text -> id of the tokens that `encode` finds in a text before it splits what is between them."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which added tokens are recognised; nothing is put before or after it."""

    def encode_guarded(self, text: str, control: Mapping[str, int], spans: Sequence[tuple[int, int]]) -> list[int]:
        """The ids of `text`, in which the control tokens, some of the added ones, are recognised at `spans` alone.

        Args:
            text: to encode.
            control: text -> id.
            spans: begin and end of control tokens, in order.

        Raises:
            TextError: the text has no UTF-8 form, or the tokenizer makes a control token of plain characters.
        """

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; an id without a token is passed over, bytes that are not UTF-8 become U+FFFD."""

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text, None if there is no such token."""


def known_ids(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool) -> list[int]:
    """The ids that can have a token, as Python integers, without the special ones if asked."""
    dropped = tokenizer.special_ids if skip_special else frozenset()
    return [int(i) for i in ids if 0 <= i < tokenizer.vocab_size and int(i) not in dropped]


def between(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yields the text before each span and that of the span; after the last span the rest and ""."""
    end = 0
    for start, stop in spans:
        yield text[end:start], text[start:stop]
        end = stop
    yield text[end:], ""


def encodable(text: str) -> str:
    """Returns `text`; TextError if it is no str, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise TextError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text has half of a surrogate pair at character {error.start}; it has no UTF-8 form"
        ) from error
    return text


def read_added_tokens(listed: Any, path: Path) -> tuple[dict[str, int], frozenset[str]]:
    """Text -> id, and the texts flagged special, of `added_tokens_decoder`."""
    if not isinstance(listed, dict):
        raise TextError(f"{path}: added_tokens_decoder must be an object of id -> token")
    added: dict[str, int] = {}
    special = set()
    for key, token in listed.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not key.isdecimal() or not isinstance(content, str) or not content:
            raise TextError(
                f'{path}: added_tokens_decoder["{key}"] must be a token id with an object that has "content"'
            )
        if content in added:
            raise TextError(f"{path}: added_tokens_decoder: two tokens have the text {content!r}; each needs its own")
        added[content] = int(key)
        if token.get("special", False):
            special.add(content)
    return added, frozenset(special)


def is_id(value: Any) -> bool:
    """Whether a JSON value can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
