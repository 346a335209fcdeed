"""Grouped-query attention with optional biases and per-head norm of queries and keys (QK-norm).

The order is the reference's: project, add the bias, normalise each head, rotate.
"""

from __future__ import annotations

import jax
from flax import nnx

from glm_jax.configs import GqaConfig
from glm_jax.layers.attention_core import attend
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.kv_cache import KvCache, Zeros
from glm_jax.layers.linear import project
from glm_jax.layers.norm import RmsNorm
from glm_jax.layers.rope import rotate
from glm_jax.sharding import Constant, Normal, all_gather_dim, declare, select_token


class GqaAttention(nnx.Module):
    """Weights in Hugging Face's orientation with the heads apart: q [N, H, D], k and v [K, H, D], o [D, N, H]."""

    def __init__(self, config: GqaConfig, embed_dim: int, *, norm_eps: float, initializer_range: float):
        normal, zero = Normal(initializer_range), Constant(0.0)
        self.config = config

        def heads(axis: str, count: int) -> nnx.Param:
            shape = (count, config.head_dim, embed_dim)
            return declare(shape, (axis, "head_dim", "embed"), initializer=normal, contracting_dims=1)

        def bias(axis: str, count: int) -> nnx.Param | None:
            if not config.qkv_bias:
                return None
            return declare((count, config.head_dim), (axis, "head_dim"), initializer=zero)

        def norm() -> RmsNorm | None:
            return RmsNorm(config.head_dim, eps=norm_eps, axis="head_dim") if config.qk_norm else None

        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        self.q, self.q_bias, self.q_norm = heads("heads", num_heads), bias("heads", num_heads), norm()
        self.k, self.k_bias, self.k_norm = heads("kv_heads", num_kv_heads), bias("kv_heads", num_kv_heads), norm()
        self.v, self.v_bias = heads("kv_heads", num_kv_heads), bias("kv_heads", num_kv_heads)
        shape, axes = (embed_dim, num_heads, config.head_dim), ("embed", "heads", "head_dim")
        self.o = declare(shape, axes, initializer=normal, contracting_dims=2)

    def __call__(
        self,
        x: jax.Array,
        context: ForwardContext,
        cache: KvCache | None,
        layer: jax.Array | None,
        *,
        query_index: jax.Array | None = None,
    ) -> tuple[jax.Array, KvCache | None]:
        """Attention of x [B, T, D] over its own sequences; returns [B, T, D] and the cache with the new tokens.

        With a `query_index` [B], only that token of each sequence is a query: [B, 1, D].
        """
        ops, query_pass = context.ops, context.select(query_index)
        queries = x if query_index is None else select_token(x, query_index)
        q = _normed(project(queries, self.q[...], ops), self.q_bias, self.q_norm)
        k = _normed(project(x, self.k[...], ops), self.k_bias, self.k_norm)
        v = _normed(project(x, self.v[...], ops), self.v_bias, None)
        q, k = rotate(q, query_pass.rotation), rotate(k, context.rotation)
        k, v = all_gather_dim(k, 1), all_gather_dim(v, 1)  # a query needs those of all devices that share its sequence
        if cache is not None:
            cache = cache.write(k, v, context.positions, layer)
        if context.prefill:
            keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            assert cache is not None, "a pass that continues sequences needs their cache"
            keys, values = cache.read(layer)
        return project(attend(q, keys, values, query_pass), self.o[...], ops, row_parallel=True), cache

    def empty_cache(self, zeros: Zeros, *, batch: int, length: int) -> KvCache:
        """A cache of `length` tokens a sequence, split like the kv heads and by length."""
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        axes = ("batch", "kv_heads", "length", None)
        return KvCache(zeros(shape, axes), zeros(shape, axes))


def _normed(heads: jax.Array, bias: nnx.Param | None, norm: RmsNorm | None) -> jax.Array:
    if bias is not None:
        heads = heads + bias[...].astype(heads.dtype)
    return heads if norm is None else norm(heads)
