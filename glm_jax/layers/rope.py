"""Rotary position embedding on the first values of each head (arXiv 2104.09864), in the half-split pairing.

Value i of the rotated part pairs with value i + rotary_dim / 2. The exponent's denominator is the rotated size, not
the head's. Angles are float32 always.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from glm_jax.configs import RopeConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cos", "sin"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every position, float32 [B, T, rotary_dim / 2]."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, config: RopeConfig) -> Rotation:
    """The rotation of positions [B, T]."""
    exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    angles = positions.astype(jnp.float32)[..., None] * (1.0 / config.theta**exponents)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate the first values of each head of x [B, T, N, H]; the rest passes through."""
    half = by.cos.shape[-1]
    cos, sin = by.cos[:, :, None].astype(x.dtype), by.sin[:, :, None].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
