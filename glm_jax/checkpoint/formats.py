"""Formats of quantised matrices: which tensors one is stored as, and any rows and columns of what it stands for.

A weight is what the float32 product of value and scale is, rounded once to bfloat16. Only the rows and columns asked
for are computed, without a float32 copy of the matrix.

Sources: DeepSeek-V3's README_WEIGHTS.md and inference/kernel.py (blocks), compressed-tensors (all else).
How a config.json names these formats is in `quantization_config`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.packing import Packing, span

FLOAT_DTYPES = ("BF16", "F16", "F32")
DEQUANTIZED = np.dtype(ml_dtypes.bfloat16)
_CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_MOST_VALUES = 2**19  # unpacked at a time
_SMALL_BLOCK = 512  # values; a table of all codes' products pays for larger ones

Stored = Mapping[str, np.ndarray]


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
class _Blocks:
    """Values of the matrix's own shape, each block of `rows` x `columns` of them with one scale.

    A block over the edge is cut off: a matrix of 576 rows has five rows of blocks of 128.

    Attributes:
        rows: of a block; 1 for scales of each output's own; None, with no `columns` either, for one scale in all.
        columns: of a block; None for all of them.
        scale_suffix: of the name of the scales: `_scale_inv` (DeepSeek's, which multiplies all the same) or `_scale`.
    """

    rows: int | None
    columns: int | None
    scale_suffix: str

    def scale_shape(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a matrix [out, in]."""
        if self.rows is None:
            return (1,)
        return -(-matrix[0] // self.rows), 1 if self.columns is None else -(-matrix[1] // self.columns)

    def first_row(self, row: int) -> int:
        """The first row whose values can be stored apart from those before it, and still have the row in them."""
        return row if self.rows is None else row // self.rows * self.rows

    def part_rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a part that the matrix's rows from a `first_row` to before `stop` are stored in."""
        if suffix == "":
            return start, stop
        return (0, 1) if self.rows is None else (start // self.rows, -(-stop // self.rows))

    def _scales(self, stored: Stored, suffix: str) -> np.ndarray:
        """The scales, or the zero points, as float32 [rows of blocks, columns of blocks]."""
        part = stored[suffix].astype(np.float32)
        return part.reshape(-1, part.shape[-1])

    def _of_blocks(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks that rows and columns lie in."""
        down = np.zeros_like(rows) if self.rows is None else rows // self.rows
        return down, np.zeros_like(columns) if self.columns is None else columns // self.columns

    def _where(self) -> str:
        """Which values have a scale of their own, for people."""
        if self.rows is None:
            return "with one scale for the matrix"
        if self.columns is None and self.rows == 1:
            return "with a scale for each output channel"
        if self.rows == 1:
            return f"in groups of {self.columns}"
        return f"in blocks of {self.rows} x {'all' if self.columns is None else self.columns}"


@dataclasses.dataclass(frozen=True)
class Fp8(_Blocks):
    """Values in float8_e4m3fn with a scale for each block."""

    @functools.cached_property  # asked for each of a checkpoint's matrices
    def parts(self) -> tuple[Part, ...]:
        """Values and scales."""
        return Part("", "", ("F8_E4M3",)), Part(self.scale_suffix, ".scale", FLOAT_DTYPES)

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a matrix [out, in], by suffix."""
        return {"": matrix, self.scale_suffix: self.scale_shape(matrix)}

    def dequantize(self, stored: Stored, rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray) -> None:
        """Write the weights at `rows` and `columns` (increasing numbers) of a matrix to `out` [rows, columns].

        A block has one scale and its values are of 256 codes: the products are looked up, unless blocks are small.

        Args:
            stored: the parts of the whole matrix, or of some rows from a `first_row` on, by suffix.
            rows: numbers of rows.
            columns: numbers of columns.
            out: bfloat16, or another dtype that the bfloat16 weights are cast to.
        """
        codes, scale = stored[""].view(np.uint8), self._scales(stored, self.scale_suffix)
        down, across = self._of_blocks(rows, columns)
        with np.errstate(all="ignore"):  # not a number, and what overflows, is what the source says
            if (self.rows or len(rows)) * (self.columns or len(columns)) < _SMALL_BLOCK:
                for strip in _strips(len(rows), len(columns)):
                    part = _CODES.take(codes[span(rows[strip])][:, span(columns)], mode="clip")
                    part *= scale[down[strip]][:, across]
                    out[strip] = part.astype(DEQUANTIZED)
                return
            bits = np.dtype(f"u{out.itemsize}")
            blocks = [(at, span(columns[at]), block) for at, block in _runs(across, len(across))]
            for at_rows, row_block in _runs(down, max(1, _MOST_VALUES // len(columns))):
                here = codes[span(rows[at_rows])]
                for at, chosen, block in blocks:
                    table = (_CODES * scale[row_block, block]).astype(DEQUANTIZED).astype(out.dtype)
                    out.view(bits)[at_rows, at] = table.view(bits).take(here[:, chosen], mode="clip")

    def describe(self) -> str:
        """For people."""
        return f"fp8 {self._where()}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `format_from_json` is the inverse."""
        return {"kind": "fp8", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Int8(_Blocks):
    """Values in int8, with a scale for each output channel or for each block, and perhaps a zero point beside it.

    Integers of fewer bits may be stored so, too.

    Attributes:
        asymmetric: zero points are taken from the values before these are scaled.
    """

    rows: int | None = 1
    columns: int | None = None
    scale_suffix: str = "_scale"
    asymmetric: bool = False

    @functools.cached_property  # asked for each of a checkpoint's matrices
    def parts(self) -> tuple[Part, ...]:
        """Values, scales and zero points."""
        parts = Part("", "", ("I8",)), Part(self.scale_suffix, ".scale", FLOAT_DTYPES)
        return (*parts, Part("_zero_point", ".zero_point", ("I8",))) if self.asymmetric else parts

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a matrix [out, in], by suffix."""
        scale = self.scale_shape(matrix)
        return {"": matrix, self.scale_suffix: scale, **({"_zero_point": scale} if self.asymmetric else {})}

    def dequantize(self, stored: Stored, rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray) -> None:
        """Write the weights at `rows` and `columns` of a matrix to `out`, as `Fp8.dequantize`."""
        values, scale = stored[""], self._scales(stored, self.scale_suffix)
        zero = self._scales(stored, "_zero_point") if self.asymmetric else None
        down, across = self._of_blocks(rows, columns)
        every = slice(None) if self.columns is None else across  # one column of scales serves all
        with np.errstate(all="ignore"):
            for strip in _strips(len(rows), len(columns)):
                part = values[span(rows[strip])][:, span(columns)].astype(np.float32)
                if zero is not None:
                    part -= zero[down[strip]][:, every]
                part *= scale[down[strip]][:, every]
                out[strip] = part.astype(DEQUANTIZED)

    def describe(self) -> str:
        """For people."""
        return f"int8 {self._where()}{' and zero points' if self.asymmetric else ''}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `format_from_json` is the inverse."""
        return {"kind": "int8", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class PackedInt:
    """Signed values of few bits, packed into int32 along the input with 2^(bits-1) added; a scale for each group.

    Attributes:
        bits: of a value, 1 to 8.
        group: neighbouring inputs with one scale; None for all of them.
        asymmetric: zero points, packed in the same way along the output, are taken from the values before scaling.
        spaced: the packing of old versions of compressed-tensors for 3, 5, 6 and 7 bits (see `packing`).
    """

    bits: int
    group: int | None
    asymmetric: bool = False
    spaced: bool = False

    @property
    def rows(self) -> int:
        """Each output has scales of its own."""
        return 1

    @property
    def columns(self) -> int | None:
        """The inputs with one scale; None for all of them."""
        return self.group

    @property
    def packing(self) -> Packing:
        """How values and zero points lie in their words."""
        return Packing(self.bits, self.spaced)

    @functools.cached_property  # asked for each of a checkpoint's matrices
    def parts(self) -> tuple[Part, ...]:
        """Packed values, scales, packed zero points, and the shape of the matrix."""
        packed, scale = Part("_packed", ".packed", ("I32",)), Part("_scale", ".scale", FLOAT_DTYPES)
        zero = (Part("_zero_point", ".zero_point", ("I32",)),) if self.asymmetric else ()
        return packed, scale, *zero, Part("_shape", None, ("I64", "I32"))

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a matrix [out, in], by suffix."""
        rows, columns = matrix
        groups = 1 if self.group is None else -(-columns // self.group)
        zero = {"_zero_point": (self.packing.words(rows), groups)} if self.asymmetric else {}
        return {"_packed": (rows, self.packing.words(columns)), "_scale": (rows, groups), **zero, "_shape": (2,)}

    def first_row(self, row: int) -> int:
        """The row itself, which has scales of its own; or one whose zero points begin a word."""
        return row // self.packing.whole * self.packing.whole if self.asymmetric else row

    def part_rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a part that the matrix's rows from a `first_row` to before `stop` are stored in."""
        return (self.packing.words(start), self.packing.words(stop)) if suffix == "_zero_point" else (start, stop)

    def windows(self, rows: np.ndarray, columns: np.ndarray) -> dict[str, tuple[slice, slice]]:
        """The rows and columns of the parts that `integers` of those rows and columns are made of."""
        found = {"_packed": (slice(int(rows[0]), int(rows[-1]) + 1), self.packing.window(columns))}
        if self.asymmetric:
            groups = self._groups(columns)
            found["_zero_point"] = self.packing.window(rows), slice(int(groups[0]), int(groups[-1]) + 1)
        return found

    def integers(self, stored: Stored, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """What the scales multiply: the values less their zero points, [..., rows, columns] in int8 or, if wide, int16.

        Args:
            stored: the `windows` of the rows and columns, with any leading dimensions.
            rows: numbers of rows, increasing.
            columns: numbers of columns, increasing.
        """
        packed = stored["_packed"][..., span(rows - rows[0]), :]
        values = self.packing.unpack(packed, columns)
        if not self.asymmetric:
            return (values - np.uint8(1 << (self.bits - 1))).view(np.int8)  # modulo 256, which int8 reads as signed
        # Values and zero points have the same number added, so that it goes away.
        groups, zero = self._groups(columns), self.packing.unpack_rows(stored["_zero_point"], rows)
        zero = zero if self.group is None else zero[..., groups - groups[0]]
        return values.astype(np.int16) - zero if self.bits == 8 else (values - zero).view(np.int8)

    def dequantize(self, stored: Stored, rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray) -> None:
        """Write the weights at `rows` and `columns` of a matrix to `out`, as `Fp8.dequantize`."""
        across = slice(None) if self.group is None else self._groups(columns)
        with np.errstate(all="ignore"):
            for strip in _strips(len(rows), int(columns[-1] - columns[0]) + self.packing.whole):
                chosen = rows[strip]
                windows = {suffix: stored[suffix][at] for suffix, at in self.windows(chosen, columns).items()}
                part = self.integers(windows, chosen, columns).astype(np.float32)
                part *= stored["_scale"][span(chosen)].astype(np.float32)[:, across]
                out[strip] = part.astype(DEQUANTIZED)

    def _groups(self, columns: np.ndarray) -> np.ndarray:
        return np.zeros_like(columns) if self.group is None else columns // self.group

    def describe(self) -> str:
        """For people."""
        groups = "with a scale for each output channel" if self.group is None else f"in groups of {self.group}"
        return f"int{self.bits} {groups}{' and zero points' if self.asymmetric else ''}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `format_from_json` is the inverse."""
        return {"kind": "packed", **dataclasses.asdict(self)}


def _strips(rows: int, columns: int) -> Iterator[slice]:
    """Rows of about `_MOST_VALUES` values, one strip after the other."""
    step = max(1, _MOST_VALUES // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _runs(blocks: np.ndarray, most: int) -> list[tuple[slice, int]]:
    """Where each block begins and ends in an increasing list of block numbers, in pieces of at most so many."""
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
    return [
        (slice(at, min(at + most, stop)), int(blocks[start]))
        for start, stop in itertools.pairwise(edges)
        for at in range(start, stop, most)
    ]
