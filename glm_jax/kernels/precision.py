"""A float32 run is float32: by default TPUs round the operands of a dot to bfloat16, and GPUs to TF32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


def precision_of(dtype: Any) -> lax.Precision:
    """The precision of a dot over operands of `dtype`: full for float32, the hardware's own for anything smaller."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
