"""Root-mean-square layer norm (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.sharding import Constant, declare


class RmsNorm(nnx.Module):
    """x / rms(x) * scale over the last dimension: statistics in float32, the product in the dtype of x."""

    def __init__(self, size: int, *, eps: float, axis: str | None = "embed"):
        self.eps = eps
        self.scale = declare((size,), (axis,), initializer=Constant(1.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [..., D]; the rounding before the scale is the reference's."""
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.scale[...].astype(x.dtype)
