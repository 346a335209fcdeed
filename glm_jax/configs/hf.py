"""Hugging Face's config.json <-> `ModelConfig`, by family.

Both layouts are read: the rotary keys beside the others (as published), and nested in `rope_parameters` (as
transformers 5 saves them). What is in no list of any family is an error (`hf_reader`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from glm_jax.configs import hf_gqa, hf_mla
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


def from_hf(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` of a config.json, given as its directory or as its content.

    `mtp_copies` is not in any config.json: it is empty here, and the checkpoint reader sets it from the tensors.

    Raises:
        ConfigError: the architecture is not supported, a key is missing, of the wrong type or unknown.
    """
    content = source if isinstance(source, Mapping) else read_config_json(source)
    model_type = content.get("model_type", MISSING)
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        shown = "is missing" if model_type is MISSING else f"{model_type!r} is not supported"
        raise ConfigError(f"config.json: model_type {shown}; supported: {', '.join(_FAMILIES)}")
    reader = ConfigReader(content)
    arguments = _FAMILIES[model_type].read(reader)
    reader.finish()
    return ModelConfig(**arguments)


def to_hf(config: ModelConfig, *, nested_rope: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the config.json content of `config`, as published, or with `rope_parameters` as transformers 5 saves it.

    `from_hf(to_hf(config))` is `config` again, but for `mtp_copies`, which config.json does not carry.
    """
    return _FAMILIES[config.model_type].write(config, nested_rope=nested_rope, dtype=dtype)
