"""Whether the files that name stop tokens and vocabulary agree with each other, and with another checkpoint's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm_jax.errors import TextError
from glm_jax.text import GenerationDefaults, Tokenizer, load_tokenizer
from glm_jax.text.json_file import read_json_object_if_present

CONFIGS = ("config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Compatibility:
    """What was found, in words, what is wrong with it, and what is only to be known."""

    found: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def stop_ids_by_file(directory: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The stop ids that each file of a checkpoint names; a file that names none is left out.

    That of tokenizer_config.json is its `eos_token`, which takes a tokenizer to have an id.

    Raises:
        TextError: a file is not JSON, or names something that is no token id.
    """
    found = {}
    for name in CONFIGS:
        ids = _ids(read_json_object_if_present(Path(directory) / name), Path(directory) / name)
        if ids:
            found[name] = ids
    path = Path(directory) / "tokenizer_config.json"
    token = read_json_object_if_present(path).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    tokenizer = None if text is None else _tokenizer(directory)
    if tokenizer is not None:
        known = tokenizer.token_id(text) if isinstance(text, str) else None
        if known is None:
            raise TextError(f"{path}: eos_token is {token!r}; it must be a token of the tokenizer")
        found[path.name] = (known,)
    return found


def compare_stop_ids(ours: str | os.PathLike[str], theirs: str | os.PathLike[str]) -> Compatibility:
    """Hold the ids at which generation ends against those that any file of either checkpoint names.

    That the files of one checkpoint name different ids (Kimi K2's do) is a note, as long as generation ends at all.

    Raises:
        TextError: a file is unreadable.
    """
    used = GenerationDefaults.load(ours).stop_ids
    named, expected = stop_ids_by_file(ours), stop_ids_by_file(theirs)
    problems = []
    for whose, ids_by_file in (("", named), ("the reference's ", expected)):
        for name, ids in ids_by_file.items():
            missing = [i for i in ids if i not in used]
            if missing:
                problems.append(f"generation does not end at {_listed(missing)}, which {whose}{name} names")
    for name in {**named, **expected}:
        if set(named.get(name, ())) != set(expected.get(name, ())):
            told = f"{name} names {_listed(named.get(name, ()))}, the reference's {_listed(expected.get(name, ()))}"
            problems.append(told)
    notes = []
    if len({frozenset(ids) for ids in (named.get(name) for name in CONFIGS) if ids}) > 1:
        told = ", ".join(f"{name} names {_listed(named[name])}" for name in CONFIGS)
        notes.append(f"{told}; generation ends at {_listed(used)}")
    return Compatibility(_listed(used), tuple(problems), tuple(notes))


def compare_vocabularies(
    ours: str | os.PathLike[str], theirs: str | os.PathLike[str], *, model_size: int, reference_size: int
) -> Compatibility:
    """Hold the tokenizers' sizes against each other's and the models': the embedding may be padded, not too short.

    Args:
        ours: directory of the tokenizer files; may have none.
        theirs: the reference's.
        model_size: rows of the model's embedding.
        reference_size: of the reference's.

    Raises:
        TextError: a tokenizer is unreadable.
    """
    tokenizer, other = _tokenizer(ours), _tokenizer(theirs)
    problems = []
    if model_size != reference_size:
        problems.append(f"the model has {model_size} ids, the reference {reference_size}")
    if (tokenizer is None) != (other is None):
        problems.append(f"only {'the reference' if tokenizer is None else 'the model'} has a tokenizer")
    if tokenizer is None:
        return Compatibility(f"the model has {model_size} ids; no tokenizer to compare with", tuple(problems))
    size = tokenizer.vocab_size
    if other is not None and other.vocab_size != size:
        problems.append(f"the tokenizer has {size} ids, the reference's {other.vocab_size}")
    if size > model_size:
        problems.append(f"the tokenizer's ids {model_size}..{size - 1} are beyond the model's")
    padding = f"ids {size}..{model_size - 1} are padding" if size < model_size else "no padding"
    return Compatibility(f"tokenizer {size} ids, model {model_size}: {padding}", tuple(problems))


def _listed(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _tokenizer(directory: str | os.PathLike[str]) -> Tokenizer | None:
    path = Path(directory)
    present = (path / "tokenizer.json").exists() or any(path.glob("*.model"))
    return load_tokenizer(path) if present else None


def _ids(values: dict[str, Any], path: Path) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in listed):
        raise TextError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of token ids")
    return tuple(dict.fromkeys(listed))
