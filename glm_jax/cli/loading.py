"""From the flags of the command line to devices, a mesh and a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags as absl_flags
from jax.sharding import Mesh

from glm_jax import configs
from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import is_url
from glm_jax.checkpoint.layer_range import LayerRange
from glm_jax.checkpoint.load import load_source
from glm_jax.checkpoint.orbax_source import MANIFEST
from glm_jax.checkpoint.source import Source, read_config_bytes
from glm_jax.cli import printing
from glm_jax.configs import ModelConfig
from glm_jax.configs.hf import HfConfig, parse_config_json, read_hf
from glm_jax.configs.places import hub_hint
from glm_jax.errors import CheckpointError
from glm_jax.model import Transformer
from glm_jax.runtime import keep_programs
from glm_jax.sharding import default_mesh, find_devices, parse_mesh, rules_named


def chosen_mesh(flags: absl_flags.FlagValues, config: ModelConfig) -> Mesh:
    """The mesh that --mesh describes, or the default one."""
    devices = find_devices()
    return default_mesh(config, devices) if flags.mesh is None else parse_mesh(flags.mesh, devices)


def chosen_dtype(flags: absl_flags.FlagValues) -> Any:
    """The dtype of --dtype, or None for the platform's."""
    return None if flags.dtype is None else jnp.dtype(flags.dtype)


def loading_options(flags: absl_flags.FlagValues, config: ModelConfig) -> dict[str, Any]:
    """How to load --model, whose config is known, by --mesh, --rules, --dtype, --quantized and --layers.

    With --cache this process then takes compiled programs from there, and keeps them there.

    Raises:
        InputError: the model has no such layers, or --cache cannot be written to.
        ShardingError: there is no such mesh, or there are no rules of that name.
    """
    of_layers = LayerRange.of(config, flags.layers).config
    rules, mesh = rules_named(flags.rules), chosen_mesh(flags, of_layers)
    if flags.cache is not None:
        keep_programs(flags.cache, of_layers, mesh)
    chosen = {"mesh": mesh, "rules": rules, "dtype": chosen_dtype(flags)}
    return {**chosen, "quantized": flags.quantized, "layers": flags.layers}


def load_model(source: Source, options: dict[str, Any]) -> Transformer:
    """The model of the open checkpoint of --model, with `loading_options`; its notes go to stderr."""
    model = load_source(source, **options)
    for note in model.notes:
        printing.notice(note)
    return model


def config_alone(place: str, allow_unknown: Collection[str]) -> HfConfig | None:
    """The configuration of a directory, or a URL, that has a config.json and no tensors (yet); else None.

    Raises:
        ConfigError: it is not of a supported architecture.
    """
    directory = open_directory(place)
    names = directory.names()
    if "config.json" not in names or MANIFEST in names or any(".safetensors" in name for name in names):
        return None
    content = parse_config_json(read_config_bytes(directory), directory.at("config.json"))
    return read_hf(content, allow_unknown=allow_unknown)


def named_preset(name: str) -> configs.Preset | None:
    """The preset of that name, or None for a directory, which may have a name as on the hub: `zai-org/GLM-4.5-Air`.

    Raises:
        CheckpointError: it is neither.
    """
    path, preset = Path(name), configs.find(name)
    if preset is not None and (name in configs.names() or not path.is_dir()):
        return preset
    if path.is_dir() or is_url(name):
        return None
    what = "a file, not a directory" if path.exists() else "neither a directory nor a known model"
    raise CheckpointError(f"{name} is {what}; known models: {', '.join(configs.names())}{hub_hint(name)}")
