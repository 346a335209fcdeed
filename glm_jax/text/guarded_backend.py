"""A `tokenizer.json` whose control tokens are recognised where one says so and nowhere else.

The library recognises an added token wherever its text stands. Here the control tokens have secret texts, drawn at
random, that stand in for them: what the control tokens' own texts become is what any other text becomes, and everything
else (normalisation, splitting, white space that a token swallows) is as before.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence

import tokenizers

from glm_jax.errors import TextError
from glm_jax.text.tokenizer_protocol import between

SECRET_CHARACTERS = 12  # of 65,534 each
_PRIVATE_USE = range(0x100000, 0x10FFFE)


class GuardedBackend:
    """The library's tokenizer with stand-ins for control tokens.

    Args:
        backend: the original.
        control: text -> id of the control tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: Mapping[str, int]):
        self.control = dict(control)
        secret = "".join(chr(secrets.choice(_PRIVATE_USE)) for _ in range(SECRET_CHARACTERS))
        self._stand_ins = {text: secret + chr(_PRIVATE_USE[i]) for i, text in enumerate(control)}
        # By text, not by the new tokenizer's ids: it numbers its added tokens anew.
        added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
        self._ids = {self._stand_ins.get(text, text): i for text, i in added.items()}
        self._control_ids = frozenset(control.values())
        described = json.loads(backend.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._stand_ins.get(token["content"], token["content"])
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(described))

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """See Tokenizer.encode_guarded."""
        parts = list(between(text, spans))
        guarded = "".join(plain + (self._stand_ins[token] if token else "") for plain, token in parts)
        found = self._backend.encode(guarded, add_special_tokens=False)
        pairs = list(zip(found.tokens, found.ids, strict=True))
        if any(i in self._control_ids and token not in self._ids for token, i in pairs):
            ids: list[int] = []
            for plain, token in parts:
                ids += [*self._encode_plain(plain), *([self.control[token]] if token else [])]
            return ids
        return [self._ids.get(token, i) for token, i in pairs]

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of text that has no control token, cut where the vocabulary would make one of it."""
        found = self._backend.encode(text, add_special_tokens=False)
        for token, i, (start, end) in zip(found.tokens, found.ids, found.offsets, strict=True):
            if i in self._control_ids and token not in self._ids:
                if end - start < 2:
                    raise TextError(f"the tokenizer makes the control token {token!r} of plain text")
                return [*self._encode_plain(text[: start + 1]), *self._encode_plain(text[start + 1 :])]
        return [self._ids.get(token, i) for token, i in zip(found.tokens, found.ids, strict=True)]
