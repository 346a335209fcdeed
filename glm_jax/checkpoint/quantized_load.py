"""Quantised weights as leaves of the model: the values as they are stored, and float32 scales in the weight's own form.

On a CPU the values of FP8 are their bits, and those of int4 take a byte each. Values that have zero points are those
less their zero points, where that fits a byte.

A leaf has a scale for each output, or for each output and group of consecutive inputs; what a checkpoint stores are
blocks of a matrix, or groups of its rows. Blocks are spread over the outputs that they cover, and divided into smaller
groups where a device's share of the inputs holds no whole number of them. Where that leaves too little to a group, and
where the model has no product for quantised values, the weight is dequantised when it is read, with a note.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from glm_jax.checkpoint.names import TensorMapping
from glm_jax.checkpoint.quantized import Format, Fp8, Index, Int8, PackedInt, rows_and_columns
from glm_jax.checkpoint.source import Source
from glm_jax.errors import InputError
from glm_jax.model import Transformer
from glm_jax.sharding import QuantizedArray, Weight, shardings, weights_by_name

KEEP, DEQUANTIZE = "keep", "dequantize"
MIN_GROUP = 32  # inputs; below that the scales take as much as int4 values do
_FP8, _INT4, _INT8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.int4), np.dtype(np.int8)


def check_choice(quantized: str) -> None:
    """Refuse a word other than `keep` and `dequantize`.

    Raises:
        InputError: it is another one.
    """
    if quantized not in (KEEP, DEQUANTIZE):
        raise InputError(f"quantized is {quantized!r}; it is one of {KEEP!r}, {DEQUANTIZE!r}")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight that stays quantised.

    Attributes:
        source: where it is read.
        weight: its name in the stacked model.
        layout: what its matrices are stored as.
        mapping: of one of its matrices.
        groups: of the inputs, each with a scale for each output; None for one scale for all inputs.
        dtype: of the values on the mesh's devices.
    """

    source: Source
    weight: str
    layout: Format
    mapping: TensorMapping
    groups: int | None
    dtype: np.dtype

    def abstract(self, weight: Weight) -> QuantizedArray:
        """The leaf without data, for the weight's declaration."""
        shape = weight.get_raw_value().shape
        scale = (*shape[: len(shape) - weight.contracting_dims], *(() if self.groups is None else (self.groups,)))
        values = jax.ShapeDtypeStruct(shape, self.dtype)
        return QuantizedArray(values, jax.ShapeDtypeStruct(scale, np.float32), weight.contracting_dims)

    def read_values(self, index: Index) -> np.ndarray:
        """The slice `values[index]`."""
        if not isinstance(self.layout, PackedInt):
            return self.source.read_stored(self.weight, index).view(self.dtype)
        lead, inner = self._divide(index)
        rows, columns = rows_and_columns(self.mapping, inner)
        arrays = {part.suffix: self.weight + part.array for part in self.layout.parts if part.array is not None}
        windows = self.layout.windows(rows, columns)
        stored = {suffix: self.source.read_stored(arrays[suffix], (*lead, *at)) for suffix, at in windows.items()}
        values = self.layout.integers(stored, rows, columns).astype(np.int8)
        return values.astype(self.dtype, copy=False).reshape([part.stop - part.start for part in index])

    def read_scale(self, index: Index) -> np.ndarray:
        """The slice `scale[index]`, spread over the outputs that share it; float32."""
        lead, inner = self._divide(index)
        outputs = inner if self.groups is None else inner[:-1]
        sizes = self.mapping.part_shape[len(outputs) :]
        rows, _ = rows_and_columns(self.mapping, (*outputs, *(slice(0, size) for size in sizes)))
        shape = [part.stop - part.start for part in index]
        if self.layout.rows is None:  # one scale for the matrix
            part = self.source.read_stored(self.weight + ".scale", (*lead, slice(0, 1))).astype(np.float32)
            return np.broadcast_to(part, (*part.shape[:-1], len(rows))).reshape(shape)
        rows = rows // self.layout.rows
        columns = np.zeros(1, np.int64)
        if self.groups is not None:
            block = self.layout.columns
            assert block is not None
            columns = np.arange(inner[-1].start, inner[-1].stop) * (self.mapping.shape[1] // self.groups) // block
        part = self.source.read_stored(self.weight + ".scale", (*lead, _window(rows), _window(columns)))
        part = _choose(_choose(part, rows, axis=-2), columns, axis=-1)
        return part.astype(np.float32).reshape(shape)

    def _divide(self, index: Index) -> tuple[Index, Index]:
        depth = len(self.mapping.index)
        return index[:depth], index[depth:]


def plan_leaves(source: Source, model: Transformer, mesh: Mesh) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """Decide for each quantised weight of a source whether it stays so on a mesh.

    Args:
        source: the checkpoint.
        model: abstract, with stacked groups and the rules of its placement.
        mesh: where it will lie.

    Returns:
        The leaves by weight, and for those that are dequantised a sentence for each reason.

    Raises:
        ShardingError: the mesh does not divide the model.
    """
    weights = weights_by_name(model)
    formats = {name: layout for name, layout in source.quantized_weights().items() if name in weights}
    held = model.ops.storage.quantized_dtype
    # What `fsdp` splits besides, it splits by whole groups.
    placed = shardings(model, mesh, dataclasses.replace(model.rules, fsdp=())) if formats else {}
    leaves: dict[str, Leaf] = {}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, layout in formats.items():
        found = _decide(source, name, weights[name], layout=layout, placed=placed[name], held=held)
        if isinstance(found, Leaf):
            leaves[name] = found
        else:
            reasons[found].append(name)
    notes = [f"dequantised, because {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return leaves, tuple(notes)


def leaf_dtype(layout: Format) -> np.dtype | None:
    """The narrowest dtype that holds what a format's scales multiply; None if that takes more than eight bits."""
    match layout:
        case Fp8():
            return _FP8
        case Int8():
            return None if layout.asymmetric else _INT8
        case PackedInt():
            # Of symmetric values from -2^(bits-1) on; the difference of two values is below 2^bits.
            bits = layout.bits + layout.asymmetric
            return _INT4 if bits <= 4 else _INT8 if bits <= 8 else None


def _decide(
    source: Source,
    name: str,
    weight: Weight,
    *,
    layout: Format | None,
    placed: NamedSharding,
    held: Callable[[Any], np.dtype],
) -> Leaf | str:
    """The leaf, or why there is none."""
    if layout is None:
        return "not quantised alike in all layers and experts"
    if not weight.contracting_dims:
        return "the model has no product for it in quantised form"
    mapping, shape = source.mapping(name), weight.get_raw_value().shape
    first, inputs = len(shape) - weight.contracting_dims, mapping.shape[-1]
    if math.prod(shape[first:]) != inputs:
        return "its matrices are not stored by outputs and inputs"
    dtype = leaf_dtype(layout)
    if dtype is None:
        return "values less their zero points take more than eight bits"
    dtype = held(dtype)
    block = layout.columns
    if block is None or block >= inputs:
        return Leaf(source, name, layout, mapping, None, dtype)
    share = placed.shard_shape(shape)
    if share[first + 1 :] != shape[first + 1 :]:
        return "its inputs are split over devices by more than their first dimension"
    local = math.prod(share[first:])
    group = math.gcd(block, local)
    if group < min(block, MIN_GROUP):
        return f"groups of {block} do not divide the inputs that a device has of them"
    return Leaf(source, name, layout, mapping, inputs // group, dtype)


def _window(numbers: np.ndarray) -> slice:
    """From the first to the last of increasing numbers."""
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def _choose(array: np.ndarray, numbers: np.ndarray, *, axis: int) -> np.ndarray:
    """The numbers out of their window."""
    inside: Any = numbers - numbers[0]
    if len(inside) == array.shape[axis] and inside[-1] == len(inside) - 1 and np.all(np.diff(inside) == 1):
        return array
    return array.take(inside, axis=axis)
