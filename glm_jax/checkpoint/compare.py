"""Whether two checkpoints hold the same weights, tensor by tensor under their Hugging Face names."""

from __future__ import annotations

import dataclasses

import numpy as np

from glm_jax.checkpoint.names import TensorMapping, canonical_mappings
from glm_jax.checkpoint.orbax_source import OrbaxSource
from glm_jax.checkpoint.source import HfSource, Source
from glm_jax.configs import ModelConfig
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name


@dataclasses.dataclass(frozen=True)
class WeightParity:
    """How the tensors of a checkpoint compare with another's.

    Attributes:
        compared: tensors that both have.
        differing: of these the ones that are not equal in every value, with the largest absolute difference; None where
            their shapes differ, or where it is not finite.
        only_ours: tensors that only the first has.
        only_theirs: tensors that only the second has.
    """

    compared: int
    differing: dict[str, float | None]
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.differing or self.only_ours or self.only_theirs)


def compare_weights(ours: Source, theirs: Source, *, layers: int | None = None) -> WeightParity:
    """Compare every tensor of two checkpoints, one tensor of each in memory at a time.

    Fused experts are compared one by one. A dtype is no difference as long as the values are equal.

    Args:
        ours: one checkpoint.
        theirs: the other one.
        layers: only the first so many decoder layers, and no MTP layer.

    Raises:
        CheckpointError: a file is damaged.
    """
    mappings, others = (canonical_mappings(first_layers(source.config, layers)) for source in (ours, theirs))
    both = [name for name in mappings if name in others]
    differing: dict[str, float | None] = {}
    for name in both:
        if mappings[name].shape != others[name].shape:
            differing[name] = None
            continue
        a, b = _read(ours, mappings[name]), _read(theirs, others[name])
        if not _equal(a, b):
            differing[name] = _difference(a, b)
    return WeightParity(
        compared=len(both),
        differing=differing,
        only_ours=tuple(name for name in mappings if name not in others),
        only_theirs=tuple(name for name in others if name not in mappings),
    )


def first_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The configuration with its first `layers` decoder layers only and no MTP layer; None leaves it as it is."""
    if layers is None:
        return config
    dense = min(config.num_dense_layers, layers)
    return dataclasses.replace(config, num_layers=layers, num_dense_layers=dense, num_mtp_layers=0, mtp_copies=())


def router_bias_dtypes(source: HfSource | OrbaxSource) -> set[str]:
    """The dtypes in which a checkpoint stores the routers' correction bias: float32 alone, if it is right."""
    names = [name for name in weights_by_name(Transformer(source.config)) if name.endswith("router.bias")]
    if isinstance(source, HfSource):
        return {dtype.name for name in names for dtype in source.dtypes(name)}
    return {source.arrays.spec(name).dtype for name in names}


def _read(source: Source, mapping: TensorMapping) -> np.ndarray:
    index = (*(slice(i, i + 1) for i in mapping.index), *(slice(0, size) for size in mapping.part_shape))
    return source.read(mapping.weight, index)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype:
        a, b = a.astype(np.float32), b.astype(np.float32)
    return np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def _difference(a: np.ndarray, b: np.ndarray) -> float | None:
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max())
    return largest if np.isfinite(largest) else None
