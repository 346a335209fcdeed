"""What a checkpoint recommends for generation: the tokens that stop it, and its sampling settings.

`do_sample` and the other keys of the file are not read: a caller that wants greedy decoding says so itself.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.configs.hf_nested import text_config
from glm_jax.errors import TextError
from glm_jax.text.families import end_ids
from glm_jax.text.json_file import read_json_object_if_present
from glm_jax.text.tokenizer_protocol import Tokenizer


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """The defaults of a checkpoint; None where it recommends nothing.

    Attributes:
        stop_ids: generation ends with any of these, in the order of the files.
        temperature: 0 is greedy.
        top_p: in (0, 1].
        top_k: 0 means no limit.
    """

    stop_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @classmethod
    def load(cls, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> GenerationDefaults:
        """Reads a checkpoint's `generation_config.json`, and `config.json` for stop ids; missing files say nothing.

        Where the two files name different stop ids, all of them stop: the files of one checkpoint do disagree (Kimi K2
        names the end of text in one, the end of a turn in the other), and text after either is of no use. The end
        tokens of the model's family stop too, whether or not a file names them.

        Args:
            directory: with the files.
            tokenizer: the checkpoint's, if it is loaded already.

        Raises:
            TextError: a file that is not JSON, or a value of the wrong kind.
        """
        path, config = Path(directory) / "generation_config.json", Path(directory) / "config.json"
        values = read_json_object_if_present(path)
        content = read_json_object_if_present(config)
        named = (*_stop_ids(values, path), *_stop_ids(content, config), *_stop_ids(text_config(content), config))
        stop_ids = tuple(dict.fromkeys((*named, *end_ids(directory, tokenizer))))
        temperature = _number(values, "temperature", path)
        if temperature is not None and temperature < 0:
            raise TextError(f"{path}: temperature is {temperature}; it must be 0 or more")
        top_p = _number(values, "top_p", path)
        if top_p is not None and not 0 < top_p <= 1:
            raise TextError(f"{path}: top_p is {top_p}; it must be above 0 and at most 1")
        top_k = values.get("top_k")
        if top_k is not None and not _is_natural(top_k):
            raise TextError(f"{path}: top_k is {top_k!r}; it must be an integer, 0 or more")
        return cls(stop_ids, temperature, top_p, top_k)


def _stop_ids(values: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """The ids under eos_token_id (one, a list, or none), each once."""
    value = values.get("eos_token_id")
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_natural(i) for i in listed):
        raise TextError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of token ids")
    return tuple(dict.fromkeys(listed))


def _number(values: dict[str, Any], key: str, path: Path) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TextError(f"{path}: {key} is {value!r}; it must be a number")
    return float(value)


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
