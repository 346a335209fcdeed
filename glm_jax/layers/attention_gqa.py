"""Grouped-query attention with optional biases and per-head norm of queries and keys (QK-norm).

The order is the reference's: project, add the bias, normalise each head, rotate.
"""

from __future__ import annotations

import jax
from flax import nnx

from glm_jax.configs import GqaConfig
from glm_jax.layers.attention_core import attend
from glm_jax.layers.kv_cache import KvCache, Zeros
from glm_jax.layers.linear import project, project_each, project_reduce
from glm_jax.layers.norm import RmsNorm
from glm_jax.layers.rope import rotate
from glm_jax.layers.step import Step
from glm_jax.sharding import Constant, Normal, declare, take_position, whole


class GqaAttention(nnx.Module):
    """Weights in Hugging Face's orientation with the heads apart: q [N, H, D], k and v [K, H, D], o [D, N, H]."""

    def __init__(self, config: GqaConfig, embed_dim: int, *, norm_eps: float, initializer_range: float):
        normal, zero = Normal(initializer_range), Constant(0.0)
        self.config = config

        def heads(axis: str, count: int) -> nnx.Param:
            shape = (count, config.head_dim, embed_dim)
            return declare(shape, (axis, "head_dim", "embed"), initializer=normal, inputs=1)

        def bias(axis: str, count: int) -> nnx.Param | None:
            if not config.qkv_bias:
                return None
            return declare((count, config.head_dim), (axis, "head_dim"), initializer=zero)

        def norm() -> RmsNorm | None:
            return RmsNorm(config.head_dim, eps=norm_eps, axis="head_dim") if config.qk_norm else None

        self.q, self.q_bias, self.q_norm = heads("heads", config.num_heads), bias("heads", config.num_heads), norm()
        self.k, self.k_bias, self.k_norm = (
            heads("kv_heads", config.num_kv_heads),
            bias("kv_heads", config.num_kv_heads),
            norm(),
        )
        self.v, self.v_bias = heads("kv_heads", config.num_kv_heads), bias("kv_heads", config.num_kv_heads)
        self.o = declare(
            (embed_dim, config.num_heads, config.head_dim), ("embed", "heads", "head_dim"), initializer=normal, inputs=2
        )

    def __call__(
        self, x: jax.Array, step: Step, cache: KvCache | None, layer: jax.Array | None, *, only: jax.Array | None = None
    ) -> tuple[jax.Array, KvCache | None]:
        """Attention of x [B, T, D] over its own sequences; returns [B, T, D] and the cache with the new rows.

        With `only`, one row [B] of each sequence, that one alone asks: [B, 1, D].
        """
        asking = step.only(only)
        if only is None:
            q, k, v = project_each(x, [self.q[...], self.k[...], self.v[...]])
        else:
            q = project(take_position(x, only), self.q[...])
            k, v = project_each(x, [self.k[...], self.v[...]])
        q, k = _normed(q, self.q_bias, self.q_norm), _normed(k, self.k_bias, self.k_norm)
        v = _normed(v, self.v_bias, None)
        q, k = rotate(q, asking.rotation), rotate(k, step.rotation)
        k, v = whole(k, 1), whole(v, 1)  # each query needs those of all devices that share its sequence
        if cache is not None:
            cache = cache.write(k, v, step.positions, layer)
        if step.fresh:
            keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            assert cache is not None, "a pass that continues sequences needs their cache"
            keys, values = cache.read(layer)
        out = attend(q, keys, values, last_key=asking.positions, fresh=asking.fresh)
        return project_reduce(out, self.o[...]), cache

    def empty_cache(self, zeros: Zeros, *, batch: int, length: int) -> KvCache:
        """A cache of `length` rows a sequence, split like the kv heads and by length."""
        shape, axes = (
            (batch, self.config.num_kv_heads, length, self.config.head_dim),
            ("batch", "kv_heads", "length", None),
        )
        return KvCache(zeros(shape, axes), zeros(shape, axes))


def _normed(heads: jax.Array, bias: nnx.Param | None, norm: RmsNorm | None) -> jax.Array:
    if bias is not None:
        heads = heads + bias[...].astype(heads.dtype)
    return heads if norm is None else norm(heads)
