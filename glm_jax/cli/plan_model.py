"""The model of `plan`: its architecture, and the format in which its checkpoint has the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax.cli import printing
from glm_jax.cli.plan_figures import spelled

if TYPE_CHECKING:
    from glm_jax.checkpoint.stored_formats import StoredFormats
    from glm_jax.configs import ModelConfig

TRAIN = "train"
PLAIN = "bfloat16"


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """What --model is.

    Attributes:
        name: as it was given.
        preset: the name of the preset; None for a directory.
        config: the architecture.
        stored: how a checkpoint has its weights; None where none is quantised.
        convertible: `convert` reads the directory.
    """

    name: str
    preset: str | None
    config: ModelConfig
    stored: StoredFormats | None
    convertible: bool = True


@dataclasses.dataclass(frozen=True)
class ChosenWeights:
    """How the weights are kept while the job runs.

    Attributes:
        dtype: a name of `planning.job.WEIGHTS`.
        stored: the checkpoint's own formats, if it is loaded as it is.
        words: behind the format's name in the first line for people.
    """

    dtype: str
    stored: StoredFormats | None
    words: str


def find_model(name: str, allow_unknown: Collection[str] = ()) -> PlannedModel:
    """A preset, a checkpoint, or a directory that has no more than a config.json yet; its notes go to stderr.

    Args:
        name: what --model says.
        allow_unknown: keys of config.json to pass over although they may change what the model computes.

    Raises:
        CheckpointError: it is none of these.
        ConfigError: its architecture, or its format, is not supported.
    """
    from glm_jax import checkpoint
    from glm_jax.checkpoint.source import HfSource
    from glm_jax.checkpoint.stored_formats import StoredFormats
    from glm_jax.cli.loading import named_preset
    from glm_jax.configs.hf import read_config_json, read_hf

    preset = named_preset(name)
    if preset is not None:
        declared = StoredFormats.declared(preset.config, {"quantization_config": preset.quantization})
        return PlannedModel(name, preset.name, preset.config, _if_any(declared))
    directory = Path(name)
    if (directory / "config.json").is_file() and not any(directory.glob("*.safetensors*")):
        read = read_hf(directory, allow_unknown=allow_unknown)
        declared = StoredFormats.declared(read.config, read_config_json(directory))
        model, notes = PlannedModel(name, None, read.config, _if_any(declared)), read.notes
    else:
        source = checkpoint.open_source(directory, allow_unknown=allow_unknown)
        stored = _if_any(StoredFormats.of(source))
        model, notes = PlannedModel(name, None, source.config, stored, isinstance(source, HfSource)), source.notes
    for note in notes:
        printing.notice(f"note: {note}")
    return model


def choose_weights(model: PlannedModel, *, flag: str | None, job: str) -> ChosenWeights:
    """The weights of --weights; by default the checkpoint's own, but for training, which dequantises them."""
    stored = model.stored
    own = None if stored is None else stored.kind
    if flag is not None and spelled(flag) != own:
        return ChosenWeights(spelled(flag), None, "")
    whose = "the checkpoint has them" if model.preset is None else "published"
    if stored is None:
        return ChosenWeights(PLAIN, None, "" if model.preset is None else f", as {whose}")
    if job == TRAIN and flag is None:
        return ChosenWeights(PLAIN, None, f", dequantised for training from {stored.describe()}")
    return ChosenWeights(PLAIN, stored, f", as {whose} ({stored.describe()})")


def _if_any(stored: StoredFormats) -> StoredFormats | None:
    return None if stored.kind is None else stored
