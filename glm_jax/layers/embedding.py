"""Token embedding and output head."""

from __future__ import annotations

import jax
from flax import nnx

from glm_jax.configs import ModelConfig
from glm_jax.sharding import Normal, declare, embedding_lookup
from glm_jax.sharding.fsdp import fsdp_axes, fsdp_matmul_outputs


class Embedding(nnx.Module):
    """A table [V, D] whose rows are looked up. Its rows are replicated, so that the look-up stays local."""

    def __init__(self, config: ModelConfig):
        shape, initializer = (config.vocab_size, config.embed_dim), Normal(config.initializer_range)
        self.weight = declare(shape, (None, "embed"), initializer=initializer, packable=True)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] -> embeddings [B, T, D]."""
        table = self.weight[...]
        if fsdp := fsdp_axes(table, 1):
            return fsdp_matmul_outputs(lambda t, w: embedding_lookup(w, t), tokens, table, fsdp=fsdp, dimension=1)
        return embedding_lookup(table, tokens)


class Head(nnx.Module):
    """The output projection [V, D], split over the vocabulary."""

    def __init__(self, config: ModelConfig):
        shape, initializer = (config.vocab_size, config.embed_dim), Normal(config.initializer_range)
        self.weight = declare(shape, ("vocab", "embed"), initializer=initializer, packable=True)
