"""Hugging Face's config.json <-> `ModelConfig`, by family.

Both layouts are read: the rotary keys beside the others (as published), and nested in `rope_parameters` (as
transformers 5 saves them). A key that is left out stands for transformers' default (`hf_defaults`). `hf_keys` lists the
keys that are passed over; any other key is an error, unless the caller allows it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from glm_jax.configs import hf_gqa, hf_mla
from glm_jax.configs.hf_nested import text_config
from glm_jax.configs.hf_reader import MISSING, ConfigReader
from glm_jax.configs.model_config import ModelConfig
from glm_jax.errors import ConfigError

_FAMILIES: dict[str, ModuleType] = {
    model_type: module for module in (hf_gqa, hf_mla) for model_type in module.ARCHITECTURES
}


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """Return the config.json of an HF directory as a dict.

    Raises:
        ConfigError: the file is absent, not JSON, or not an object.
    """
    path = Path(directory) / "config.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a Hugging Face checkpoint directory has one") from None
    except OSError as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    return parse_config_json(content, path)


def parse_config_json(content: bytes, place: str | Path) -> dict[str, Any]:
    """Return the content of a config.json, which was read at `place`, as a dict.

    Raises:
        ConfigError: it is not JSON, or not an object.
    """
    try:
        parsed = json.loads(content.decode())
    except RecursionError:
        raise ConfigError(f"{place} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{place} is not readable JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{place} holds a {type(parsed).__name__}, not a JSON object")
    return parsed


def write_config_json(directory: str | Path, content: Mapping[str, Any]) -> None:
    """Write the config.json of an HF directory."""
    (Path(directory) / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class HfConfig:
    """What a config.json says.

    Attributes:
        config: the architecture.
        notes: a sentence for each kind of key that was passed over, or that was left out.
    """

    config: ModelConfig
    notes: tuple[str, ...]


def from_hf(source: str | Path | Mapping[str, Any], *, allow_unknown: Collection[str] = ()) -> ModelConfig:
    """Return the `ModelConfig` of a config.json, given as its directory or as its content.

    Of a multimodal model it is the language model's. `mtp_copies` is not in any config.json: it is empty here, and the
    checkpoint reader sets it from the tensors.

    Args:
        source: the directory, or the content of the file.
        allow_unknown: keys to pass over although they may change what the model computes.

    Raises:
        ConfigError: the architecture is not supported, or a key is of the wrong type or unknown.
    """
    return read_hf(source, allow_unknown=allow_unknown).config


def read_hf(source: str | Path | Mapping[str, Any], *, allow_unknown: Collection[str] = ()) -> HfConfig:
    """As `from_hf`, with notes for the user."""
    whole = source if isinstance(source, Mapping) else read_config_json(source)
    content = text_config(whole)
    model_type = content.get("model_type", MISSING)
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        shown = "is missing" if model_type is MISSING else f"{model_type!r:.200} is not supported"
        raise ConfigError(f"config.json: model_type {shown}; supported: {', '.join(_FAMILIES)}")
    reader = ConfigReader(content, allow_unknown)
    arguments = _FAMILIES[model_type].read(reader)
    notes = reader.finish()
    if content is not whole:
        notes = (f"config.json: only the language model of {whole.get('model_type')} is read (text_config)", *notes)
    return HfConfig(ModelConfig(**arguments), notes)


def to_hf(config: ModelConfig, *, nested_rope: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the config.json content of `config`, as published, or with `rope_parameters` as transformers 5 saves it.

    `from_hf(to_hf(config))` is `config` again, but for `mtp_copies`, which config.json does not carry.
    """
    return _FAMILIES[config.model_type].write(config, nested_rope=nested_rope, dtype=dtype)
