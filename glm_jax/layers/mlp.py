"""The gated MLP (SwiGLU, arXiv 2002.05202): down(silu(gate(x)) * up(x)), without biases."""

from __future__ import annotations

import jax
from flax import nnx

from glm_jax.kernels import Ops
from glm_jax.kernels.reference import swiglu
from glm_jax.layers.linear import project, project_pair
from glm_jax.sharding import Normal, declare


class Mlp(nnx.Module):
    """A dense MLP or the shared experts. Gate and up are one leaf [2, F, D]: split F and both stay in step."""

    def __init__(self, embed_dim: int, width: int, *, initializer_range: float):
        normal = Normal(initializer_range)
        self.gate_up = declare((2, width, embed_dim), (None, "mlp", "embed"), initializer=normal, contracting_dims=1)
        self.down = declare((embed_dim, width), ("embed", "mlp"), initializer=normal, contracting_dims=1)

    def __call__(self, x: jax.Array, ops: Ops) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        gate, up = project_pair(x, self.gate_up[...], ops)
        return project(swiglu(gate, up), self.down[...], ops, row_parallel=True)
