"""Model architectures: the dataclasses, the presets by name, and config.json in both directions.

Nothing here needs jax, so a configuration can be read where no accelerator stack is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from glm_jax.configs import deepseek, glm45, kimi, published, tiny
from glm_jax.configs.hf import from_hf, read_config_json, to_hf
from glm_jax.configs.model_config import GqaConfig, MlaConfig, ModelConfig, MoeConfig, RopeConfig, YarnConfig
from glm_jax.errors import ConfigError

_PRESETS: dict[str, ModelConfig] = {
    **glm45.PRESETS,
    **deepseek.PRESETS,
    **kimi.PRESETS,
    **tiny.PRESETS,
}

__all__ = [
    "GqaConfig",
    "MlaConfig",
    "ModelConfig",
    "MoeConfig",
    "Preset",
    "RopeConfig",
    "YarnConfig",
    "find",
    "from_hf",
    "get",
    "names",
    "read_config_json",
    "to_hf",
]


def names() -> tuple[str, ...]:
    """The names of all presets."""
    return tuple(_PRESETS)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        name: of `names()`.
        config: its architecture.
        quantization: the format of its published weights, as its config.json says it; None for bfloat16.
    """

    name: str
    config: ModelConfig
    quantization: Mapping[str, Any] | None


def find(name: str) -> Preset | None:
    """Return the preset that a user or its publisher calls `name`: in any case, with or without the owner, or None.

    `zai-org/GLM-4.5-Air` is `glm-4.5-air`. `GLM-4.5-Air-FP8` is the same architecture, published in another format.
    """
    known = published.without_owner(name)
    known = published.ALIASES.get(known, known)
    if known in _PRESETS:
        return Preset(known, _PRESETS[known], published.QUANTIZATION.get(known))
    for suffix, quantization in published.SUFFIXES.items():
        base = known.removesuffix(suffix)
        base = published.ALIASES.get(base, base)
        if base in _PRESETS and known.endswith(suffix):
            return Preset(base, _PRESETS[base], quantization)
    return None


def get(name: str) -> ModelConfig:
    """Return the preset called `name` (`glm-4.5`, `glm-4.5-air`, ..., or as `find` takes it).

    Raises:
        ConfigError: there is no such preset; the message lists those there are.
    """
    preset = find(name)
    if preset is None:
        raise ConfigError(f"no model is called {name!r}; known: {', '.join(_PRESETS)}")
    return preset.config
