"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, Kimi K2, GLM-4.7-Flash).

Keys and values of all heads are projections of one latent vector a token; only it, and one rotated key that all heads
share, is cached. There are two forms of the same arithmetic:

    expanded  keys and values of each head are made of the latent vectors: for prompts and training
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
from glm_jax.layers.attention_core import attend
from glm_jax.layers.kv_cache import LatentCache, Zeros
from glm_jax.layers.linear import precision_of, project, project_reduce
from glm_jax.layers.norm import RmsNorm
from glm_jax.layers.quantized import contract_outputs, weight_einsum
from glm_jax.layers.rope import rotate
from glm_jax.layers.step import Step
from glm_jax.sharding import Normal, QuantizedArray, WeightArray, declare, take_position, whole


class MlaAttention(nnx.Module):
    """Weights in Hugging Face's orientation with the heads apart; R the latent size, Q the queries' latent size.

    q_a [Q, D] and q_b [N, qk, Q] (or, without a latent vector, q [N, qk, D]), kv_a [R + rope, D],
    kv_b [N, nope + value, R], o [D, N, value].
    """

    def __init__(self, config: MlaConfig, embed_dim: int, *, initializer_range: float):
        heads, rank, q_rank = config.num_heads, config.kv_rank, config.q_rank

        def matrix(shape: tuple[int, ...], *axes: str, inputs: int = 1) -> nnx.Param:
            return declare(shape, axes, initializer=Normal(initializer_range), inputs=inputs)

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
        self.o = matrix((embed_dim, heads, config.value_dim), "embed", "heads", "head_dim", inputs=2)

    def __call__(
        self,
        x: jax.Array,
        step: Step,
        cache: LatentCache | None,
        layer: jax.Array | None,
        *,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attention of x [B, T, D] over its own sequences; returns [B, T, D] and the cache with the new rows.

        With `only`, one row [B] of each sequence, that one alone asks: [B, 1, D].
        """
        asking = step.only(only)
        q = self._queries(x if only is None else take_position(x, only), asking)
        rows = whole(self._latent(x, step), 1)  # each query needs those of all devices that share its sequence
        if cache is not None:
            cache = cache.write(rows, step.positions, layer)
        if not step.fresh:
            assert cache is not None, "a pass that continues sequences needs their cache"
            rows = cache.read(layer).astype(x.dtype)
        form = self._expanded if asking.fresh or self._expanding_pays(q.shape[1]) else self._absorbed
        return project_reduce(form(q, rows, asking), self.o[...]), cache

    def empty_cache(self, zeros: Zeros, *, batch: int, length: int) -> LatentCache:
        """A cache of `length` rows a sequence. No dimension is one of heads: tensor parallelism replicates it."""
        return LatentCache(zeros((batch, 1, length, self.config.latent_dim), ("batch", None, "length", "latent")))

    def _queries(self, x: jax.Array, step: Step) -> jax.Array:
        """The queries [B, T, N, qk] of x [B, T, D], their last values rotated."""
        if self.q is not None:
            q = project(x, self.q[...])
        else:
            assert self.q_a is not None and self.q_norm is not None and self.q_b is not None
            q = project(self.q_norm(project(x, self.q_a[...])), self.q_b[...])
        nope = self.config.nope_dim
        return jnp.concatenate([q[..., :nope], rotate(q[..., nope:], step.rotation)], axis=-1)

    def _latent(self, x: jax.Array, step: Step) -> jax.Array:
        """What is cached of x [B, T, D]: the normalised latent vector and the rotated key, [B, T, C]."""
        both, rank = project(x, self.kv_a[...]), self.config.kv_rank
        key = rotate(both[:, :, None, rank:], step.rotation)[:, :, 0]
        return jnp.concatenate([self.kv_norm(both[..., :rank]), key], axis=-1)

    def _expanded(self, q: jax.Array, rows: jax.Array, step: Step) -> jax.Array:
        """Attention of q [B, T, N, qk] over the keys and values made of rows [B, S, C]: [B, T, N, value]."""
        config = self.config
        made = project(rows[..., : config.kv_rank], self.kv_b[...])
        # The shared key for every head, laid out as the heads are.
        shared = rows[:, :, None, config.kv_rank : config.latent_dim] + jnp.zeros_like(made[..., :1])
        keys = jnp.concatenate([made[..., : config.nope_dim], shared], axis=-1)
        values = made[..., config.nope_dim :]
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        return attend(q, keys, values, last_key=step.positions, scale=config.softmax_scale, fresh=step.fresh)

    def _absorbed(self, q: jax.Array, rows: jax.Array, step: Step) -> jax.Array:
        """The same, over the rows [B, S, C] themselves."""
        config = self.config
        weight: WeightArray = self.kv_b[...]
        nope, rank, precision = config.nope_dim, config.kv_rank, precision_of(q.dtype)
        q_nope, of_keys, of_values = q[..., :nope], weight[:, :nope], weight[:, nope:]
        if isinstance(weight, QuantizedArray) and not weight.bits:
            # Parts of narrow values a GPU would widen and cut out before the product, as a copy of the weight. The
            # whole it widens as it is read; the zeros and the results of the other part cost nothing beside that.
            of_keys = of_values = weight
            q_nope = jnp.pad(q_nope, [(0, 0), (0, 0), (0, 0), (0, config.value_dim)])
        latent_q = contract_outputs(q_nope, of_keys, precision=precision)
        unused = rows.shape[-1] - config.latent_dim
        latent_q = jnp.concatenate([latent_q, q[..., nope:]], axis=-1)
        latent_q = jnp.pad(latent_q, [(0, 0), (0, 0), (0, 0), (0, unused)]) if unused else latent_q
        # The values are the first part of the keys; the rest of the product is left unused rather than the rows cut,
        # which would copy the cache.
        one_head = rows[:, None]
        out = attend(latent_q, one_head, one_head, last_key=step.positions, scale=config.softmax_scale)[..., :rank]
        out = weight_einsum("btnr,nhr->btnh", out, of_values, precision=precision)
        return out[..., -config.value_dim :]

    def _expanding_pays(self, queries: int) -> bool:
        """Whether making keys and values is less work, for each cached token and head, than what it saves."""
        config = self.config
        saved = queries * (2 * config.latent_dim - config.qk_dim - config.value_dim)
        return saved > config.kv_rank * (config.nope_dim + config.value_dim)
