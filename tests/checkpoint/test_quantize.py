"""Quantising: as near as the format allows, in the layout that the reader of that format has."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from glm_jax.checkpoint import quantize
from glm_jax.checkpoint.quantized import Fp8, PackedInt, format_from_json
from glm_jax.errors import InputError

METHODS = quantize.METHODS
SHAPES = [(192, 256), (576, 128), (1, 128), (130, 384)]


def matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, with an outlier in each."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 2, (shape[0], 1))
    values[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] *= 8
    return values.astype(ml_dtypes.bfloat16)


def scale_of_every_value(layout, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """By indexing, value by value."""
    rows, columns = np.indices(shape)
    if isinstance(layout, PackedInt):
        return parts["_scale"].astype(np.float32)[rows, columns // layout.group]
    down = layout.rows if isinstance(layout, Fp8) else 1
    across = (layout.columns if isinstance(layout, Fp8) else None) or shape[1]
    return parts[layout.scale_suffix].astype(np.float32)[rows // down, columns // across]


def values_of(layout, parts: dict[str, np.ndarray]) -> np.ndarray:
    if not isinstance(layout, PackedInt):
        return parts[""].astype(np.float32)
    words = parts["_packed"].astype(np.int64)[..., None] & 0xFFFFFFFF
    return ((words >> 4 * np.arange(8)) & 15).reshape(len(words), -1).astype(np.float32) - 8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_value_is_the_nearest_that_its_scale_allows(name, shape):
    layout, values = METHODS[name], matrix(shape)
    parts = quantize.quantize(layout, values)
    assert {suffix: part.shape for suffix, part in parts.items()} == layout.shapes(shape)
    scale, stored = scale_of_every_value(layout, parts, shape), values_of(layout, parts)
    exact = values.astype(np.float32) / scale
    if name == "int8":
        assert np.abs(stored - exact).max() <= 0.5 + 1e-5
    elif name == "int4":
        assert (np.abs(stored - np.clip(exact, -7, 7)) <= 0.5 + 1e-5).all() and np.abs(exact).max() <= 7 * 1.01
    else:
        assert (np.abs(stored - exact) <= np.maximum(np.abs(exact) / 16, 2.0**-10) * 1.0001).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_reader_gives_values_times_scales(name):
    layout, values = METHODS[name], matrix((192, 256), seed=1)
    parts = quantize.quantize(layout, values)
    out = np.empty(values.shape, ml_dtypes.bfloat16)
    layout.dequantize(parts, np.arange(192), np.arange(256), out=out)
    expected = (values_of(layout, parts) * scale_of_every_value(layout, parts, (192, 256))).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out, expected)
    lost = quantize.loss(layout, values, parts)
    difference = expected.astype(np.float64) - values.astype(np.float64)
    assert lost.relative == pytest.approx(
        np.linalg.norm(difference) / np.linalg.norm(values.astype(np.float64)), rel=1e-3
    )
    assert (lost + lost).relative == pytest.approx(lost.relative)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("fp8", 0.03), ("fp8-blocks", 0.03), ("int4", 0.12)])
def test_the_error_on_normal_weights(name, most):
    values = np.random.default_rng(0).normal(0, 0.02, (256, 512)).astype(np.float32)
    layout = METHODS[name]
    assert 0 < quantize.loss(layout, values, quantize.quantize(layout, values)).relative < most


@pytest.mark.parametrize("name", METHODS)
def test_rows_apart_give_the_rows_of_the_whole(name):
    layout, values = METHODS[name], matrix((384, 128))
    whole = quantize.quantize(layout, values)
    parts = [quantize.quantize(layout, values[start : start + 128]) for start in (0, 128, 256)]
    for suffix, array in whole.items():
        if suffix != "_shape":
            np.testing.assert_array_equal(np.concatenate([part[suffix] for part in parts]), array)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_and_tiny_values(name):
    layout = METHODS[name]
    for values in (np.zeros((2, 128)), np.full((2, 128), 1e-38), np.full((2, 128), 3e38)):
        parts = quantize.quantize(layout, values.astype(np.float32))
        scale = parts["_scale" if name != "fp8-blocks" else "_scale_inv"].astype(np.float32)
        assert np.isfinite(scale).all() and (scale > 0).all()
        back = values_of(layout, parts) * scale_of_every_value(layout, parts, (2, 128))
        np.testing.assert_allclose(back, values, rtol=0.1, atol=1e-37)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(name, wrong):
    values = np.ones((2, 128), np.float32)
    values[1, 3] = wrong
    with pytest.raises(ValueError, match="not finite"):
        quantize.quantize(METHODS[name], values)


def test_groups_must_be_filled():
    with pytest.raises(ValueError, match="100 inputs do not fill groups of 128"):
        quantize.quantize(METHODS["int4"], np.ones((2, 100), np.float32))


@pytest.mark.parametrize("name", METHODS)
def test_formats_survive_the_manifest(name):
    assert format_from_json(METHODS[name].to_json()) == METHODS[name]


def test_an_unknown_method_names_the_known():
    with pytest.raises(InputError, match=r"'int2'; it is one of int8, fp8, int4"):
        quantize.method("int2")
