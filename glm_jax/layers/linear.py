"""Projections: einsum on weights in Hugging Face's orientation, with the arithmetic said out loud.

A float32 run is float32: TPUs would round the operands of a default-precision dot to bfloat16, and GPUs to TF32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sharding import einsum_reduce


def precision_of(dtype: Any) -> lax.Precision:
    """The precision of a dot over operands of `dtype`: full for float32, the hardware's own for anything smaller."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum of activations with a weight that needs no communication (column-parallel)."""
    return jnp.einsum(equation, x, weight, precision=precision_of(x.dtype))


def project_reduce(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum over a dimension that may be split over devices (row-parallel): ends in an all-reduce."""
    return einsum_reduce(equation, x, weight, precision=precision_of(x.dtype))
