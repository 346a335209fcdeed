"""The router: sigmoid scores, a correction bias for the choice only, an optional limit to the best groups.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and GLM-4.5 share it; one group is the plain case. All of it is float32,
and the bias stays float32 in memory and on disk: rounded to bfloat16 it changes most of the choices.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.configs import MoeConfig
from glm_jax.kernels import Ops
from glm_jax.layers.linear import project
from glm_jax.sharding import Constant, Normal, declare


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "weights", "scores"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Routing:
    """The choice for each token: experts `ids` int32 [B, T, K], their `weights` and all `scores`, float32."""

    ids: jax.Array
    weights: jax.Array
    scores: jax.Array


class Router(nnx.Module):
    """Chooses K of E experts for each token. Replicated: every device scores all experts."""

    def __init__(self, config: MoeConfig, embed_dim: int, *, initializer_range: float):
        self.config = config
        self.weight = declare((config.num_experts, embed_dim), (None, None), initializer=Normal(initializer_range))
        self.bias = declare((config.num_experts,), (None,), initializer=Constant(0.0), dtype=jnp.float32)

    def __call__(self, x: jax.Array, ops: Ops) -> Routing:
        """Route x [B, T, D]. The bias moves the choice, never the weight; weights sum to `routed_scaling`."""
        config = self.config
        logits = project(x.astype(jnp.float32), self.weight[...].astype(jnp.float32), ops)
        scores = jax.nn.sigmoid(logits)
        choice = scores + self.bias[...]
        if config.num_groups > 1:
            choice = _keep_best_groups(choice, config)
        ids = ops.top_k.by_row(jax.lax.stop_gradient(choice), k=config.num_experts_per_token)
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        if config.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return Routing(ids, weights * config.routed_scaling, scores)


def _keep_best_groups(choice: jax.Array, config: MoeConfig) -> jax.Array:
    """Set the experts outside the best groups to -inf; a group is as good as its two best experts together."""
    batch, length, experts = choice.shape
    grouped = choice.reshape(batch, length, config.num_groups, experts // config.num_groups)
    group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    best = jax.lax.top_k(group_scores, config.num_groups_per_token)[1]
    kept = jnp.any(jnp.arange(config.num_groups) == best[..., None], axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
