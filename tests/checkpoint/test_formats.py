"""Every format that is read: any slice of a matrix is what numpy says, bit for bit, whatever its shape and groups."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.checkpoint.formats import Fp8, Int8, PackedInt
from glm_jax.checkpoint.quantized import Format, format_from_json
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, Matrix

DTYPES = (BF16, np.float16, np.float32)


def make(layout: Format, shape: tuple[int, int], rng: np.random.Generator, dtype: object = BF16) -> Matrix:
    """A random matrix in a format."""
    match layout:
        case PackedInt():
            options = {"asymmetric": layout.asymmetric, "spaced": layout.spaced, "dtype": dtype}
            return sources.integers(rng, shape, layout.bits, layout.group, **options)
        case Int8():
            return sources.bytes_of(rng, shape, layout.rows, layout.columns, asymmetric=layout.asymmetric, dtype=dtype)
        case Fp8():
            return sources.floats(rng, shape, layout.rows, layout.columns, dtype=dtype)


def check(layout: Format, shape: tuple[int, int], seed: int, dtype: object = BF16) -> None:
    """Shapes of the parts, and the whole matrix, a few of its slices and some rows of its files by themselves."""
    rng = np.random.default_rng(seed)
    parts, expected = make(layout, shape, rng, dtype)
    assert {suffix: part.shape for suffix, part in parts.items()} == layout.shapes(shape)
    every = [np.arange(size) for size in shape]
    chosen = [[np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False)) for size in shape] for _ in range(3)]
    for rows, columns in [every, *chosen]:
        for target in (BF16, np.float32):
            out = np.empty((len(rows), len(columns)), target)
            layout.dequantize(parts, rows, columns, out=out)
            assert out.tobytes() == expected[np.ix_(rows, columns)].astype(target).tobytes()
        # As a reader of files does it: the rows of each part that these rows are stored in.
        first, last = layout.first_row(int(rows[0])), int(rows[-1]) + 1
        own = {part.suffix for part in layout.parts if part.array is not None}
        some = {suffix: parts[suffix][slice(*layout.part_rows(suffix, first, last))] for suffix in own}
        out = np.empty((len(rows), len(columns)), BF16)
        layout.dequantize(some, rows - first, columns, out=out)
        assert out.tobytes() == expected[np.ix_(rows, columns)].tobytes()
    assert format_from_json(json.loads(json.dumps(layout.to_json()))) == layout


BITS = range(1, 9)
LAYOUTS: list[Format] = [
    *(PackedInt(bits, group, asymmetric) for bits in BITS for group in (32, None) for asymmetric in (False, True)),
    *(PackedInt(bits, 32, asymmetric, spaced=True) for bits in (3, 5, 6, 7) for asymmetric in (False, True)),
    *(
        Int8(rows, columns, asymmetric=a)
        for rows, columns in [(None, None), (1, None), (1, 32), (16, 24)]
        for a in (False, True)
    ),
    *(Fp8(rows, columns, "_scale") for rows, columns in [(None, None), (1, None), (1, 32), (128, 128), (3, 400)]),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe().replace(" ", "-"))
@pytest.mark.parametrize("shape", [(20, 96), (200, 320), (37, 100)], ids=str)
def test_every_slice_is_what_numpy_says(layout, shape):
    for seed, dtype in enumerate(DTYPES):
        check(layout, shape, seed, dtype)


blocks = st.one_of(
    st.tuples(st.none(), st.none()), st.tuples(st.integers(1, 70), st.one_of(st.none(), st.integers(1, 70)))
)
packed = st.builds(
    PackedInt, st.integers(1, 8), st.one_of(st.none(), st.integers(1, 80)), st.booleans(), spaced=st.booleans()
)
byte = st.builds(lambda block, a: Int8(*block, asymmetric=a), blocks, st.booleans())
float8 = st.builds(lambda block, suffix: Fp8(*block, suffix), blocks, st.just("_scale"))


@settings(max_examples=150, deadline=None)
@given(st.one_of(packed, byte, float8), st.integers(1, 80), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_any_shape_and_any_group(layout, rows, columns, seed):
    check(layout, (rows, columns), seed, DTYPES[seed % 3])


def test_scales_that_bfloat16_does_not_hold_are_multiplied_as_they_are():
    """A scale in float16 rounded first to bfloat16 would change an eighth of the weights."""
    parts, expected = make(PackedInt(4, 32), (64, 256), np.random.default_rng(0), np.float16)
    rounded = {**parts, "_scale": parts["_scale"].astype(BF16)}
    rows, columns, out = np.arange(64), np.arange(256), np.empty((64, 256), BF16)
    PackedInt(4, 32).dequantize(rounded, rows, columns, out=out)
    assert 0.05 < np.mean(out != expected) < 0.3


def test_integers_of_old_manifests():
    """Packed int4 was the only packed format, and int8 had channels only."""
    assert format_from_json({"kind": "int4", "group": 32}) == PackedInt(4, 32)
    assert format_from_json({"kind": "int8", "scale_suffix": "_scale"}) == Int8(1, None)


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "packed", "bits": 0, "group": 32},
        {"kind": "packed", "bits": 9, "group": 32},
        {"kind": "packed", "bits": True, "group": 32},
        {"kind": "packed", "bits": 4, "group": 0},
        {"kind": "packed", "bits": 4, "group": 32, "asymmetric": 1},
        {"kind": "packed", "bits": 4, "group": 32, "spaced": None},
        {"kind": "int8", "rows": None, "columns": 8, "scale_suffix": "_scale"},
        {"kind": "int8", "rows": 1, "columns": 8, "scale_suffix": "_scale", "asymmetric": "no"},
        {"kind": "fp8", "rows": 1.0, "columns": 8, "scale_suffix": "_scale"},
        {"kind": "fp8", "rows": 1, "columns": -8, "scale_suffix": "_scale"},
    ],
    ids=str,
)
def test_what_is_no_format(content):
    with pytest.raises(ValueError, match="a quantised format"):
        format_from_json(content)
