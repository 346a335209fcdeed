"""Text to token ids and back: tokenizer.json or a SentencePiece model, behind one small protocol.

Nothing here adds a beginning or an end of sequence: GLM's prefix `[gMASK]<sop>` is the chat template's business. Ids
that no token has (the embedding is padded beyond the vocabulary) decode to nothing. "Special" is what the tokenizer's
own files flag as special; GLM's `<think>`, `<tool_call>` and their kin are added tokens without the flag, so they
survive `skip_special=True`. Padding, truncation and batches are left out: the callers work on lists of ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from glm_jax.errors import TextError
from glm_jax.text.json_file import read_json_object, read_json_object_if_present

REPLACEMENT = "\ufffd"
# An incomplete UTF-8 character is at most three bytes, and a decoder writes at most one replacement character for each.
LONGEST_INCOMPLETE = 3
LONGEST_WINDOW = 64  # tokens, about


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the tokens that their files flag as special; `decode(skip_special=True)` drops exactly these."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which added tokens are recognised; nothing is put before or after it."""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; an id without a token is passed over, bytes that are not UTF-8 become U+FFFD."""

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text, None if there is no such token."""


class JsonTokenizer:
    """A `tokenizer.json` of the Hugging Face form.

    Args:
        path: the file.

    Raises:
        TextError: the file is missing, empty, not JSON or not a tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        read_json_object(self.path)  # for the clearer error; the library names neither the file nor the place
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise TextError(f"{self.path}: is not a tokenizer.json ({error})") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_ids = frozenset(
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        self._vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids flagged as special."""
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode; TextError for text that has no UTF-8 form."""
        return list(self._backend.encode(_encodable(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """See Tokenizer.decode."""
        return str(self._backend.decode(_known(self, ids, skip_special), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """See Tokenizer.token_id."""
        found: int | None = self._backend.token_to_id(token)
        return found


class SentencePieceTokenizer:
    """A SentencePiece model, with the added tokens of the JSON files beside it.

    Added tokens and the model's control pieces are recognised in the text; what stands between them is encoded piece by
    piece, each stretch on its own, and decoded the same way, so that a stretch's leading space is dropped again.

    Args:
        path: the `*.model` file.
        added: text -> id of the added tokens.
        special: the added tokens that are special.

    Raises:
        TextError: the file is missing, empty or no SentencePiece model.
    """

    def __init__(
        self, path: str | os.PathLike[str], added: dict[str, int] | None = None, special: frozenset[str] = frozenset()
    ):
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
            if not data:
                raise TextError(f"{self.path}: is empty; a SentencePiece model was expected")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except OSError as error:
            raise TextError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        except (RuntimeError, ValueError) as error:
            raise TextError(f"{self.path}: is not a SentencePiece model; the file may be cut off") from error
        size = int(self._model.vocab_size())
        control = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        self._added = {**control, **(added or {})}
        self._texts = {i: text for text, i in self._added.items()}
        self._special_ids = frozenset({*control.values(), *(self._added[text] for text in special)})
        self._vocab_size = max([size, *(i + 1 for i in self._added.values())])
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SentencePieceTokenizer:
        """Reads a model and the added tokens of `tokenizer_config.json`, or else of `added_tokens.json`, beside it."""
        path = Path(path)
        config = path.with_name("tokenizer_config.json")
        listed = read_json_object_if_present(config).get("added_tokens_decoder")
        if listed:
            added, special = _added_tokens(listed, config)
            return cls(path, added, special)
        plain = path.with_name("added_tokens.json")
        added = read_json_object_if_present(plain)
        if not all(_is_id(i) for i in added.values()):
            raise TextError(f'{plain}: must map tokens to ids, like {{"<think>": 32000}}')
        return cls(path, added)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """The model's control pieces and the added tokens flagged as special."""
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode; TextError for text that has no UTF-8 form."""
        ids: list[int] = []
        end = 0
        for match in self._split.finditer(_encodable(text)):
            if match.start() > end:
                ids += self._model.encode(text[end : match.start()])
            ids.append(self._added[match.group()])
            end = match.end()
        if end < len(text):
            ids += self._model.encode(text[end:])
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """See Tokenizer.decode."""
        parts: list[str] = []
        for run in self._runs(_known(self, ids, skip_special)):
            parts.append(run if isinstance(run, str) else self._model.decode(run))
        return "".join(parts)

    def _runs(self, ids: list[int]) -> Iterator[str | list[int]]:
        """Yields added tokens as text and the stretches between them as ids of the model."""
        run: list[int] = []
        for i in ids:
            if i not in self._texts:
                if i < self._model.vocab_size():
                    run.append(i)
                continue
            if run:
                yield run
                run = []
            yield self._texts[i]
        if run:
            yield run

    def token_id(self, token: str) -> int | None:
        """See Tokenizer.token_id."""
        if token in self._added:
            return self._added[token]
        found = int(self._model.piece_to_id(token))
        return found if self._model.id_to_piece(found) == token else None


def load_tokenizer(directory: str | os.PathLike[str]) -> JsonTokenizer | SentencePieceTokenizer:
    """Returns the tokenizer of a checkpoint directory: `tokenizer.json`, or else its SentencePiece `*.model`.

    Raises:
        TextError: there is no such directory, no tokenizer that can be read, or more than one `*.model`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise TextError(f"{directory}: is not a directory; a tokenizer is read from the directory of its checkpoint")
    if (directory / "tokenizer.json").exists():
        return JsonTokenizer(directory / "tokenizer.json")
    models = sorted(directory.glob("*.model"))
    if (directory / "tokenizer.model").exists():
        models = [directory / "tokenizer.model"]
    looked_for = "tokenizer.json or a SentencePiece *.model"
    if [model.name for model in models] == ["tiktoken.model"]:
        raise TextError(f"{models[0]}: is a tiktoken file, which is not read; put its tokenizer.json beside it")
    if not models:
        raise TextError(f"{directory}: has no tokenizer; looked for {looked_for}")
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise TextError(
            f"{directory}: has several SentencePiece models ({names}); keep one, or name it tokenizer.model"
        )
    return SentencePieceTokenizer.load(models[0])


class StreamDecoder:
    """Turns ids into text one at a time: the deltas and the flush, joined, are `decode` of all the ids.

    A character whose bytes are spread over several tokens comes out whole, with the last of them. Only a window of
    tokens is decoded again with each id: those whose text is not all out, after the last ones that showed something,
    which give the decoder its context (a SentencePiece decoder drops the first spaces of what it is given). One
    exception to the equality: a `tokenizer.json` with byte fallback decodes a whole run of byte tokens anew when its
    end turns out not to be UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []  # tokens whose text is out
        self._pending: list[int] = []  # tokens whose text is not, or only in part
        self._out = 0  # characters of decode(context + pending) that are out

    def push(self, token_id: int) -> str:
        """Returns the text that is complete with this id and was not before."""
        if not _known(self._tokenizer, [token_id], self._skip_special):
            return ""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._context + self._pending)
        held = len(text) - len(text.rstrip(REPLACEMENT))
        stable = max(len(text) - min(held, LONGEST_INCOMPLETE), self._out)
        delta = text[self._out : stable]
        self._out = stable
        if delta.strip(" ") and not held:
            self._restart(self._pending)
        elif len(self._context) + len(self._pending) > LONGEST_WINDOW:
            self._cut(text)
        return delta

    def flush(self) -> str:
        """Returns what was held back, incomplete characters as U+FFFD, and starts anew."""
        rest = self._tokenizer.decode(self._context + self._pending)[self._out :]
        self._restart([])
        return rest

    def _restart(self, context: list[int]) -> None:
        self._context, self._pending = context, []
        self._out = len(self._tokenizer.decode(context))

    def _cut(self, text: str) -> None:
        """Shortens the window in a long run of spaces, or of bytes that are no UTF-8, where that changes nothing."""
        window = self._context + self._pending
        tail = window[-LONGEST_WINDOW // 4 :]
        head_text = self._tokenizer.decode(window[: -len(tail)])
        if self._out >= len(head_text) and head_text + self._tokenizer.decode(tail) == text:
            self._context, self._pending = [], tail
            self._out -= len(head_text)


def _known(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool) -> list[int]:
    """The ids that can have a token, as Python integers, without the special ones if asked."""
    dropped = tokenizer.special_ids if skip_special else frozenset()
    return [int(i) for i in ids if 0 <= i < tokenizer.vocab_size and int(i) not in dropped]


def _encodable(text: str) -> str:
    if not isinstance(text, str):
        raise TextError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text has half of a surrogate pair at character {error.start}; it has no UTF-8 form"
        ) from error
    return text


def _added_tokens(listed: Any, path: Path) -> tuple[dict[str, int], frozenset[str]]:
    """Text -> id, and the texts flagged special, of `added_tokens_decoder`."""
    if not isinstance(listed, dict):
        raise TextError(f"{path}: added_tokens_decoder must be an object of id -> token")
    added: dict[str, int] = {}
    special = set()
    for key, token in listed.items():
        if not key.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise TextError(
                f'{path}: added_tokens_decoder["{key}"] must be a token id with an object that has "content"'
            )
        added[token["content"]] = int(key)
        if token.get("special", False):
            special.add(token["content"])
    return added, frozenset(special)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
