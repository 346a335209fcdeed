"""Directories with the text files of a Kimi K2 or DeepSeek checkpoint, small, without a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from tests.text import ranks

DEEPSEEK_TOKENS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
THINK = ("<think>", "</think>")
SEARCH = ("<｜search▁begin｜>", "<｜search▁end｜>")


def write_kimi(
    directory: Path, *, model_type: str = "kimi_k2", thinks: bool = False, tokens: list[bytes] | None = None
) -> Path:
    """A rank list with Kimi's names; with thinks=True also K2-Thinking's thought delimiters."""
    directory.mkdir(exist_ok=True)
    tokens = [bytes([byte]) for byte in range(256)] if tokens is None else tokens
    names = {place: name for place, name in ranks.KIMI_NAMES.items() if thinks or "think" not in name[0]}
    ranks.write_ranks(directory, tokens)
    ranks.write_names(directory, len(tokens), names)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


def write_deepseek(directory: Path, *more: str) -> Path:
    """A byte-level tokenizer.json with DeepSeek's delimiters and `more`; only the two ends are special."""
    directory.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(DEEPSEEK_TOKENS[:2]))
    tokenizer.add_tokens([*DEEPSEEK_TOKENS[2:], *more])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "eos_token_id": 1}))
    return directory
