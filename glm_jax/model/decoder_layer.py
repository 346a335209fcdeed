"""One pre-norm decoder layer, and the MTP layer that wraps one more."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.configs import GqaConfig, MlaConfig, ModelConfig
from glm_jax.layers.attention_gqa import GqaAttention
from glm_jax.layers.attention_mla import MlaAttention
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.embedding import Embedding, Head
from glm_jax.layers.kv_cache import LayerCache
from glm_jax.layers.linear import project
from glm_jax.layers.mlp import Mlp
from glm_jax.layers.moe import Moe
from glm_jax.layers.norm import RmsNorm
from glm_jax.sharding import Normal, declare, select_token


class DecoderLayer(nnx.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h)), the MLP being dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, *, experts: bool):
        size, std = config.embed_dim, config.initializer_range
        self.attention_norm = RmsNorm(size, eps=config.norm_eps)
        self.attention = _attention(config)
        self.mlp_norm = RmsNorm(size, eps=config.norm_eps)
        self.mlp: Any = None if experts else Mlp(size, config.mlp_width, initializer_range=std)
        self.moe: Any = Moe(config.moe, size, initializer_range=std) if experts else None

    def __call__(
        self,
        x: jax.Array,
        context: ForwardContext,
        cache: LayerCache | None,
        layer: jax.Array | None,
        *,
        query_index: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Run x [B, T, D] through the layer.

        `layer` is its index where the cache is that of a stacked group. Returns x [B, T, D], the cache with this
        pass's tokens, and of a MoE layer the experts chosen, int32 [B, T, K]. With a `query_index` [B], only that token
        of each sequence is a query, and the others are only cached: T is then 1 in what is returned.
        """
        attended, cache = self.attention(self.attention_norm(x), context, cache, layer, query_index=query_index)
        x = (x if query_index is None else select_token(x, query_index)) + attended
        normal = self.mlp_norm(x)
        out, ids = (self.mlp(normal, context.ops), None) if self.mlp is not None else self.moe(normal, context)
        return x + out, cache, ids


def _attention(config: ModelConfig) -> Any:
    size, std = config.embed_dim, config.initializer_range
    match config.attention:
        case GqaConfig() as gqa:
            return GqaAttention(gqa, size, norm_eps=config.norm_eps, initializer_range=std)
        case MlaConfig() as mla:
            return MlaAttention(mla, size, initializer_range=std)


class MtpLayer(nnx.Module):
    """Multi-token prediction: from the hidden state of token t and the embedding of token t + 1, token t + 2.

    The input is [embedding | hidden], each normalised; the hidden state is the model's after its final norm
    (DeepSeek-V3, arXiv 2412.19437, section 2.2, as GLM-4.5's checkpoints have it). `embedding` and `head` are the
    checkpoint's copies of the main ones: declared so that they are counted and converted, and never used.
    """

    def __init__(self, config: ModelConfig):
        size = config.embed_dim
        self.embed_norm = RmsNorm(size, eps=config.norm_eps)
        self.hidden_norm = RmsNorm(size, eps=config.norm_eps)
        initializer = Normal(config.initializer_range)
        self.projection = declare((size, 2 * size), ("embed", None), initializer=initializer, packable=True)
        self.layer = DecoderLayer(config, experts=True)
        self.norm = RmsNorm(size, eps=config.norm_eps)
        self.embedding = Embedding(config) if "embedding" in config.mtp_copies else None
        self.head = Head(config) if "head" in config.mtp_copies else None

    def __call__(
        self,
        embedded: jax.Array,
        hidden: jax.Array,
        context: ForwardContext,
        cache: LayerCache | None,
        *,
        query_index: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Embeddings of the next tokens and hidden states [B, T, D] -> as a layer, normalised for the head."""
        joined = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x = project(joined, self.projection[...], context.ops, row_parallel=True)
        x, cache, ids = self.layer(x, context, cache, None, query_index=query_index)
        return self.norm(x), cache, ids
