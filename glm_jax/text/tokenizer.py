"""A checkpoint's tokenizer: tokenizer.json, Kimi's tiktoken.model or a SentencePiece model, behind one protocol."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from glm_jax.errors import TextError
from glm_jax.text.guarded_backend import GuardedBackend
from glm_jax.text.json_file import read_json_object, read_json_object_if_present
from glm_jax.text.tiktoken_tokenizer import TiktokenTokenizer
from glm_jax.text.tokenizer_protocol import Tokenizer, between, encodable, is_id, known_ids, read_added_tokens


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
        self._added = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}
        self._guarded: GuardedBackend | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.vocab_size} ids)"

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
        return list(self._backend.encode(encodable(text), add_special_tokens=False).ids)

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The added tokens."""
        return self._added

    def encode_guarded(self, text: str, control: Mapping[str, int], spans: Sequence[tuple[int, int]]) -> list[int]:
        """See Tokenizer.encode_guarded."""
        if self._guarded is None or self._guarded.control != control:
            self._guarded = GuardedBackend(self._backend, control)
        return self._guarded.encode(encodable(text), spans)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """See Tokenizer.decode."""
        return str(self._backend.decode(known_ids(self, ids, skip_special), skip_special_tokens=False))

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
            added, special = read_added_tokens(listed, config)
            return cls(path, added, special)
        plain = path.with_name("added_tokens.json")
        added = read_json_object_if_present(plain)
        if not all(is_id(i) for i in added.values()):
            raise TextError(f'{plain}: must map tokens to ids, like {{"<think>": 32000}}')
        return cls(path, added)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.vocab_size} ids)"

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
        for match in self._split.finditer(encodable(text)):
            if match.start() > end:
                ids += self._model.encode(text[end : match.start()])
            ids.append(self._added[match.group()])
            end = match.end()
        if end < len(text):
            ids += self._model.encode(text[end:])
        return ids

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The added tokens and the model's control pieces."""
        return self._added

    def encode_guarded(self, text: str, control: Mapping[str, int], spans: Sequence[tuple[int, int]]) -> list[int]:
        """See Tokenizer.encode_guarded."""
        others = sorted((token for token in self._added if token not in control), key=len, reverse=True)
        split = re.compile("|".join(map(re.escape, others)) or "(?!)")
        ids: list[int] = []
        for plain, token in between(encodable(text), spans):
            end = 0
            for match in split.finditer(plain):
                ids += [*self._encode_plain(plain[end : match.start()], control), self._added[match.group()]]
                end = match.end()
            ids += self._encode_plain(plain[end:], control)
            ids += [control[token]] if token else []
        return ids

    def _encode_plain(self, text: str, control: Mapping[str, int]) -> list[int]:
        """The ids of text without added tokens; a piece of the model that is a control token is cut in two."""
        ids: list[int] = self._model.encode(text) if text else []
        token = next((token for token, i in control.items() if i in ids), None)
        if token is None:
            return ids
        cut = text.find(token) + 1
        if not 0 < cut < len(text):
            raise TextError(
                f"{self.path}: makes {token!r} of plain text, so that it cannot be told from a control token"
            )
        return [*self._encode_plain(text[:cut], control), *self._encode_plain(text[cut:], control)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """See Tokenizer.decode."""
        parts: list[str] = []
        for run in self._runs(known_ids(self, ids, skip_special)):
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


def load_tokenizer(directory: str | os.PathLike[str]) -> JsonTokenizer | SentencePieceTokenizer | TiktokenTokenizer:
    """Returns the tokenizer of a checkpoint directory: `tokenizer.json`, or else `tiktoken.model`, or else `*.model`.

    A `tiktoken.model` is read as Kimi's; another `*.model` is a SentencePiece model.

    Raises:
        TextError: there is no such directory, no tokenizer that can be read, or more than one SentencePiece model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise TextError(f"{directory}: is not a directory; a tokenizer is read from the directory of its checkpoint")
    if (directory / "tokenizer.json").exists():
        return JsonTokenizer(directory / "tokenizer.json")
    if (directory / "tiktoken.model").exists():
        return TiktokenTokenizer.load(directory / "tiktoken.model")
    models = sorted(directory.glob("*.model"))
    if (directory / "tokenizer.model").exists():
        models = [directory / "tokenizer.model"]
    if not models:
        raise TextError(
            f"{directory}: has no tokenizer; looked for tokenizer.json, tiktoken.model or a SentencePiece *.model"
        )
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise TextError(
            f"{directory}: has several SentencePiece models ({names}); keep one, or name it tokenizer.model"
        )
    return SentencePieceTokenizer.load(models[0])


def beginning_ids(directory: str | os.PathLike[str], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that a plain text begins with, where the checkpoint wants such: DeepSeek's does, GLM's does not.

    That is `bos_token` of `tokenizer_config.json` where `add_bos_token` stands beside it. Chat templates write it
    themselves, so that it belongs before plain text alone; no tokenizer's `encode` adds it.

    Raises:
        TextError: the file cannot be read, or the token is none of the tokenizer's.
    """
    path = Path(directory) / "tokenizer_config.json"
    config = read_json_object_if_present(path)
    token = config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if config.get("add_bos_token") is not True or token is None:
        return []
    found = tokenizer.token_id(token) if isinstance(token, str) else None
    if found is None:
        raise TextError(f"{path}: bos_token is {token!r}; it must be a token of the tokenizer")
    return [found]
