"""How the checkpoints of a model type speak, where their own files do not say it.

A checkpoint's chat template always wins. No file of a checkpoint states how the model writes thoughts and tool calls,
nor which tokens end its turn, and Kimi K2's template is Python code that is not run here. All this is chosen by
`model_type` in config.json and then by the tokens of the tokenizer: whether it has thought delimiters, and which other
delimiters. DeepSeek-V3.1 is told from V3 and R1, which write calls differently, by its search token; Kimi K2 under
DeepSeek-V3's model type (its deployment guide allows that label) by its turn delimiter. Any other model type, and a
model of DeepSeek's architecture with neither family's delimiters, is read as GLM-4.5.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm_jax.configs.hf_nested import text_config
from glm_jax.text.answer_format import DEEPSEEK_V3, DEEPSEEK_V31, GLM, KIMI_K2, AnswerFormat
from glm_jax.text.json_file import read_json_object_if_present
from glm_jax.text.tokenizer import load_tokenizer
from glm_jax.text.tokenizer_protocol import Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
KIMI_TOKEN = "<|im_middle|>"
DEEPSEEK_TOKEN = "<｜Assistant｜>"
V31_TOKEN = "<｜search▁begin｜>"


@dataclasses.dataclass(frozen=True)
class Family:
    """What the files of a checkpoint may leave unsaid.

    Attributes:
        answer_format: how the model writes thoughts and tool calls.
        template: the chat template for checkpoints that bring none; None if there is none.
        template_variables: what that template is given.
        end_tokens: tokens that end an answer, beside the ids that the checkpoint's files name.
        canonical_call_ids: whether the model expects the ids of calls in its own form (see `call_ids`).
    """

    answer_format: AnswerFormat
    template: Path | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    end_tokens: tuple[str, ...] = ()
    canonical_call_ids: bool = False


GLM_FAMILY = Family(GLM)
Has = Callable[[str], bool]  # whether the tokenizer has a token


def _kimi_k2(has: Has) -> Family:
    thinks = all(map(has, KIMI_K2.think or ()))
    return Family(
        KIMI_K2 if thinks else KIMI_K2.without_thoughts(),
        TEMPLATES / "kimi_k2.jinja",
        {"has_thoughts": thinks},
        ("[EOS]", "<|im_end|>"),
        canonical_call_ids=True,
    )


def _deepseek_v3(has: Has) -> Family:
    if has(KIMI_TOKEN):
        return _kimi_k2(has)
    if not has(DEEPSEEK_TOKEN):
        return GLM_FAMILY
    end = ("<｜end▁of▁sentence｜>",)
    if has(V31_TOKEN):
        return Family(DEEPSEEK_V31, TEMPLATES / "deepseek_v31.jinja", end_tokens=end)
    thinks = all(map(has, DEEPSEEK_V3.think or ()))
    answer_format = DEEPSEEK_V3 if thinks else DEEPSEEK_V3.without_thoughts()
    return Family(answer_format, TEMPLATES / "deepseek_v3.jinja", end_tokens=end)


_BY_MODEL_TYPE: dict[str, Callable[[Has], Family]] = {"kimi_k2": _kimi_k2, "deepseek_v3": _deepseek_v3}


def family_of(directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Family:
    """Returns what a checkpoint directory leaves unsaid.

    Args:
        directory: with the config.json; without one the family is GLM's.
        tokenizer: the checkpoint's, if it is loaded already.

    Raises:
        TextError: config.json or the tokenizer cannot be read.
    """
    directory = Path(directory)
    config = text_config(read_json_object_if_present(directory / "config.json"))
    choose = _BY_MODEL_TYPE.get(str(config.get("model_type")))
    if choose is None:
        return GLM_FAMILY
    found = _tokenizer_if_present(directory) if tokenizer is None else tokenizer
    return choose(lambda token: found is not None and found.token_id(token) is not None)


def end_ids(directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """Returns the ids of the family's end tokens, those that the tokenizer has.

    Raises:
        TextError: config.json or the tokenizer cannot be read.
    """
    found = _tokenizer_if_present(Path(directory)) if tokenizer is None else tokenizer
    if found is None:
        return ()
    ids = (found.token_id(token) for token in family_of(directory, found).end_tokens)
    return tuple(i for i in ids if i is not None)


def _tokenizer_if_present(directory: Path) -> Tokenizer | None:
    present = (directory / "tokenizer.json").exists() or any(directory.glob("*.model"))
    return load_tokenizer(directory) if present else None
