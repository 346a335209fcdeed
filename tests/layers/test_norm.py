"""RMS norm against torch: statistics in float32, rounding before the scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glm_jax.layers.norm import RmsNorm

SIZE, EPS = 24, 1e-5


def by_numpy(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """In float64, with the reference's two roundings to the dtype of x."""
    wide = x.astype(np.float64)
    normal = (wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPS)).astype(x.dtype)
    return (normal.astype(np.float64) * scale.astype(x.dtype).astype(np.float64)).astype(x.dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(SIZE,), (2, 3, SIZE), (1, 2, 4, SIZE)], ids=str)
def test_against_the_definition(dtype, shape):
    rng = np.random.default_rng(0)
    x, scale = (rng.normal(size=s).astype(dtype) for s in (shape, (SIZE,)))
    norm = RmsNorm(SIZE, eps=EPS)
    norm.scale.set_raw_value(jnp.asarray(scale))
    ours = jax.jit(norm.__call__)(jnp.asarray(x))
    assert ours.dtype == dtype
    tolerance = 1e-6 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(np.float32(ours), np.float32(by_numpy(x, scale)), rtol=tolerance, atol=tolerance)


def test_large_and_zero_rows():
    """The squares of large bfloat16 values would overflow in float16, and a row of zeros has no root to divide by."""
    norm = RmsNorm(SIZE, eps=EPS)
    norm.scale.set_raw_value(jnp.ones(SIZE))
    x = jnp.stack([jnp.full(SIZE, 1e18), jnp.zeros(SIZE)])
    np.testing.assert_allclose(norm(x), [[1.0] * SIZE, [0.0] * SIZE], rtol=1e-6)
