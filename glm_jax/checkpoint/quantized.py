"""Quantised matrices: which tensors one is stored as, and any rows and columns of the weight that they stand for.

A weight is what the float32 product of value and scale is, rounded once to bfloat16, whoever reads it and in whichever
form: conversion, loading from Hugging Face's files and loading from a kept checkpoint all give the same weights. Only
the rows and columns asked for are computed, without a float32 copy of the matrix.

Sources: DeepSeek-V3's README_WEIGHTS.md and inference/kernel.py (blocks), compressed-tensors (channels, packed int4).
How a config.json names these formats is in `quantization_config`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.names import TensorMapping

FLOAT_DTYPES = ("BF16", "F16", "F32")
DEQUANTIZED = np.dtype(ml_dtypes.bfloat16)
_CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_MOST_VALUES = 2**20  # unpacked at a time
_PER_WORD = 8  # int4 values in an int32

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised matrix is stored as.

    Attributes:
        suffix: behind the weight's name in Hugging Face's files.
        array: behind the weight's name in the Orbax layout; None for a tensor that only repeats the matrix's shape.
        dtypes: what it may be stored in, in safetensors' words.
    """

    suffix: str
    array: str | None
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Values in float8_e4m3fn, each block of `rows` x `columns` of them times one scale.

    A block over the edge is cut off: a matrix of 576 rows has five rows of blocks of 128.

    Attributes:
        rows: of a block; 1 for a scale for each output channel.
        columns: of a block; None for all of them.
        scale_suffix: of the name of the scales: `_scale_inv` (DeepSeek's, which multiplies all the same) or `_scale`.
    """

    rows: int
    columns: int | None
    scale_suffix: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """Values and scales."""
        return Part("", "", ("F8_E4M3",)), Part(self.scale_suffix, ".scale", FLOAT_DTYPES)

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a matrix [out, in], by suffix."""
        rows, columns = matrix
        across = 1 if self.columns is None else -(-columns // self.columns)
        return {"": matrix, self.scale_suffix: (-(-rows // self.rows), across)}

    def first_row(self, row: int) -> int:
        """The first row whose values can be stored apart from those before it, and still have the row in them."""
        return row // self.rows * self.rows

    def dequantize(
        self, stored: Mapping[str, np.ndarray], rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray
    ) -> None:
        """Write the weights at `rows` and `columns` (increasing numbers) of a matrix to `out` [rows, columns].

        A block has one scale and its values are of 256 codes: the products are looked up.

        Args:
            stored: the parts of the whole matrix, or of some rows from a `first_row` on, by suffix.
            rows: numbers of rows.
            columns: numbers of columns.
            out: bfloat16, or another dtype that the bfloat16 weights are cast to.
        """
        codes, scale = stored[""].view(np.uint8), stored[self.scale_suffix].astype(np.float32)
        bits = np.dtype(f"u{out.itemsize}")
        blocks = np.zeros_like(columns) if self.columns is None else columns // self.columns
        across = [(at, _span(columns[at]), block) for at, block in _runs(blocks)]
        with np.errstate(all="ignore"):  # not a number, and what overflows, is what the source says
            for down, row_block in _runs(rows // self.rows):
                here = codes[_span(rows[down])]
                for at, chosen, block in across:
                    table = (_CODES * scale[row_block, block]).astype(DEQUANTIZED).astype(out.dtype)
                    out.view(bits)[down, at] = table.view(bits).take(here[:, chosen], mode="clip")

    def describe(self) -> str:
        """For people."""
        if self.columns is None:
            return "fp8 with a scale for each output channel"
        return f"fp8 in blocks of {self.rows} x {self.columns}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `format_from_json` is the inverse."""
        return {"kind": "fp8", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Int8:
    """Values in int8, -127 to 127, with a scale for each output channel.

    Attributes:
        scale_suffix: of the name of the scales.
    """

    scale_suffix: str = "_scale"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Values and scales."""
        return Part("", "", ("I8",)), Part(self.scale_suffix, ".scale", FLOAT_DTYPES)

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a matrix [out, in], by suffix."""
        return {"": matrix, self.scale_suffix: (matrix[0], 1)}

    def first_row(self, row: int) -> int:
        """The row itself: each has scales of its own."""
        return row

    def dequantize(
        self, stored: Mapping[str, np.ndarray], rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray
    ) -> None:
        """Write the weights at `rows` and `columns` of a matrix to `out`, as `Fp8.dequantize`."""
        values, scale = stored[""], stored[self.scale_suffix].astype(np.float32)
        step = max(1, _MOST_VALUES // max(1, len(columns)))
        with np.errstate(all="ignore"):
            for start in range(0, len(rows), step):
                chosen = _span(rows[start : start + step])
                part = values[chosen][:, _span(columns)].astype(np.float32)
                out[start : start + step] = (part * scale[chosen]).astype(DEQUANTIZED)

    def describe(self) -> str:
        """For people."""
        return "int8 with a scale for each output channel"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `format_from_json` is the inverse."""
        return {"kind": "int8", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """Values -8 to 7, eight in an int32 along the input, the first in the lowest bits, plus 8; a scale for each group.

    Attributes:
        group: neighbouring inputs with one scale.
    """

    group: int

    @property
    def parts(self) -> tuple[Part, ...]:
        """Packed values, scales, and the shape of the matrix."""
        packed, scale = Part("_packed", ".packed", ("I32",)), Part("_scale", ".scale", FLOAT_DTYPES)
        return packed, scale, Part("_shape", None, ("I64", "I32"))

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a matrix [out, in], by suffix."""
        rows, columns = matrix
        return {
            "_packed": (rows, -(-columns // _PER_WORD)),
            "_scale": (rows, -(-columns // self.group)),
            "_shape": (2,),
        }

    def first_row(self, row: int) -> int:
        """The row itself: each has scales of its own."""
        return row

    def dequantize(
        self, stored: Mapping[str, np.ndarray], rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray
    ) -> None:
        """Write the weights at `rows` and `columns` of a matrix to `out`, as `Fp8.dequantize`."""
        words = slice(columns[0] // _PER_WORD, columns[-1] // _PER_WORD + 1)
        inside, groups = _span(columns - words.start * _PER_WORD), columns // self.group
        step = max(1, _MOST_VALUES // (_PER_WORD * (words.stop - words.start)))
        with np.errstate(all="ignore"):
            for start in range(0, len(rows), step):
                chosen = _span(rows[start : start + step])
                pairs = np.ascontiguousarray(stored["_packed"][chosen, words], "<i4").view(np.uint8)
                values = np.empty((len(pairs), 2 * pairs.shape[1]), np.float32)
                values[:, 0::2], values[:, 1::2] = pairs & 15, pairs >> 4
                values -= 8
                scale = stored["_scale"][chosen].astype(np.float32)[:, groups]
                out[start : start + step] = (values[:, inside] * scale).astype(DEQUANTIZED)

    def describe(self) -> str:
        """For people."""
        return f"int4 in groups of {self.group}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `format_from_json` is the inverse."""
        return {"kind": "int4", **dataclasses.asdict(self)}


Format = Fp8 | Int8 | PackedInt4


def format_from_json(content: Mapping[str, Any]) -> Format:
    """The format that `to_json` described.

    Raises:
        ValueError, TypeError, KeyError: it describes none.
    """
    kinds: dict[str, type[Format]] = {"fp8": Fp8, "int8": Int8, "int4": PackedInt4}
    rest = dict(content)
    found = kinds[rest.pop("kind")](**rest)
    sizes = [found.group] if isinstance(found, PackedInt4) else []
    sizes += [found.rows, found.columns or 1] if isinstance(found, Fp8) else []
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"a quantised format of sizes {sizes}")
    if not isinstance(found, PackedInt4) and found.scale_suffix not in ("_scale", "_scale_inv"):
        raise ValueError(f"scales under the suffix {found.scale_suffix!r}")
    return found


def array_suffixes(layout: Format) -> tuple[str, ...]:
    """What stands behind a weight's name in the names of the arrays that keep it."""
    return tuple(part.array for part in layout.parts if part.array is not None)


def stored_mappings(layout: Format, name: str, mapping: TensorMapping) -> dict[str, TensorMapping]:
    """Where the tensors of a quantised matrix go when they are kept, by their names.

    Values that have the weight's shape take its place. Scales and packed values keep their two dimensions behind the
    leading indices: beside `moe.moe.experts.gate_up` [L, E, 2, F, D] there is `moe.moe.experts.gate_up.scale`
    [L, E, 2, F / 128, D / 128].
    """
    shapes = layout.shapes(mapping.shape)
    mappings = {}
    for part in layout.parts:
        if part.array is not None:
            shape = shapes[part.suffix]
            moved = TensorMapping(mapping.weight + part.array, mapping.index, shape, shape)
            mappings[name + part.suffix] = moved if part.array else mapping
    return mappings


def rows_and_columns(mapping: TensorMapping, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the stored matrix that `index` into the mapping's part of the weight selects.

    `q_b_proj` [N * H, D] is `attention.q_b` [N, H, D]: rows are numbered over the first two dimensions.
    """
    split, count = 0, 1
    while count < mapping.shape[0]:
        count *= mapping.part_shape[split]
        split += 1
    split = max(split, 1)
    return _numbers(mapping.part_shape[:split], index[:split]), _numbers(mapping.part_shape[split:], index[split:])


def _numbers(sizes: tuple[int, ...], index: Index) -> np.ndarray:
    numbers = np.zeros(1, np.int64)
    for size, part in zip(sizes, index, strict=True):
        numbers = (numbers[:, None] * size + np.arange(part.start, part.stop)).reshape(-1)
    return numbers


def _span(numbers: np.ndarray) -> slice | np.ndarray:
    """Increasing numbers as a slice, which needs no copy, where there is no gap."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _runs(blocks: np.ndarray) -> list[tuple[slice, int]]:
    """Where each block begins and ends in an increasing list of block numbers."""
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
    return [(slice(start, stop), int(blocks[start])) for start, stop in itertools.pairwise(edges)]
