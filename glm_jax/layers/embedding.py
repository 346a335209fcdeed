"""Token embedding and output head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.configs import ModelConfig
from glm_jax.layers.linear import precision_of
from glm_jax.sharding import Normal, declare, take_rows


class Embedding(nnx.Module):
    """A table [V, D] whose rows are looked up. Its rows are replicated, so that the look-up stays local."""

    def __init__(self, config: ModelConfig):
        self.weight = declare(
            (config.vocab_size, config.embed_dim), (None, "embed"), initializer=Normal(config.initializer_range)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] -> embeddings [B, T, D]."""
        return take_rows(self.weight[...], tokens)


class Head(nnx.Module):
    """The output projection [V, D], split over the vocabulary."""

    def __init__(self, config: ModelConfig):
        self.weight = declare(
            (config.vocab_size, config.embed_dim), ("vocab", "embed"), initializer=Normal(config.initializer_range)
        )


def logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] and a head or embedding [V, D] -> float32 logits [B, T, V]."""
    return jnp.einsum("btd,vd->btv", x, weight, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
