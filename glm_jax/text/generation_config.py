"""What a checkpoint recommends for generation: the tokens that stop it, and its sampling settings.

Other keys that would change what is generated are named in `GenerationDefaults.notes`: they are not honoured yet.
"""

from __future__ import annotations

import dataclasses
import json
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
        notes: sentences for the user: what the file asks for that is not done.
    """

    stop_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    notes: tuple[str, ...] = ()

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
        temperature = _number(values, "temperature", path)
        if temperature is not None and temperature < 0:
            raise TextError(f"{path}: temperature is {temperature}; it must be 0 or more")
        top_p = _number(values, "top_p", path)
        if top_p is not None and not 0 < top_p <= 1:
            raise TextError(f"{path}: top_p is {top_p}; it must be above 0 and at most 1")
        top_k = values.get("top_k")
        if top_k is not None and not _is_natural(top_k):
            raise TextError(f"{path}: top_k is {top_k!r}; it must be an integer, 0 or more")
        # Last, since it opens the tokenizer: a wrong value above is said even where that one is damaged.
        stop_ids = tuple(dict.fromkeys((*named, *end_ids(directory, tokenizer))))
        return cls(stop_ids, temperature, top_p, top_k, _notes(values))


# Keys of transformers' GenerationConfig that change which tokens come, and the values with which they change nothing
# (besides null, false and what is empty). `max_length` is not among them: files carry transformers' own default of it.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "frequency_penalty": (0,),
    "guidance_scale": (1,),
    "max_new_tokens": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


def _notes(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What is asked for that nothing here does, in one sentence."""
    asked = [
        f"{key} {json.dumps(value)}"
        for key, neutral in _NOT_HONOURED.items()
        if (value := values.get(key)) not in (None, False, [], {}, "", *neutral)
    ]
    if values.get("do_sample") is False and values.get("temperature") not in (None, 0):
        asked.append("do_sample false (temperature 0 is greedy)")
    if not asked:
        return ()
    return (f"generation_config.json: not honoured yet, so that it changes nothing: {', '.join(asked)}",)


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
