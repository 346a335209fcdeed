"""A checkpoint's text side: tokenizer, chat template and generation settings, which lie beside its config.json."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from glm_jax.configs.places import hub_hint
from glm_jax.errors import CheckpointError, TextError
from glm_jax.text import AnswerFormat, ChatTemplate, GenerationDefaults, Tokenizer, family_of, load_tokenizer
from glm_jax.text.answer_format import GLM

CONVERTED = "hf"  # where a converted checkpoint keeps the files of its source


@dataclasses.dataclass(frozen=True)
class TextProcessor:
    """What turns a conversation into tokens, new tokens into text, and says when to stop.

    Attributes:
        tokenizer: text to token ids and back.
        template: messages and tools to the prompt's text.
        defaults: the stop tokens and the recommended sampling settings.
        answer_format: the delimiters that the model puts around its thoughts and tool calls.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: GenerationDefaults
    answer_format: AnswerFormat = GLM

    def __repr__(self) -> str:
        return f"TextProcessor({self.tokenizer!r}, {self.template!r}, {self.defaults!r})"

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> TextProcessor:
        """Read the text side of an Orbax or a Hugging Face checkpoint.

        Raises:
            CheckpointError: there is no such directory.
            TextError: a file is missing or unreadable, or names no stop tokens.
        """
        files = text_directory(directory)
        tokenizer = load_tokenizer(files)
        family = family_of(files, tokenizer)
        template, defaults = ChatTemplate.load(files, family), GenerationDefaults.load(files, tokenizer)
        text = cls(tokenizer, template, defaults, family.answer_format)
        if not text.defaults.stop_ids:
            raise TextError(f"{files}: names no stop tokens (eos_token_id in generation_config.json)")
        return text


def text_directory(checkpoint: str | os.PathLike[str]) -> Path:
    """The directory with a checkpoint's tokenizer, template and generation settings.

    Raises:
        CheckpointError: there is no such checkpoint directory.
    """
    path = Path(checkpoint)
    if "://" in os.fspath(checkpoint):
        line = (
            "is a URL; the tokenizer and its files are read from a disk (glm_jax.Chat and the verbs copy them to one)"
        )
        raise CheckpointError(f"{os.fspath(checkpoint)} {line}")
    if not path.is_dir():
        line = f"{path} is not a directory; a checkpoint is an Orbax or a Hugging Face directory"
        raise CheckpointError(line + hub_hint(checkpoint))
    return path if (path / "config.json").exists() or not (path / CONVERTED).is_dir() else path / CONVERTED
