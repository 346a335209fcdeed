"""Where weights come from: slices of the stacked weights, from a Hugging Face directory or from an Orbax one.

A loader asks for the slices that its devices need and never for more.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import numpy as np

from glm_jax import configs
from glm_jax.checkpoint.accounting import plan_source
from glm_jax.checkpoint.names import Slot
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.configs import ModelConfig

Index = tuple[slice, ...]


class Source(Protocol):
    """A checkpoint seen as the weights of the stacked model."""

    config: ModelConfig

    def read(self, weight: str, index: Index) -> np.ndarray:
        """The slice `weight[index]`, with a start and stop for each dimension, in the stored dtype."""
        ...


class HfSource:
    """A Hugging Face directory of safetensors, accounted for and read through memory maps.

    Attributes:
        files: the safetensors of the directory.
        plan: what becomes of each tensor.
        config: the architecture, with what only the tensors tell.

    Raises:
        ConfigError: config.json is not of a supported architecture.
        CheckpointError: the tensors are not complete, or do not fit the configuration.
    """

    def __init__(self, directory: str | Path) -> None:
        declared = configs.from_hf(directory)
        self.files = SafetensorsDir(directory)
        self.plan = plan_source(declared, self.files.tensors)
        self.config = self.plan.config
        self._tensors: dict[tuple[str, tuple[int, ...]], list[tuple[str, Slot]]] = defaultdict(list)
        self._names: dict[str, list[str]] = defaultdict(list)
        for name, slot in self.plan.slots.items():
            self._tensors[slot.weight, slot.index[:1]].append((name, slot))
            self._names[slot.weight].append(name)

    def tensors_in(self, weight: str, index: Index) -> list[tuple[str, Slot]]:
        """The tensors that `weight[index]` is made of."""
        whole = self._tensors.get((weight, ()))
        if whole is not None:
            return whole
        first = range(index[0].start, index[0].stop)
        candidates = itertools.chain.from_iterable(self._tensors[weight, (i,)] for i in first)
        return [(name, slot) for name, slot in candidates if _within(slot.index, index)]

    def dtypes(self, weight: str) -> list[np.dtype]:
        """The dtypes of all tensors of a weight."""
        return [NUMPY_DTYPES[self.files.tensors[name].dtype] for name in self._names[weight]]

    def read(self, weight: str, index: Index) -> np.ndarray:
        """Assemble `weight[index]` from the tensors that lie in it."""
        parts = self.tensors_in(weight, index)
        if not parts[0][1].index:
            name, slot = parts[0]
            return self.files.read(name).reshape(slot.part_shape)[index]
        dtype = common_dtype([NUMPY_DTYPES[self.files.tensors[name].dtype] for name, _ in parts])
        result = np.empty([part.stop - part.start for part in index], dtype)
        for name, slot in parts:
            at = tuple(i - part.start for i, part in zip(slot.index, index, strict=False))
            result[at] = self.files.read(name).reshape(slot.part_shape)[index[len(at) :]]
            self.files.drop(name)
        return result


def _within(position: tuple[int, ...], index: Index) -> bool:
    return all(part.start <= at < part.stop for at, part in zip(position, index, strict=False))


def common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The smallest float dtype that holds all of the given ones exactly: their own, or float32 for a mixture."""
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)
