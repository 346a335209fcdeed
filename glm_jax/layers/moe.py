"""The mixture-of-experts layer: router, routed experts, shared experts (arXiv 2401.06066)."""

from __future__ import annotations

import jax
from flax import nnx

from glm_jax.configs import MoeConfig
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.dispatch import run_experts
from glm_jax.layers.mlp import Mlp
from glm_jax.layers.router import Router
from glm_jax.sharding import Normal, declare


class Experts(nnx.Module):
    """The weights of all routed experts: gate and up as one leaf [E, 2, F, D], down [E, D, F]."""

    def __init__(self, config: MoeConfig, embed_dim: int, *, initializer_range: float):
        normal, experts, width = Normal(initializer_range), config.num_experts, config.expert_width
        gate_up, down = ("expert", None, "mlp", "embed"), ("expert", "embed", "mlp")
        self.gate_up = declare((experts, 2, width, embed_dim), gate_up, initializer=normal, contracting_dims=1)
        self.down = declare((experts, embed_dim, width), down, initializer=normal, contracting_dims=1)


class Moe(nnx.Module):
    """Routed experts, weighted, plus the shared experts, unweighted, on the same input."""

    def __init__(self, config: MoeConfig, embed_dim: int, *, initializer_range: float):
        self.router = Router(config, embed_dim, initializer_range=initializer_range)
        self.experts = Experts(config, embed_dim, initializer_range=initializer_range)
        shared_width = config.num_shared_experts * config.expert_width
        self.shared = Mlp(embed_dim, shared_width, initializer_range=initializer_range) if shared_width else None

    def __call__(self, x: jax.Array, context: ForwardContext) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> [B, T, D], and the experts chosen for each token, int32 [B, T, K]."""
        routing = self.router(x, context.ops)
        gate_up, down = self.experts.gate_up[...], self.experts.down[...]
        routed = run_experts(
            x, routing.ids, routing.weights, gate_up=gate_up, down=down, ops=context.ops, dispatch=context.dispatch
        )
        return routed if self.shared is None else routed + self.shared(x, context.ops), routing.ids
