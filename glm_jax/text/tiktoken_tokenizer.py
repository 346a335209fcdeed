"""Kimi's tokenizer: a `tiktoken.model` of ranks, read without the remote code that its checkpoints bring.

The file holds the ranks alone. How text is split into pieces before they are merged, and the special tokens, stand in
Python code beside it on the hub; both are stated here again. The 256 ids after the ranks are special tokens: named by
`added_tokens_decoder` in `tokenizer_config.json`, or else as Kimi K2 names them; the rest are
`<|reserved_token_{id}|>`.

Exactly tiktoken's ids: `byte_pairs` merges by its rule, and the splitting is a regular expression with the intersection
of character classes, which the `tokenizers` library's engine has (only characters that its Unicode tables do not know
yet may be split otherwise). A long text is cut first, as the original does, into stretches of at most 400,000
characters and of at most 25,000 in a row that are all white space, or none.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers

from glm_jax.errors import TextError
from glm_jax.text.byte_pairs import merge_piece, read_ranks
from glm_jax.text.json_file import read_json_object_if_present
from glm_jax.text.tokenizer_protocol import between, encodable, known_ids, read_added_tokens

RESERVED = 256
STRETCH = 400_000
RUN = 25_000
CACHED_PIECES = 1 << 16
LONGEST_CACHED = 128  # bytes

# Kimi K2's names by place after the ranks, and those of them that a reader of the answer must see.
_NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
_VISIBLE = frozenset(name for name in _NAMES.values() if name.startswith("<|tool_call"))

# Chinese characters are split off as runs of their own, so that words are letters of every other script.
_OTHER_LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}{_OTHER_LETTERS}]", rf"[\p{{Ll}}{_OTHER_LETTERS}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
# 's 't 're 've 'm 'll 'd in either case; the long s is the one other character that is an s when case does not count.
_CONTRACTION = r"(?:'(?:[sSſtTmMdD]|[rRvV][eE]|[lL][lL]))?"
SPLIT_PATTERN = "|".join(
    (
        r"\p{Han}+",
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TiktokenTokenizer:
    """A rank list with Kimi's splitting and its special tokens. The text of a special token is read as that token.

    Args:
        path: the file of ranks.
        names: id -> text of the special tokens that have a name; Kimi K2's if there are none.
        special: which of these `decode(skip_special=True)` drops. Reserved tokens without a name are dropped too.

    Raises:
        TextError: a file that is no rank list, or names for ids that are not the 256 after the ranks.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        names: Mapping[int, str] | None = None,
        special: frozenset[str] | None = None,
    ):
        self.path = Path(path)
        self._ranks = read_ranks(self.path)
        first = len(self._ranks)
        self._vocab_size = first + RESERVED
        if not names:
            names = {first + place: name for place, name in _NAMES.items()}
            special = frozenset(names.values()) - _VISIBLE
        for i in names:
            if not first <= i < self._vocab_size:
                raise TextError(
                    f"{self.path}: has {first} ranks, so that special tokens have ids from {first} to "
                    f"{self._vocab_size - 1}; {names[i]!r} has id {i}, or ranks may have been lost"
                )
        texts = {i: names.get(i, f"<|reserved_token_{i}|>") for i in range(first, self._vocab_size)}
        self._special = {text: i for i, text in texts.items()}
        if len(self._special) < RESERVED:
            twice = next(text for i, text in texts.items() if self._special[text] != i)
            raise TextError(f"{self.path}: two special tokens have the text {twice!r}; each needs its own")
        hidden = set(texts.values()) - (set(names.values()) - (special or frozenset()))
        self._special_ids = frozenset(self._special[text] for text in hidden)
        self._bytes = sorted(self._ranks, key=self._ranks.__getitem__)
        self._bytes += [text.encode() for text in texts.values()]
        self._longest = max(map(len, self._ranks))
        self._find_special = re.compile(_one_of(set(self._special)))
        self._split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
        self._cached_merge = functools.lru_cache(CACHED_PIECES)(self._merge)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TiktokenTokenizer:
        """Reads a file of ranks and the special tokens of the `tokenizer_config.json` beside it."""
        path = Path(path)
        config = path.with_name("tokenizer_config.json")
        listed = read_json_object_if_present(config).get("added_tokens_decoder")
        if not listed:
            return cls(path)
        added, special = read_added_tokens(listed, config)
        return cls(path, {i: text for text, i in added.items()}, special)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.vocab_size} ids)"

    @property
    def vocab_size(self) -> int:
        """One more than the id of the last reserved token."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens flagged as such, and the reserved ones without a name."""
        return self._special_ids

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The special tokens."""
        return self._special

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode; TextError for text that has no UTF-8 form."""
        ids: list[int] = []
        for stretch in _stretches(encodable(text)):
            end = 0
            for match in self._find_special.finditer(stretch):
                self._encode_plain(stretch[end : match.start()], ids)
                ids.append(self._special[match.group()])
                end = match.end()
            self._encode_plain(stretch[end:], ids)
        return ids

    def encode_guarded(self, text: str, control: Mapping[str, int], spans: Sequence[tuple[int, int]]) -> list[int]:
        """See Tokenizer.encode_guarded; special tokens that are not control tokens are plain text too."""
        ids: list[int] = []
        for plain, token in between(encodable(text), spans):
            for stretch in _stretches(plain):
                self._encode_plain(stretch, ids)
            ids += [control[token]] if token else []
        return ids

    def _encode_plain(self, text: str, ids: list[int]) -> None:
        """Adds the ids of text without special tokens."""
        for piece, _ in self._split.pre_tokenize_str(text):
            data = piece.encode()
            rank = self._ranks.get(data)
            if rank is not None:
                ids.append(rank)
            else:
                ids += self._cached_merge(data) if len(data) <= LONGEST_CACHED else self._merge(data)

    def _merge(self, piece: bytes) -> tuple[int, ...]:
        return merge_piece(piece, self._ranks, longest=self._longest)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """See Tokenizer.decode."""
        return b"".join([self._bytes[i] for i in known_ids(self, ids, skip_special)]).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """See Tokenizer.token_id."""
        found = self._special.get(token)
        return self._ranks.get(encodable(token).encode()) if found is None else found


def _one_of(texts: set[str]) -> str:
    """A regular expression for the longest of some texts that stands at a place, what they begin with said once."""
    first, last = min(texts), max(texts)
    size = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    common = first[:size]
    by_first: dict[str, set[str]] = {}
    for text in texts - {common}:
        by_first.setdefault(text[len(common)], set()).add(text[len(common) :])
    branches = "|".join(_one_of(rest) for rest in by_first.values())
    optional = "?" if common in texts else ""
    return re.escape(common) + (f"(?:{branches}){optional}" if branches else "")


def _stretches(text: str) -> Iterator[str]:
    """Cuts a long text as the original does before it splits and merges; a short one is one stretch."""
    for begin in range(0, len(text), STRETCH):
        part = text[begin : begin + STRETCH]
        start = 0
        if len(part) > RUN:
            for run in re.finditer(r"\s+|\S+", part):
                for cut in range(run.start() + RUN, run.end(), RUN):
                    yield part[start:cut]
                    start = cut
        yield part[start:]
