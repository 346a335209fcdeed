"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, Kimi K2, GLM-4.7-Flash).

Keys and values of all heads are projections of one latent vector a token; only it, and one rotated key that all heads
share, is cached. There are two forms of the same arithmetic:

    expanded  keys and values of each head are projected from the latent vectors: for prompts and training
    absorbed  the projections move to the queries and to the result, so that attention runs over the latent vectors
              as they are cached, as over one key and value head: for decode

Making keys and values costs work for each cached token, attention over latent vectors costs more for each query: the
number of queries decides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.configs import MlaConfig
from glm_jax.kernels.quantized import absorb_into_query, expand_values
from glm_jax.layers.attention_core import attend
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.kv_cache import LatentCache, Zeros
from glm_jax.layers.linear import project
from glm_jax.layers.norm import RmsNorm
from glm_jax.layers.rope import rotate
from glm_jax.sharding import Normal, all_gather_dim, declare, select_token


class MlaAttention(nnx.Module):
    """Weights in Hugging Face's orientation with the heads apart; R the latent size, Q the queries' latent size.

    q_a [Q, D] and q_b [N, qk, Q] (or, without a latent vector, q [N, qk, D]), kv_a [R + rope, D],
    kv_b [N, nope + value, R], o [D, N, value].
    """

    def __init__(self, config: MlaConfig, embed_dim: int, *, initializer_range: float):
        heads, rank, q_rank = config.num_heads, config.kv_rank, config.q_rank

        def matrix(shape: tuple[int, ...], *axes: str, contracting_dims: int = 1) -> nnx.Param:
            return declare(shape, axes, initializer=Normal(initializer_range), contracting_dims=contracting_dims)

        def per_head(size: int, inputs: int, axis: str) -> nnx.Param:
            return matrix((heads, size, inputs), "heads", "head_dim", axis)

        self.config = config
        self.q = per_head(config.qk_dim, embed_dim, "embed") if q_rank is None else None
        self.q_a = None if q_rank is None else matrix((q_rank, embed_dim), "rank", "embed")
        self.q_norm = None if q_rank is None else RmsNorm(q_rank, eps=config.norm_eps, axis="rank")
        self.q_b = None if q_rank is None else per_head(config.qk_dim, q_rank, "rank")
        self.kv_a = matrix((config.latent_dim, embed_dim), "rank", "embed")
        self.kv_norm = RmsNorm(rank, eps=config.norm_eps, axis="rank")
        self.kv_b = per_head(config.nope_dim + config.value_dim, rank, "latent")
        self.o = matrix((embed_dim, heads, config.value_dim), "embed", "heads", "head_dim", contracting_dims=2)

    def __call__(
        self,
        x: jax.Array,
        context: ForwardContext,
        cache: LatentCache | None,
        layer: jax.Array | None,
        *,
        query_index: jax.Array | None = None,
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attention of x [B, T, D] over its own sequences; returns [B, T, D] and the cache with the new tokens.

        With a `query_index` [B], only that token of each sequence is a query: [B, 1, D].
        """
        query_pass = context.select(query_index)
        q = self._queries(x if query_index is None else select_token(x, query_index), query_pass)
        # Each query needs the latent vectors of all devices that share its sequence.
        latent = all_gather_dim(self._latent(x, context), 1)
        if cache is not None:
            cache = cache.write(latent, context.positions, layer)
        if not context.prefill:
            assert cache is not None, "a pass that continues sequences needs their cache"
            latent = cache.read(layer).astype(x.dtype)
        form = self._expanded if query_pass.prefill or self._expanding_pays(q.shape[1]) else self._absorbed
        return project(form(q, latent, query_pass), self.o[...], context.ops, row_parallel=True), cache

    def empty_cache(self, zeros: Zeros, *, batch: int, length: int) -> LatentCache:
        """A cache of `length` tokens a sequence. No dimension is one of heads: tensor parallelism replicates it."""
        return LatentCache(zeros((batch, 1, length, self.config.latent_dim), ("batch", None, "length", "latent")))

    def _queries(self, x: jax.Array, context: ForwardContext) -> jax.Array:
        """The queries [B, T, N, qk] of x [B, T, D], their last values rotated."""
        if self.q is not None:
            q = project(x, self.q[...], context.ops)
        else:
            assert self.q_a is not None and self.q_norm is not None and self.q_b is not None
            q = project(self.q_norm(project(x, self.q_a[...], context.ops)), self.q_b[...], context.ops)
        nope = self.config.nope_dim
        return jnp.concatenate([q[..., :nope], rotate(q[..., nope:], context.rotation)], axis=-1)

    def _latent(self, x: jax.Array, context: ForwardContext) -> jax.Array:
        """What is cached of x [B, T, D]: the normalised latent vector and the rotated key, [B, T, C]."""
        both, rank = project(x, self.kv_a[...], context.ops), self.config.kv_rank
        key = rotate(both[:, :, None, rank:], context.rotation)[:, :, 0]
        return jnp.concatenate([self.kv_norm(both[..., :rank]), key], axis=-1)

    def _expanded(self, q: jax.Array, latent: jax.Array, context: ForwardContext) -> jax.Array:
        """Attention of q [B, T, N, qk] over keys and values expanded from latent [B, S, C]: [B, T, N, value]."""
        config = self.config
        expanded = project(latent[..., : config.kv_rank], self.kv_b[...], context.ops)
        # The shared key for every head, laid out as the heads are.
        shared = latent[:, :, None, config.kv_rank : config.latent_dim] + jnp.zeros_like(expanded[..., :1])
        keys = jnp.concatenate([expanded[..., : config.nope_dim], shared], axis=-1)
        values = expanded[..., config.nope_dim :]
        return attend(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), context, scale=config.softmax_scale)

    def _absorbed(self, q: jax.Array, latent: jax.Array, context: ForwardContext) -> jax.Array:
        """The same, over latent [B, S, C] itself."""
        config, weight = self.config, self.kv_b[...]
        nope, rank = config.nope_dim, config.kv_rank
        latent_q = jnp.concatenate([absorb_into_query(q[..., :nope], weight, count=nope), q[..., nope:]], axis=-1)
        unused = latent.shape[-1] - config.latent_dim
        latent_q = jnp.pad(latent_q, [(0, 0), (0, 0), (0, 0), (0, unused)]) if unused else latent_q
        # The values are the first part of the keys. The rest of the result is left unused: to cut the values out of
        # the latent vectors would copy the cache.
        one_head = latent[:, None]
        out = attend(latent_q, one_head, one_head, context, scale=config.softmax_scale)[..., :rank]
        return expand_values(out, weight, count=config.value_dim)

    def _expanding_pays(self, queries: int) -> bool:
        """Whether making keys and values is less work, for each cached token and head, than what it saves."""
        config = self.config
        saved = queries * (2 * config.latent_dim - config.qk_dim - config.value_dim)
        return saved > config.kv_rank * (config.nope_dim + config.value_dim)
