"""Quantised matrices among the weights: which arrays one is kept as, and what a slice of a weight is of its matrix.

Whoever reads a quantised weight, and in whichever form, gets the same numbers: conversion, loading from Hugging Face's
files and loading from a kept checkpoint. The formats themselves are in `formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from glm_jax.checkpoint.formats import DEQUANTIZED, FLOAT_DTYPES, Fp8, Int8, PackedInt, Part
from glm_jax.checkpoint.names import TensorMapping

Index = tuple[slice, ...]

Format = Fp8 | Int8 | PackedInt


def format_from_json(content: Mapping[str, Any]) -> Format:
    """The format that `to_json` described.

    Raises:
        ValueError, TypeError, KeyError: it describes none.
    """
    kinds: dict[str, type[Format]] = {"fp8": Fp8, "int8": Int8, "packed": PackedInt}
    rest = dict(content)
    if rest["kind"] == "int4":  # the only packed integers that there once were
        rest |= {"kind": "packed", "bits": 4}
    found = kinds[rest.pop("kind")](**rest)
    if isinstance(found, PackedInt):
        wrong = type(found.bits) is not int or not 1 <= found.bits <= 8
        sizes, flags = [found.group], [found.asymmetric, found.spaced]
    else:
        wrong = found.rows is None and found.columns is not None
        sizes, flags = [found.rows, found.columns], [found.asymmetric] if isinstance(found, Int8) else []
        if found.scale_suffix not in ("_scale", "_scale_inv"):
            raise ValueError(f"scales under the suffix {found.scale_suffix!r}")
    if wrong or any(size is not None and (type(size) is not int or size < 1) for size in sizes):
        raise ValueError(f"a quantised format {content}")
    if any(type(flag) is not bool for flag in flags):
        raise ValueError(f"a quantised format {content}")
    return found


def array_suffixes(layout: Format) -> tuple[str, ...]:
    """What stands behind a weight's name in the names of the arrays that keep it."""
    return tuple(part.array for part in layout.parts if part.array is not None)


def stored_mappings(layout: Format, name: str, mapping: TensorMapping) -> dict[str, TensorMapping]:
    """Where the tensors of a quantised matrix go when they are kept, by their names.

    Values that have the weight's shape take its place. Scales and packed values keep their own dimensions behind the
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


__all__ = [
    "DEQUANTIZED",
    "FLOAT_DTYPES",
    "Format",
    "Fp8",
    "Index",
    "Int8",
    "PackedInt",
    "Part",
    "array_suffixes",
    "format_from_json",
    "rows_and_columns",
    "stored_mappings",
]
