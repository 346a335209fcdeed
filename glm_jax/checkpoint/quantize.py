"""Making quantised matrices: symmetric, each scale from the largest magnitude that it covers, rounded to nearest even.

The formats are those of `quantized`, whose `dequantize` is the inverse up to rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.names import TensorMapping
from glm_jax.checkpoint.orbax_io import DTYPES as NUMPY_DTYPES_BY_NAME
from glm_jax.checkpoint.orbax_io import ArraySpec
from glm_jax.checkpoint.quantized import Format, Fp8, Index, Int8, PackedInt, Part, stored_mappings
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
from glm_jax.configs import ModelConfig
from glm_jax.errors import CheckpointError, InputError
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name

METHODS: dict[str, Format] = {
    "int8": Int8(),
    "fp8": Fp8(1, None, "_scale"),
    "int4": PackedInt(4, 128),
    "fp8-blocks": Fp8(128, 128, "_scale_inv"),
}
_SLAB_VALUES = 2**22  # quantised at a time
_ROW_BLOCK = 128  # rows that are quantised together: no format made here has larger blocks
_SMALLEST_GROUP = 32
_FP8_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
_INT8_MAX, _INT4_MAX = 127.0, 7.0
_PER_WORD = 8


class ArrayReader(Protocol):
    """Where the values of weights come from."""

    def read(self, array: str, index: Index) -> np.ndarray:
        """A slice of a weight."""
        ...

    def tensors_in(self, array: str, index: Index) -> list[tuple[str, TensorMapping]]:
        """The names and mappings of the tensors that a slice is made of."""
        ...


class ArrayWriter(Protocol):
    """Where the slices of arrays go: into a checkpoint, or beside one that they are compared with."""

    @property
    def arrays(self) -> Mapping[str, ArraySpec]:
        """Every array."""
        ...

    def write(self, name: str, index: Index, array: np.ndarray) -> None:
        """Take one slice, whole chunks, in the array's dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Loss:
    """What rounding changed: sums over the values of the squared difference and of the square."""

    difference: float
    square: float

    @property
    def relative(self) -> float:
        """Root mean square of the difference, relative to that of the values."""
        return (self.difference / self.square) ** 0.5 if self.square else 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.difference + other.difference, self.square + other.square)


def method(name: str) -> Format:
    """The format of a method's name.

    Raises:
        InputError: there is no such method; the line names them.
    """
    if name not in METHODS:
        raise InputError(f"quantize is {name!r}; it is one of {', '.join(METHODS)}")
    return METHODS[name]


def choose(config: ModelConfig, layout: Format) -> tuple[dict[str, Format], list[str]]:
    """The format of each weight that a method quantises: those that say which of their dimensions are inputs.

    Groups that do not fill a weight's inputs are made smaller for it; a weight with too few is left as it is, with a
    note.
    """
    chosen: dict[str, Format] = {}
    left = []
    for name, weight in weights_by_name(Transformer(config)).items():
        if not weight.contracting_dims:
            continue
        own, inputs = layout, math.prod(weight.get_raw_value().shape[-weight.contracting_dims :])
        if isinstance(layout, PackedInt) and layout.group is not None:
            group = math.gcd(layout.group, inputs)
            if group < min(_SMALLEST_GROUP, layout.group):
                left.append(name)
                continue
            own = dataclasses.replace(layout, group=group)
        chosen[name] = own
    notes = [f"not quantised, for their inputs fill no groups: {', '.join(left)}"] if left else []
    return chosen, notes


def made_dtype(layout: Format, part: Part) -> np.dtype:
    """What this project stores a part of a format in, where a source may use several dtypes."""
    if part.array == ".scale" and not isinstance(layout, PackedInt):
        return np.dtype(np.float32)
    return NUMPY_DTYPES[part.dtypes[0]]


def quantize_item(
    form: ArrayReader, writer: ArrayWriter, weight: str, box: Index, *, layout: Format, mapping: TensorMapping
) -> Loss:
    """Quantise the matrices in `box` of a weight, each as large as `mapping`, some rows at a time; write their parts.

    Raises:
        CheckpointError: a value is not finite.
    """
    depth = len(mapping.index)
    lead, inner = box[:depth], box[depth:]
    places = list(itertools.product(*(range(part.start, part.stop) for part in lead)))
    stored, shapes = stored_mappings(layout, "", mapping), layout.shapes(mapping.shape)
    made = [part for part in layout.parts if part.array is not None]
    buffers = {
        part.suffix: np.empty(
            (len(places), *shapes[part.suffix]), NUMPY_DTYPES_BY_NAME[writer.arrays[weight + str(part.array)].dtype]
        )
        for part in made
    }
    lost = Loss(0.0, 0.0)
    for number, place in enumerate(places):
        at = tuple(slice(i, i + 1) for i in place)
        for slab, rows in slabs(mapping, _SLAB_VALUES):
            matrix = form.read(weight, (*at, slab, *inner[1:])).reshape(rows.stop - rows.start, mapping.shape[1])
            try:
                parts = quantize(layout, matrix)
            except ValueError as error:
                name = form.tensors_in(weight, (*at, slab, *inner[1:]))[0][0]
                raise CheckpointError(f"{name}: {error}; it cannot be quantised") from None
            lost += loss(layout, matrix, parts)
            for part in made:
                start, stop = layout.part_rows(part.suffix, rows.start, rows.stop)
                buffers[part.suffix][number, start:stop] = parts[part.suffix]
    for part in made:
        region = (*lead, *(slice(0, size) for size in stored[part.suffix].part_shape))
        shape = tuple(where.stop - where.start for where in region)
        writer.write(weight + str(part.array), region, buffers[part.suffix].reshape(shape))
    return lost


def slabs(mapping: TensorMapping, values: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a tensor of about as many values, in whole blocks of rows.

    Yields where each lies along the first dimension of the tensor's place in the weight, and along the tensor's own.
    """
    first, rows = mapping.part_shape[0], mapping.shape[0]
    each = rows // first
    whole = _ROW_BLOCK // math.gcd(_ROW_BLOCK, each)  # of the first dimension, that are whole blocks of rows
    step = max(1, values // (each * math.prod(mapping.shape[1:]) * whole)) * whole
    for start in range(0, first, step):
        stop = min(start + step, first)
        yield slice(start, stop), slice(start * each, stop * each)


def quantize(layout: Format, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix [out, in], in any float dtype, as the parts of a format, by their suffix.

    Rows that fill whole blocks may be done apart: the parts of the whole are those of the rows, one below the other.

    Raises:
        ValueError: a value is not finite, or the inputs do not fill whole groups.
    """
    values = matrix.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    return _QUANTIZERS[type(layout)](layout, values)


def loss(layout: Format, matrix: np.ndarray, parts: dict[str, np.ndarray]) -> Loss:
    """What quantising `matrix` to `parts` changed, in the bfloat16 values that are computed with."""
    rows, columns = (np.arange(size) for size in matrix.shape)
    back = np.empty(matrix.shape, ml_dtypes.bfloat16)
    layout.dequantize(parts, rows, columns, out=back)
    values = matrix.astype(np.float32)
    difference = (back.astype(np.float32) - values).ravel()
    return Loss(float(np.dot(difference, difference)), float(np.dot(values.ravel(), values.ravel())))


def _fp8(layout: Fp8, values: np.ndarray) -> dict[str, np.ndarray]:
    assert layout.rows is not None  # rows are quantised apart: none is made with one scale in all
    scale = _scale(_block_maxima(values, layout.rows, layout.columns), _FP8_MAX)
    spread = _spread(scale, values.shape, layout.rows, layout.columns)
    scaled = np.clip(values / spread, -_FP8_MAX, _FP8_MAX)
    return {"": scaled.astype(ml_dtypes.float8_e4m3fn), layout.scale_suffix: scale}


def _int8(layout: Int8, values: np.ndarray) -> dict[str, np.ndarray]:
    scale = _scale(_block_maxima(values, 1, None), _INT8_MAX)
    rounded = np.clip(np.rint(values / scale), -_INT8_MAX, _INT8_MAX)
    return {"": rounded.astype(np.int8), layout.scale_suffix: scale}


def _int4(layout: PackedInt, values: np.ndarray) -> dict[str, np.ndarray]:
    rows, columns = values.shape
    group = layout.group or columns
    if columns % group or columns % _PER_WORD:
        raise ValueError(f"{columns} inputs do not fill groups of {group}")
    # The scale is rounded first, so that the values are chosen for the scale that they will be multiplied with.
    maxima = _scale(_block_maxima(values, 1, group), _INT4_MAX)
    scale = maxima.astype(ml_dtypes.bfloat16)
    spread = np.repeat(scale.astype(np.float32), group, axis=1)
    nibbles = (np.clip(np.rint(values / spread), -_INT4_MAX, _INT4_MAX) + 8).astype(np.uint8)
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return {
        "_packed": np.ascontiguousarray(pairs).view("<i4"),
        "_scale": scale,
        "_shape": np.array([rows, columns], np.int64),
    }


_QUANTIZERS: dict[type, Callable[..., dict[str, np.ndarray]]] = {Fp8: _fp8, Int8: _int8, PackedInt: _int4}


def _block_maxima(values: np.ndarray, rows: int, columns: int | None) -> np.ndarray:
    """The largest magnitude of each block; blocks over the edge are cut off."""
    magnitudes = np.abs(values)
    columns = values.shape[1] if columns is None else columns
    down = np.maximum.reduceat(magnitudes, np.arange(0, values.shape[0], rows), axis=0)
    return np.maximum.reduceat(down, np.arange(0, values.shape[1], columns), axis=1)


def _spread(scale: np.ndarray, shape: tuple[int, ...], rows: int, columns: int | None) -> np.ndarray:
    """The scale of every value, or one that broadcasts to it."""
    down = np.repeat(scale, rows, axis=0)[: shape[0]]
    return down if columns is None else np.repeat(down, columns, axis=1)[:, : shape[1]]


def _scale(maxima: np.ndarray, largest: float) -> np.ndarray:
    """What brings `maxima` to `largest`; 1 where all values are zero. Never so small that it rounds to zero."""
    smallest = np.finfo(np.float32).tiny
    return np.where(maxima == 0, 1.0, np.maximum(maxima / np.float32(largest), smallest)).astype(np.float32)
