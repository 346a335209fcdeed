"""An Orbax directory of this project: the arrays, and the manifest `glm_jax.json` beside them.

The manifest holds the layout's version, the configuration, and for each tensor of the source its dtype and sha256: what
an export needs to write the same bytes again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.accounting import FLOAT_DTYPES
from glm_jax.checkpoint.orbax_io import OrbaxReader
from glm_jax.checkpoint.source import Index
from glm_jax.configs import ModelConfig, from_hf, to_hf
from glm_jax.errors import CheckpointError, ConfigError
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name

MANIFEST = "glm_jax.json"
ASSETS = "hf"  # config.json, tokenizer and template files, verbatim from the source
LAYOUT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor of the source: its dtype in safetensors' words and the sha256 of its bytes."""

    dtype: str
    sha256: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES or not isinstance(self.sha256, str):
            raise ValueError(f"a tensor of dtype {self.dtype!r} with sha256 {self.sha256!r}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `glm_jax.json` says.

    Attributes:
        config: the architecture.
        tensors: every tensor of the source by its Hugging Face name.
        producer: what wrote the checkpoint, with its version.
    """

    config: ModelConfig
    tensors: dict[str, TensorRecord]
    producer: str

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "layout_version": LAYOUT_VERSION,
            "producer": self.producer,
            "config": {**to_hf(self.config), "mtp_copies": list(self.config.mtp_copies)},
            "tensors": {name: dataclasses.asdict(record) for name, record in self.tensors.items()},
        }


def is_orbax(directory: Path) -> bool:
    """Whether a directory is an Orbax checkpoint of this project."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another version of the layout.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["layout_version"]
        if version != LAYOUT_VERSION:
            raise CheckpointError(f"{path}: layout_version {version!r}; this program reads {LAYOUT_VERSION}")
        described = dict(content["config"])
        copies = tuple(described.pop("mtp_copies"))
        config = dataclasses.replace(from_hf(described), mtp_copies=copies)
        tensors = {name: TensorRecord(**record) for name, record in content["tensors"].items()}
        return Manifest(config, tensors, content["producer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged or missing: {type(error).__name__}: {error}") from None


class OrbaxSource:
    """A checkpoint written by `convert`.

    Attributes:
        manifest: what `glm_jax.json` says.
        config: the architecture.

    Raises:
        CheckpointError: the manifest or the array metadata is missing or damaged, or they do not fit each other.
    """

    def __init__(self, directory: str | Path) -> None:
        self.manifest = read_manifest(Path(directory))
        self.config = self.manifest.config
        self.arrays = OrbaxReader(directory)
        self._check_arrays(Path(directory))

    def read(self, weight: str, index: Index) -> np.ndarray:
        """The slice `weight[index]` from the chunks that it touches."""
        return self.arrays.read(weight, index)

    def _check_arrays(self, directory: Path) -> None:
        """Hold the arrays against the configuration: a slice of a larger array would load, and be wrong."""
        expected = {name: w.get_raw_value().shape for name, w in weights_by_name(Transformer(self.config)).items()}
        found = {name: spec.shape for name, spec in self.arrays.specs().items()}
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{name} is not known" for name in found if name not in expected]
        problems += [
            f"{name} is {list(found[name])}, should be {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(
                f"{directory}: arrays that do not fit its {MANIFEST}: {', '.join(problems[:8])}{more}"
            )
