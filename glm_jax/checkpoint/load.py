"""Load a checkpoint onto a mesh: an Orbax directory of this project, or a Hugging Face directory as it is.

Each device's slice is read from the files and placed, one after the other, so that the host holds no more than a piece
of one slice. Quantised weights stay so: they are leaves of values and scales, which the products scale by.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import is_url
from glm_jax.checkpoint.foreign import check_files
from glm_jax.checkpoint.layer_range import LayerRange
from glm_jax.checkpoint.names import LAYER_GROUPS
from glm_jax.checkpoint.orbax_source import MANIFEST, OrbaxSource, is_orbax
from glm_jax.checkpoint.placing import place
from glm_jax.checkpoint.quantized_load import KEEP, Leaf, check_choice, plan_leaves
from glm_jax.checkpoint.source import HfSource, Index, Source
from glm_jax.configs.places import hub_hint
from glm_jax.errors import CheckpointError
from glm_jax.model import Transformer
from glm_jax.model.stack import map_layer_weights
from glm_jax.model.transformer import runtime_model, with_layer_layout
from glm_jax.sharding import (
    PackedBfloat16,
    QuantizedArray,
    Rules,
    WeightArray,
    default_mesh,
    map_weights,
    with_shardings,
)
from glm_jax.sharding.host_arrays import check_mesh

Read = Callable[[Index], np.ndarray]


def open_source(directory: str | Path, *, allow_unknown: Collection[str] = ()) -> HfSource | OrbaxSource:
    """Open a checkpoint directory of either kind.

    Args:
        directory: its path, or of a Hugging Face directory the URL.
        allow_unknown: keys of config.json to pass over although they may change what the model computes.

    Raises:
        CheckpointError: the directory does not exist or is neither kind.
    """
    if is_url(directory):
        return _open_url(str(directory), allow_unknown)
    path = Path(directory)
    if not path.is_dir():
        check_files(path.parent, [path.name])
        line = f"{path} is not a directory; a checkpoint is an Orbax or a Hugging Face directory"
        raise CheckpointError(line + hub_hint(directory))
    if is_orbax(path):
        return OrbaxSource(path)
    if (path / "config.json").exists() or any(path.glob("*.safetensors*")):
        return HfSource(path, allow_unknown=allow_unknown)
    check_files(path, os.listdir(path))
    raise CheckpointError(
        f"{path} holds no checkpoint: neither glm_jax.json (Orbax) nor config.json with *.safetensors (Hugging Face)"
    )


def _open_url(url: str, allow_unknown: Collection[str]) -> HfSource:
    if MANIFEST in open_directory(url).names():
        raise CheckpointError(f"{url} is an Orbax checkpoint; those are read from a disk: copy it to one")
    return HfSource(url, allow_unknown=allow_unknown)


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    stacked: bool | None = None,
    rules: Rules | None = None,
    quantized: str = KEEP,
    layers: slice | str | None = None,
    allow_unknown: Collection[str] = (),
) -> Transformer:
    """Return the model of a checkpoint directory, its weights on a mesh.

    Args:
        directory: an Orbax directory written by `convert`, or a Hugging Face directory or its URL (gs://, s3://,
            https:// and whatever else fsspec knows).
        mesh: where the weights go; over all devices by default.
        dtype: of the activations and of all weights but the pinned and the quantised ones; by default float32 on CPU
            and bfloat16 elsewhere.
        stacked: scan over the layers (True) or unroll them (False); by default what the platform decodes best.
        rules: placement of logical axes.
        quantized: what becomes of quantised weights. `keep`: they stay values and scales, in the source's bytes (on a
            CPU int4 takes a byte). `dequantize`: they become weights like the others, rounded to bfloat16 first, slice
            by slice. What cannot be kept is dequantised; the model's `notes` say what, and why.
        layers: only these decoder layers, as a slice or as `0:4`, under the whole model's final norm and head; the MTP
            layer is there if the last one is. The model's `config` has only these.
        allow_unknown: keys of config.json to pass over although they may change what the model computes.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
        ConfigError: its architecture is not supported.
        InputError: another word for `quantized`, or layers that the model does not have.
        ShardingError: the mesh does not divide the model.
    """
    check_choice(quantized)
    options: dict[str, Any] = {"dtype": dtype, "stacked": stacked, "rules": rules}
    source = open_source(directory, allow_unknown=allow_unknown)
    return load_source(source, mesh=mesh, quantized=quantized, layers=layers, **options)


def load_source(
    source: Source,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    stacked: bool | None = None,
    rules: Rules | None = None,
    quantized: str = KEEP,
    layers: slice | str | None = None,
) -> Transformer:
    """As `load`, of an open checkpoint."""
    check_choice(quantized)
    part = LayerRange.of(source.config, layers)
    mesh = default_mesh(part.config) if mesh is None else mesh
    check_mesh(mesh)
    model = runtime_model(part.config, mesh, dtype=dtype, rules=rules)
    stacked = model.ops.stacked_layers if stacked is None else stacked
    leaves: dict[str, Leaf] = {}
    model.notes = source.notes
    if quantized == KEEP:
        leaves, notes = plan_leaves(source, model, mesh)
        model.notes += notes
        model = map_weights(lambda name, w: leaves[name].abstract(w) if name in leaves else w.get_raw_value(), model)
    placed = with_shardings(with_layer_layout(model, stacked=stacked), mesh, model.rules)
    reader = _Reader(source, part, leaves)
    return map_layer_weights(lambda name, layer, weight: reader.place(name, layer, weight.get_raw_value()), placed)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the weights of a model that has some layers of a source, and some of its weights quantised."""

    source: Source
    layers: LayerRange
    leaves: Mapping[str, Leaf]

    def place(
        self, weight: str, layer: int | None, target: jax.ShapeDtypeStruct | QuantizedArray | PackedBfloat16
    ) -> WeightArray:
        """The weight of that name in the stacked model, all of it or one layer, on its devices."""
        if isinstance(target, PackedBfloat16):
            read = self._of_layer(weight, layer, functools.partial(self.source.read, weight))
            return target.map(lambda values: place(values, lambda index: _bits(read(index))))
        if not isinstance(target, QuantizedArray):
            return place(target, self._of_layer(weight, layer, functools.partial(self.source.read, weight)))
        leaf = self.leaves[weight]
        values = place(target.values, self._of_layer(weight, layer, leaf.read_values))
        scale = place(target.scale, self._of_layer(weight, layer, leaf.read_scale))
        return QuantizedArray(values, scale, target.contracting_dims)

    def _of_layer(self, weight: str, layer: int | None, read: Read) -> Read:
        """Read an array of the model by reading one of the source, which has all layers stacked."""
        group = weight.split(".")[0]
        if group not in LAYER_GROUPS:
            return read
        first = self.layers.first(group)

        def moved(index: Index) -> np.ndarray:
            if layer is not None:
                return read((slice(first + layer, first + layer + 1), *index))[0]
            return read((slice(first + index[0].start, first + index[0].stop), *index[1:]))

        return moved


def _bits(array: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 numbers nearest to those of an array."""
    return array.astype(ml_dtypes.bfloat16).view(np.uint16)


__all__ = ["Index", "load", "open_source"]
